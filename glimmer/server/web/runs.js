/**
 * Answers that are coming, at most one a conversation; they go on while another conversation is shown. Adds what arrives to
 * the turn and tells `listeners` of it; draws nothing.
 */

import { ServerError, chat } from "./api.js";
import { addChunk, addTurn, newAnswer } from "./conversation.js";

const SAVED_EVERY = 1000; // milliseconds between two savings of an answer that is coming

export class Runs {
  #running = new Map(); // id of a conversation -> {conversation, turn, controller}

  /** onGrow(conversation, turn): more of the answer is there. onEnd(conversation, turn). save(conversation). */
  constructor({ onGrow, onEnd, save }) {
    Object.assign(this, { onGrow, onEnd, save });
  }

  of(conversation) {
    return this.#running.get(conversation.id) ?? null;
  }

  stop(conversation) {
    this.of(conversation)?.controller.abort();
  }

  /** Asks for an answer below `parent`, a turn of the conversation; `body` is the request's. */
  async start(conversation, parent, body) {
    const controller = new AbortController();
    const turn = addTurn(conversation, parent.id, newAnswer());
    this.#running.set(conversation.id, { conversation, turn, controller });
    try {
      await this.#receive(conversation, turn, chat(body, controller.signal));
    } catch (error) {
      turn.error = whatHappened(error, controller.signal);
    }
    turn.times.end = Date.now();
    conversation.updated = Date.now();
    this.#running.delete(conversation.id);
    this.onEnd(conversation, turn);
  }

  async #receive(conversation, turn, chunks) {
    let saved = Date.now();
    for await (const chunk of chunks) {
      addChunk(turn, chunk);
      this.onGrow(conversation, turn);
      if (Date.now() - saved < SAVED_EVERY) continue;
      saved = Date.now();
      this.save(conversation);
    }
  }
}

function whatHappened(error, signal) {
  if (signal.aborted) return { code: "stopped", message: "", status: 0 };
  if (error instanceof ServerError) return { code: error.code, message: error.message, status: error.status };
  return { code: null, message: String(error.message ?? error), status: 0 };
}
