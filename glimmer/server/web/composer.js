/**
 * The box below, where a message is written: its buttons, the examples of an empty conversation, how much of the context is
 * used. Knows the conversation only while it draws it; what the user wants goes to `actions`.
 */

import { path } from "./conversation.js";
import { grow, h } from "./dom.js";
import { n, t } from "./i18n.js";
import { SettingError, readFormat, readTools } from "./request.js";

const EXAMPLE_TOOL = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather of a city",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const $ = (id) => document.getElementById(id);

/** A button that opens a setting; on a phone it shows its icon alone. */
function drawChip(chip, label, on) {
  chip.lastElementChild.textContent = label;
  chip.setAttribute("aria-label", label);
  chip.classList.toggle("on", on);
}

/** A number, or "!" if the setting cannot be read. */
function count(read) {
  try {
    return read();
  } catch (error) {
    if (error instanceof SettingError) return "!";
    throw error;
  }
}

export class Composer {
  #area = $("question");

  /** actions: send(text) -> whether it was sent, stop(), editLast(), openSetting(name), toggleThinking(), giveTool(text). */
  constructor(actions) {
    this.actions = actions;
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    $("stop").addEventListener("click", actions.stop);
    $("thinking").addEventListener("click", actions.toggleThinking);
    $("tools-chip").addEventListener("click", () => actions.openSetting("tools"));
    $("format-chip").addEventListener("click", () => actions.openSetting("format"));
    this.#area.addEventListener("input", () => this.#changed());
    this.#area.addEventListener("keydown", (event) => this.#key(event));
  }

  focus() {
    this.#area.focus();
  }

  #write(text) {
    this.#area.value = text;
    this.#changed();
  }

  #changed() {
    grow(this.#area);
    $("send").disabled = !this.#area.value.trim();
  }

  #send() {
    const text = this.#area.value.trim();
    if (text && this.actions.send(text)) this.#write("");
  }

  #key(event) {
    if (event.isComposing) return; // Enter chooses a character of an input method
    const send = event.key === "Enter" && !event.shiftKey;
    const edit = event.key === "ArrowUp" && !this.#area.value;
    if (!send && !edit) return;
    event.preventDefault();
    if (send) this.#send();
    else this.actions.editLast();
  }

  draw(conversation, running, model) {
    const { settings } = conversation;
    $("send").hidden = running;
    $("stop").hidden = !running;
    $("thinking").setAttribute("aria-pressed", settings.thinking);
    const tools = count(() => readTools(settings.tools).length);
    drawChip($("tools-chip"), tools ? t("toolsChip", tools) : t("toolsChipNone"), tools !== 0);
    drawChip($("format-chip"), t("formatChip"), count(() => readFormat(settings.format)) !== null);
    $("hint").textContent = t("hint");
    this.#changed();
    this.drawContext(conversation, model);
    this.#drawStarters(settings);
  }

  /** What the last answer used of the context. */
  drawContext(conversation, { max_model_len: limit }) {
    const usage = path(conversation).findLast((turn) => turn.usage)?.usage;
    $("context").hidden = !usage;
    if (!usage) return;
    const used = usage.prompt + usage.completion;
    $("context-used").textContent = n(used);
    $("context-limit").textContent = limit ? ` / ${n(limit)}` : "";
    $("context").title = limit ? t("contextUsed", n(used), n(limit)) : t("contextUsedAlone", n(used));
    const meter = $("context-meter");
    meter.hidden = !limit;
    meter.setAttribute("aria-label", $("context").title);
    if (limit) Object.assign(meter, { max: limit, high: 0.85 * limit, value: used });
  }

  #drawStarters(settings) {
    const starter = (text, note = null, tool = null) => {
      const begin = () => {
        if (tool && !settings.tools.trim()) this.actions.giveTool(JSON.stringify([tool], null, 2));
        this.#write(text);
        this.focus();
      };
      return h("button", { type: "button", class: "starter", onclick: begin }, text, note && h("small", {}, note));
    };
    $("starters").replaceChildren(
      starter(t("starterMath")),
      starter(t("starterCode")),
      starter(t("starterTool"), t("starterToolNote"), EXAMPLE_TOOL),
    );
  }
}
