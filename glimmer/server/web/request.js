/**
 * What a request says, made from a conversation's settings: sampling, tools, the form of the answer. What cannot be read is
 * a `SettingError` that names the setting. No view, no network.
 */

import { messages } from "./conversation.js";

/** A setting that cannot be sent; `setting` is its name, `key` the word of i18n.js that says why. */
export class SettingError extends Error {
  constructor(setting, key, detail = "") {
    super(detail);
    this.setting = setting;
    this.key = key;
  }
}

export const NUMBERS = {
  temperature: { min: 0, max: 2, step: 0.05 },
  top_p: { min: 0, max: 1, step: 0.05 },
  top_k: { min: -1, step: 1 },
  min_p: { min: 0, max: 1, step: 0.01 },
  max_tokens: { min: 1, step: 1 },
  min_tokens: { min: 0, step: 1 },
  seed: { step: 1 },
  presence_penalty: { min: -2, max: 2, step: 0.1 },
  frequency_penalty: { min: -2, max: 2, step: 0.1 },
  repetition_penalty: { min: 0, step: 0.05 },
};

function parse(setting, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SettingError(setting, "notJson", error.message);
  }
}

/** The tools of a text: a list of them, or one; a function alone is taken as the tool that it is. */
export function readTools(text) {
  if (!text.trim()) return [];
  const value = parse("tools", text);
  return (Array.isArray(value) ? value : [value]).map((tool) => {
    const wrapped = tool?.function ? tool : { type: "function", function: tool };
    if (typeof wrapped.function?.name !== "string") throw new SettingError("tools", "toolWithoutName");
    return wrapped;
  });
}

/** `response_format` of a text: a JSON schema, or the whole object as OpenAI's API has it; null if there is none. */
export function readFormat(text) {
  if (!text.trim()) return null;
  const value = parse("format", text);
  if (value === null || typeof value !== "object" || Array.isArray(value))
    throw new SettingError("format", "notSchema");
  if (["json_schema", "json_object", "text"].includes(value.type)) return value;
  return { type: "json_schema", json_schema: { name: "answer", schema: value, strict: true } };
}

/** The body of a request whose answer will stand below `turn`. Throws SettingError. */
export function requestBody(conversation, turn, model) {
  const { settings } = conversation;
  const body = {
    model,
    messages: messages(conversation, turn),
    chat_template_kwargs: { enable_thinking: settings.thinking },
    special_tokens_in_content: "text", // a pasted result that writes <|user|> begins no turn
  };
  for (const name of Object.keys(NUMBERS)) {
    if (settings[name].trim()) body[name] = readNumber(name, settings[name]);
  }
  const stop = settings.stop.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  const tools = readTools(settings.tools);
  if (tools.length) Object.assign(body, { tools, tool_choice: settings.tool_choice });
  const format = readFormat(settings.format);
  if (format) body.response_format = format;
  return body;
}

export function readNumber(name, text) {
  const value = Number(text);
  const { min = -Infinity, max = Infinity, step } = NUMBERS[name];
  if (!Number.isFinite(value) || (step === 1 && !Number.isSafeInteger(value)))
    throw new SettingError(name, "notNumber");
  if (value < min || value > max) throw new SettingError(name, "outOfRange", `${min}…${max}`);
  return value;
}
