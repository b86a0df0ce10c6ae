/**
 * A conversation: a tree of turns, of which one path is shown. Editing a question, or asking for another answer, adds a
 * branch; nothing is overwritten. Plain data, so that it can be stored and exported as it is; no view, no network.
 *
 *   conversation  {id, title, created, updated, settings, turns: {id: turn}, chosen: {id of a turn, or "": id of a child}}
 *   turn          {id, parent, role, created} and, by role,
 *     user        content
 *     assistant   reasoning, content, calls: [{id, name, arguments}], finish, usage, times, error
 *     tool        results: [{id, content}], one for each call of the turn above
 */

export const SETTINGS = {
  system: "",
  thinking: true,
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_tokens: "",
  min_tokens: "",
  seed: "",
  presence_penalty: "",
  frequency_penalty: "",
  repetition_penalty: "",
  stop: "",
  tools: "",
  tool_choice: "auto",
  format: "",
};

/** An identifier that no other turn or conversation has. (crypto.randomUUID is missing on pages without TLS.) */
function identifier() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings = {}) {
  const now = Date.now();
  return {
    id: `c${identifier()}`,
    title: "",
    created: now,
    updated: now,
    settings: { ...SETTINGS, ...settings },
    turns: {},
    chosen: {},
  };
}

const keyOf = (parent) => parent ?? "";

/** Adds a turn below `parent` (the id of a turn, or null) and shows it. */
export function addTurn(conversation, parent, fields) {
  const turn = { id: `t${identifier()}`, parent, created: Date.now(), ...fields };
  conversation.turns[turn.id] = turn;
  conversation.updated = Date.now();
  choose(conversation, turn);
  return turn;
}

export const newAnswer = () => ({
  role: "assistant",
  reasoning: "",
  content: "",
  calls: [],
  finish: null,
  usage: null,
  times: { start: Date.now(), first: 0, thought: 0, end: 0 },
  error: null,
});

/** Makes `turn` the version that is shown among its siblings. */
export function choose(conversation, turn) {
  conversation.chosen[keyOf(turn.parent)] = turn.id;
}

/** Takes away a turn that has none below it; the newest of its siblings is shown then. */
export function removeTurn(conversation, turn) {
  delete conversation.turns[turn.id];
  const last = versions(conversation, turn).at(-1);
  if (last) choose(conversation, last);
  else delete conversation.chosen[keyOf(turn.parent)];
}

/** All versions of a turn: what stands below the same parent, oldest first. */
export function versions(conversation, turn) {
  return Object.values(conversation.turns).filter((other) => other.parent === turn.parent);
}

/** The turns that are shown, from the first. */
export function path(conversation) {
  const turns = [];
  for (let id = conversation.chosen[""]; id; id = conversation.chosen[id]) turns.push(conversation.turns[id]);
  return turns;
}

/** The turns above `turn`, from the first, and itself. */
function lineage(conversation, turn) {
  const turns = [];
  for (let at = turn; at; at = conversation.turns[at.parent]) turns.unshift(at);
  return turns;
}

/** Whether an answer holds something that the model should be shown again. */
export const isEmpty = (turn) => turn.role === "assistant" && !turn.content && !turn.calls.length;

/** The messages of a request whose answer will stand below `turn`, in OpenAI's form. */
export function messages(conversation, turn) {
  const system = conversation.settings.system.trim();
  const list = system ? [{ role: "system", content: system }] : [];
  for (const { role, ...turnFields } of lineage(conversation, turn).filter((one) => !isEmpty(one))) {
    if (role === "user") list.push({ role, content: turnFields.content });
    else if (role === "tool")
      list.push(...turnFields.results.map(({ id, content }) => ({ role, tool_call_id: id, content })));
    else list.push(assistantMessage(turnFields));
  }
  return list;
}

function assistantMessage({ content, reasoning, calls }) {
  const message = { role: "assistant", content };
  if (reasoning) message.reasoning_content = reasoning;
  if (calls.length) {
    message.tool_calls = calls.map(({ id, name, arguments: text }) => ({
      id,
      type: "function",
      function: { name, arguments: text },
    }));
  }
  return message;
}

/** Adds a chunk of a streamed chat completion to an answer. */
export function addChunk(turn, chunk) {
  if (chunk.usage) {
    const { prompt_tokens, completion_tokens, prompt_tokens_details, completion_tokens_details } = chunk.usage;
    turn.usage = {
      prompt: prompt_tokens,
      completion: completion_tokens,
      cached: prompt_tokens_details?.cached_tokens ?? 0,
      reasoning: completion_tokens_details?.reasoning_tokens ?? 0,
    };
  }
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { delta = {} } = choice;
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  const now = Date.now();
  if (reasoning || delta.content || delta.tool_calls) turn.times.first ||= now;
  if (turn.reasoning && !turn.times.thought && (delta.content || delta.tool_calls)) turn.times.thought = now;
  turn.reasoning += reasoning;
  turn.content += delta.content ?? "";
  for (const { index, id, function: piece } of delta.tool_calls ?? []) {
    const call = (turn.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name ||= piece?.name ?? "";
    call.arguments += piece?.arguments ?? "";
  }
  turn.finish = choice.finish_reason ?? turn.finish;
}

/** What is left of an answer whose page was closed while it came. */
export function closeInterrupted(conversation) {
  for (const turn of Object.values(conversation.turns)) {
    if (turn.role !== "assistant" || turn.times.end) continue;
    turn.times.end = turn.times.first || turn.times.start;
    turn.error ??= { code: "interrupted", message: "", status: 0 };
  }
  return conversation;
}
