/**
 * Cards for the tools that an answer calls: name, arguments, and a box for the result, which the user gives.
 * The page runs no tool itself.
 */

import { grow, h, icon } from "./dom.js";
import { t } from "./i18n.js";
import { highlighted } from "./markdown.js";

const ONE_LINE = 60; // characters of arguments that stay on one line

/** JSON, on several lines if it is long; text that is not JSON (an unfinished call) as it is. */
function pretty(text) {
  try {
    const value = JSON.parse(text);
    return text.length <= ONE_LINE ? text.trim() : JSON.stringify(value, null, 2);
  } catch {
    return text;
  }
}

function card(call, body, state) {
  return h(
    "div",
    { class: "call", role: "group", "aria-label": `${t("calls")}: ${call.name}` },
    h(
      "div",
      { class: "call-head" },
      icon("tool"),
      h("span", { class: "call-name" }, call.name),
      h("span", { class: "call-state" }, state),
    ),
    h(
      "pre",
      { class: "call-arguments", tabIndex: 0, "aria-label": t("arguments") },
      highlighted(pretty(call.arguments), "json"),
    ),
    body,
  );
}

/** Cards of calls whose results are known. */
function answered(calls, results, onedit) {
  const cards = calls.map((call, index) =>
    card(
      call,
      h(
        "pre",
        { class: "call-result", tabIndex: 0, "aria-label": t("resultFor", call.name) },
        results[index]?.content ?? "",
      ),
      t("wasAnswered"),
    ),
  );
  return [
    ...cards,
    h(
      "div",
      { class: "call-actions" },
      h("button", { type: "button", class: "quiet", onclick: onedit }, t("editResults")),
    ),
  ];
}

/** Cards with a box each; all results are sent together. */
function asking(calls, results, onsend) {
  const boxes = calls.map((call, index) =>
    h("textarea", {
      rows: "2",
      "aria-label": t("resultFor", call.name),
      placeholder: t("result"),
      value: results?.[index]?.content ?? "",
      oninput: (event) => grow(event.target),
    }),
  );
  const send = (event) => {
    event.preventDefault();
    onsend(calls.map((call, index) => ({ id: call.id, content: boxes[index].value })));
  };
  const form = h(
    "form",
    { onsubmit: send },
    ...calls.map((call, index) => card(call, boxes[index], t("waitsForResult"))),
  );
  form.append(h("div", { class: "call-actions" }, h("button", { type: "submit", class: "primary" }, t("sendResults"))));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  return [form];
}

export class CallsView {
  #shown = "";
  element = h("div", { class: "calls" });

  /** `results`: those of the turn below, or null. `onsend` takes new ones. While the answer comes there is no box. */
  update(calls, results, running, onsend) {
    const shown = JSON.stringify([calls, results, running, t("result")]);
    if (shown === this.#shown) return; // a box keeps what was typed
    this.#shown = shown;
    this.element.hidden = calls.length === 0;
    if (running) this.element.replaceChildren(...calls.map((call) => card(call, null, "")));
    else if (!results) this.element.replaceChildren(...asking(calls, null, onsend));
    else
      this.element.replaceChildren(
        ...answered(calls, results, () => this.element.replaceChildren(...asking(calls, results, onsend))),
      );
  }
}
