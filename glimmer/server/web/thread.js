/**
 * The conversation on the screen: the turns of its path, kept as elements from one drawing to the next, and the scrolling
 * that follows an answer unless the reader has scrolled away.
 */

import { path, versions } from "./conversation.js";
import { turnView } from "./turn.js";

const NEAR_END = 60; // pixels within which the reader counts as being at the end

export class Thread {
  #views = new Map(); // id of a turn -> its view
  #following = true;
  #top = 0; // where the reader was

  constructor({ element, scroller, toEnd, actions }) {
    Object.assign(this, { element, scroller, toEnd, actions });
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    toEnd.addEventListener("click", () => this.scrollToEnd());
    new ResizeObserver(() => this.#follow()).observe(element);
  }

  /** Forgets all elements: another conversation, or another language. */
  clear() {
    this.#views.clear();
    this.element.replaceChildren();
  }

  /** Shows the conversation's path; `runningTurn` is the answer that is coming, or null. */
  draw(conversation, runningTurn) {
    const turns = path(conversation);
    this.element.classList.toggle("busy", runningTurn !== null);
    const shown = [];
    turns.forEach((turn, index) => {
      if (turn.role === "tool") return; // its results stand in the cards of the answer above
      const below = turns[index + 1];
      const answers = below?.role === "tool" ? { turn: below, versions: versions(conversation, below) } : null;
      if (!this.#views.has(turn.id)) this.#views.set(turn.id, turnView(turn, this.actions));
      const view = this.#views.get(turn.id);
      view.update({ turn, versions: versions(conversation, turn), running: turn === runningTurn, answers });
      shown.push(view.element);
    });
    shown.forEach((element, index) => {
      if (this.element.children[index] !== element)
        this.element.insertBefore(element, this.element.children[index] ?? null);
    });
    while (this.element.children.length > shown.length) this.element.lastElementChild.remove();
  }

  /** Shows more of an answer that is coming. */
  grow(conversation, turn) {
    this.#views.get(turn.id)?.update({ turn, versions: versions(conversation, turn), running: true, answers: null });
  }

  scrollToEnd() {
    this.#following = true;
    this.#follow();
  }

  #follow() {
    if (this.#following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#scrolled();
  }

  /** Only a scroll upwards leaves the end: an answer that grows moves the end away from the reader, too. */
  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    if (scrollHeight - scrollTop - clientHeight < NEAR_END) this.#following = true;
    else if (scrollTop < this.#top) this.#following = false;
    this.#top = scrollTop;
    this.toEnd.hidden = this.#following;
  }
}
