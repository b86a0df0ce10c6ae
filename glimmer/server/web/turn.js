/**
 * One turn on the screen: a question, or an answer with its thinking, calls, error, figures and buttons. It shows what it
 * is given and calls `actions` for what the user wants; it changes no conversation.
 */

import { CallsView } from "./calls.js";
import { copyButton, grow, h, icon, iconButton } from "./dom.js";
import { n, t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";

/** "2 / 3" with buttons to the versions beside; nothing if there is one. */
function versionButtons(turn, versions, actions) {
  if (versions.length < 2) return [];
  const at = versions.indexOf(turn);
  const go = (to) => () => actions.choose(versions[to]);
  return [
    iconButton("left", t("previousVersion"), go(at - 1), { disabled: at === 0 }),
    h("span", { class: "version" }, t("versionOf", at + 1, versions.length)),
    iconButton("right", t("nextVersion"), go(at + 1), { disabled: at === versions.length - 1 }),
  ];
}

/** Tokens a second: from the first token on, or, where all came at once, from the question on. */
function tokenRate({ completion }, { start, first, end }) {
  const until = end || Date.now();
  const coming = until - first;
  return coming > 50 ? (1000 * (completion - 1)) / coming : (1000 * completion) / Math.max(1, until - start);
}

/** The figures below an answer: tokens, tokens/s, time to the first, what came from the cache. */
function figures({ usage, times }) {
  if (!usage) return [];
  const shown = [t("tokens", n(usage.completion))];
  if (times.first) {
    shown.push(t("tokenRate", n(tokenRate(usage, times), 1)));
    shown.push(t("firstToken", n((times.first - times.start) / 1000, 2)));
  }
  if (usage.cached) shown.push(t("cached", n(usage.cached), n(usage.prompt)));
  return shown;
}

class UserTurn {
  #bubble = h("div", { class: "bubble", dir: "auto" });
  #foot = h("div", { class: "turn-foot" });

  constructor(actions) {
    this.actions = actions;
    this.element = h("article", { class: "turn user", "aria-label": t("you") }, this.#bubble, this.#foot);
  }

  update({ turn, versions }) {
    this.turn = turn;
    this.#bubble.textContent = turn.content;
    this.#foot.replaceChildren(
      ...versionButtons(turn, versions, this.actions),
      iconButton("edit", t("edit"), () => this.edit(), { class: "icon-button edit-turn" }),
      copyButton(t("copy"), () => turn.content),
    );
  }

  edit() {
    const area = h("textarea", {
      rows: "1",
      class: "edit-area",
      "aria-label": t("edit"),
      value: this.turn.content,
      oninput: () => grow(area),
    });
    const end = () => form.replaceWith(this.#bubble);
    const save = (event) => {
      event.preventDefault();
      if (area.value.trim() && this.actions.edit(this.turn, area.value)) end();
    };
    const form = h(
      "form",
      { class: "edit", onsubmit: save },
      area,
      h(
        "div",
        { class: "edit-actions" },
        h("button", { type: "button", class: "quiet", onclick: end }, t("cancel")),
        h("button", { type: "submit", class: "primary" }, t("saveAndAsk")),
      ),
    );
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") (event.stopPropagation(), end());
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing)
        (event.preventDefault(), form.requestSubmit());
    });
    this.#bubble.replaceWith(form);
    grow(area);
    area.focus();
  }
}

class AnswerTurn {
  #summary = h("summary");
  #thoughts = h("div", { class: "thoughts markdown" });
  #thinking = h("details", { class: "thinking", hidden: true }, this.#summary, this.#thoughts);
  #content = h("div", { class: "markdown", dir: "auto" });
  #calls = new CallsView();
  #note = h("div", { class: "note" });
  #foot = h("div", { class: "turn-foot" });
  #thoughtsView = new MarkdownView(this.#thoughts);
  #contentView = new MarkdownView(this.#content);
  #noteShown = "";

  constructor(actions) {
    this.actions = actions;
    this.element = h(
      "article",
      { class: "turn assistant", "aria-label": t("answer") },
      this.#thinking,
      this.#content,
      this.#calls.element,
      this.#note,
      this.#foot,
    );
    this.#thinking.addEventListener("toggle", () => this.#showThoughts());
  }

  update({ turn, versions, running, answers }) {
    this.turn = turn;
    this.element.setAttribute("aria-busy", running);
    this.element.classList.toggle("running", running);
    this.#showThinking(running);
    this.#contentView.update(turn.content);
    this.#calls.update(turn.calls, answers?.turn.results ?? null, running, (results) =>
      this.actions.answer(turn, results),
    );
    this.#showNote();
    const shown = h("span", { class: "figures" }, ...figures(turn).map((text) => h("span", {}, text)));
    if (running) return this.#foot.replaceChildren(shown);
    this.#foot.replaceChildren(
      ...versionButtons(turn, versions, this.actions),
      ...(answers ? versionButtons(answers.turn, answers.versions, this.actions) : []),
      copyButton(t("copy"), () => turn.content),
      iconButton("again", t("again"), () => this.actions.again(turn), { class: "icon-button again" }),
      shown,
    );
  }

  #showThinking(running) {
    const { reasoning, content, calls, times } = this.turn;
    this.#thinking.hidden = !reasoning;
    if (!reasoning) return;
    const now = running && !content && !calls.length;
    const seconds = times.thought && times.first ? (times.thought - times.first) / 1000 : 0;
    this.#thinking.classList.toggle("now", now);
    this.#summary.replaceChildren(
      icon("right"),
      now ? t("thinkingNow") : seconds >= 0.1 ? t("thoughtFor", n(seconds, 1)) : t("thought"),
    );
    this.#showThoughts();
  }

  #showThoughts() {
    if (this.#thinking.open) this.#thoughtsView.update(this.turn.reasoning);
  }

  /** What a reader must know about the end of the answer: an error with a way on, or why it stopped. */
  #showNote() {
    const { error, finish, content, reasoning } = this.turn;
    const shown = JSON.stringify([error, finish, t("retry")]);
    if (shown === this.#noteShown) return; // an alert is read aloud once
    this.#noteShown = shown;
    this.#note.className = error && error.code !== "stopped" ? "note error" : "note";
    this.#note.removeAttribute("role");
    this.#note.replaceChildren();
    if (!error) return this.#note.append(finish === "length" ? t("cutAtLength") : "");
    if (error.code === "stopped") return this.#note.append(t("stopped"));
    this.#note.setAttribute("role", "alert");
    const known = { unreachable: t("errorUnreachable"), interrupted: t("errorInterrupted") }[error.code];
    const title = content || reasoning ? t("errorIncomplete") : t("errorTitle");
    const status = error.status >= 400 ? ` (${error.status})` : "";
    this.#note.append(
      icon("warning"),
      h("div", { class: "note-text" }, h("strong", {}, title, status), h("p", {}, known ?? error.message)),
    );
    if (error.status === 401)
      this.#note.append(
        h("button", { type: "button", class: "quiet", onclick: () => this.actions.askKey(this.turn) }, t("addKey")),
      );
    this.#note.append(
      h("button", { type: "button", class: "primary", onclick: () => this.actions.again(this.turn) }, t("retry")),
    );
  }
}

/** The view of a turn: `element`, and `update({turn, versions, running, answers})`; answers is the results' turn below. */
export const turnView = (turn, actions) => new (turn.role === "user" ? UserTurn : AnswerTurn)(actions);
