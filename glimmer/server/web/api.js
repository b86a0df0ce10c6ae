/**
 * Requests to the server that this page came from: which models there are, and chat completions as they stream.
 * Keeps the API key. Knows nothing of conversations or of what is on the screen.
 */

const root = new URL("v1/", document.baseURI);
const KEY = "glimmer.key";

/** What the server refused, or that it could not be reached: `status` is the HTTP status, 0 without one. */
export class ServerError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const apiKey = () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";

/** Keeps the key until the tab is closed, or, with `remember`, in this browser. */
export function setApiKey(key, remember) {
  for (const storage of [sessionStorage, localStorage]) storage.removeItem(KEY);
  if (key) (remember ? localStorage : sessionStorage).setItem(KEY, key);
}

async function request(path, options) {
  const headers = { ...(apiKey() && { authorization: `Bearer ${apiKey()}` }), ...options.headers };
  let response;
  try {
    response = await fetch(new URL(path, root), { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("", { code: "unreachable" });
  }
  if (response.ok) return response;
  const text = await response.text();
  let error;
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    error = { message: text.slice(0, 500) }; // A proxy in front of the server answers in HTML or plain text.
  }
  throw new ServerError(String(error.message ?? response.statusText), { status: response.status, code: error.code });
}

/** The models served: [{id, max_model_len}]. */
export async function models() {
  return (await (await request("models", {})).json()).data;
}

/** Streams a chat completion: yields each chunk of the answer. Throws ServerError; closing it closes the connection. */
export async function* chat(body, signal) {
  const response = await request("chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error)
        throw new ServerError(String(chunk.error.message), { status: response.status, code: chunk.error.code });
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    throw new ServerError("", { code: "interrupted" });
  }
  throw new ServerError("", { code: "interrupted" });
}

/** The `data` of each server-sent event in a stream of bytes. Comments (keep-alive) are passed over. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}
