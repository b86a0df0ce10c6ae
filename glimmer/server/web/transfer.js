/**
 * Conversations as a JSON file: written, and read again. What is read comes from anywhere, so every field is built anew
 * with its type checked; text stays text and is shown as a model's answer is. No view, no storage.
 */

import { SETTINGS } from "./conversation.js";

const FORMAT = "glimmer-conversations";

/** The text of a file with these conversations. */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of a file's text. Throws an Error that names what is wrong. */
export function imported(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT || file.version !== 1) throw new Error(`"format" is not "${FORMAT}", version 1`);
  return list(file.conversations, "conversations").map(conversation);
}

function fail(name, wanted) {
  throw new Error(`"${name}" is not ${wanted}`);
}

const string = (value, name) => (typeof value === "string" ? value : fail(name, "a text"));
const number = (value, name) => (Number.isFinite(value) ? value : fail(name, "a number"));
const list = (value, name) => (Array.isArray(value) ? value : fail(name, "a list"));
const object = (value, name) =>
  value && typeof value === "object" && !Array.isArray(value) ? value : fail(name, "an object");

function identifier(value, name) {
  return /^[ct][0-9a-f]{1,64}$/.test(string(value, name)) ? value : fail(name, "an identifier of this page");
}

function conversation(value) {
  const { id, title, created, updated, settings, turns, chosen } = object(value, "conversation");
  const read = {
    id: identifier(id, "id"),
    title: string(title, "title"),
    created: number(created, "created"),
    updated: number(updated, "updated"),
    settings: {},
    turns: {},
    chosen: {},
  };
  object(settings, "settings");
  for (const [name, standard] of Object.entries(SETTINGS)) {
    const given = settings[name] ?? standard;
    read.settings[name] = typeof given === typeof standard ? given : fail(`settings.${name}`, `a ${typeof standard}`);
  }
  // A turn stands after its parent, so no turn can be above itself.
  for (const one of Object.values(object(turns, "turns"))) {
    const added = turn(one);
    if (added.parent !== null && !Object.hasOwn(read.turns, added.parent)) fail("parent", "a turn that stands before");
    read.turns[added.id] = added;
  }
  for (const [parent, child] of Object.entries(object(chosen, "chosen"))) {
    if (!Object.hasOwn(read.turns, child) || (read.turns[child].parent ?? "") !== parent)
      fail("chosen", "a child of its turn");
    read.chosen[parent] = child;
  }
  return read;
}

function turn(value) {
  const { id, parent, role, created, ...rest } = object(value, "turn");
  const read = {
    id: identifier(id, "id"),
    parent: parent === null ? null : identifier(parent, "parent"),
    role,
    created: number(created, "created"),
  };
  if (role === "user") return { ...read, content: string(rest.content, "content") };
  if (role === "tool") {
    return {
      ...read,
      results: list(rest.results, "results").map((one) => ({
        id: string(one?.id, "results.id"),
        content: string(one?.content, "results.content"),
      })),
    };
  }
  if (role !== "assistant") fail("role", 'one of "user", "assistant" and "tool"');
  return {
    ...read,
    reasoning: string(rest.reasoning, "reasoning"),
    content: string(rest.content, "content"),
    calls: list(rest.calls, "calls").map((one) => ({
      id: string(one?.id, "calls.id"),
      name: string(one?.name, "calls.name"),
      arguments: string(one?.arguments, "calls.arguments"),
    })),
    finish: rest.finish === null ? null : string(rest.finish, "finish"),
    usage: rest.usage === null ? null : numbers(rest.usage, "usage", ["prompt", "completion", "cached", "reasoning"]),
    times: numbers(rest.times, "times", ["start", "first", "thought", "end"]),
    error:
      rest.error === null
        ? null
        : {
            code: rest.error?.code == null ? null : String(rest.error.code),
            message: string(rest.error?.message, "error.message"),
            status: number(rest.error?.status, "error.status"),
          },
  };
}

const numbers = (value, name, keys) =>
  Object.fromEntries(keys.map((key) => [key, number(object(value, name)[key], `${name}.${key}`)]));
