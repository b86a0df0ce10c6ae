/** The page: holds the conversations, and binds what is on the screen to what the user may do. */

import { models, setApiKey } from "./api.js";
import { SETTINGS, addTurn, choose, closeInterrupted, newConversation, path, removeTurn } from "./conversation.js";
import { grow, h, icon, toast } from "./dom.js";
import { n, setLanguage, t, translate } from "./i18n.js";
import { SettingError, readFormat, readTools, requestBody } from "./request.js";
import { Runs } from "./runs.js";
import { openKey, openSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { exported, imported } from "./transfer.js";

const LAST_SETTINGS = "glimmer.settings"; // those with which the next conversation begins
const LONGEST_TITLE = 60;
const EXAMPLE_TOOL = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather of a city",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const $ = (id) => document.getElementById(id);
const question = $("question");

let conversations = []; // newest first; one that holds no turn yet is not among them
let current = null;
let model = { id: "", max_model_len: null };

const runs = new Runs({ onGrow, onEnd, save });
const sidebar = new Sidebar({ open, remove });
const thread = new Thread({
  element: $("thread"),
  scroller: $("scroller"),
  toEnd: $("to-end"),
  actions: {
    choose(turn) {
      choose(current, turn);
      save(current);
      draw();
    },
    edit(turn, content) {
      if (!ready()) return false;
      ask(current, addTurn(current, turn.parent, { role: "user", content }));
      return true;
    },
    again(turn) {
      if (!ready()) return;
      if (turn.error && !turn.content && !turn.reasoning) removeTurn(current, turn); // there is nothing to go back to
      ask(current, current.turns[turn.parent]);
    },
    answer(turn, results) {
      if (ready()) ask(current, addTurn(current, turn.id, { role: "tool", results }));
    },
    askKey(turn) {
      openKey((key, remember) => {
        setApiKey(key, remember);
        loadModels();
        this.again(turn);
      });
    },
  },
});

/* ---- what the user does ---- */

function send() {
  const text = question.value.trim();
  if (!text || !ready()) return;
  const last = path(current).at(-1);
  const turn = addTurn(current, last?.id ?? null, { role: "user", content: text });
  current.title ||= text.split("\n")[0].slice(0, LONGEST_TITLE);
  question.value = "";
  grow(question);
  ask(current, turn);
}

/** Whether another answer may be asked for now. Settings that cannot be sent are opened where the fault is. */
function ready() {
  if (runs.of(current)) return false;
  try {
    requestBody(current, null, model.id);
    return true;
  } catch (error) {
    if (!(error instanceof SettingError)) throw error;
    settings(error.setting);
    return false;
  }
}

/** Asks for an answer below `turn`. */
function ask(conversation, turn) {
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  conversations.sort((one, other) => other.updated - one.updated);
  history.replaceState(null, "", `#${conversation.id}`);
  runs.start(conversation, turn, requestBody(conversation, turn, model.id));
  save(conversation);
  say(t("answerBegins"));
  draw();
  thread.scrollToEnd();
}

function begin() {
  const last = JSON.parse(localStorage.getItem(LAST_SETTINGS) ?? "{}");
  const known = Object.entries(SETTINGS).filter(([name, standard]) => typeof last[name] === typeof standard);
  open(newConversation(Object.fromEntries(known.map(([name]) => [name, last[name]]))));
}

function open(conversation) {
  current = conversation;
  history.replaceState(null, "", conversations.includes(conversation) ? `#${conversation.id}` : location.pathname);
  thread.clear();
  sidebar.leave();
  draw();
  thread.scrollToEnd();
  if (matchMedia("(hover: hover)").matches) question.focus(); // a keyboard on the screen would hide the conversation
}

function remove(conversation) {
  runs.stop(conversation);
  conversations = conversations.filter((other) => other !== conversation);
  kept(store.remove(conversation.id));
  if (conversation === current) begin();
  draw();
  const undo = () => {
    conversations = [conversation, ...conversations].sort((one, other) => other.updated - one.updated);
    save(conversation);
    open(conversation);
  };
  toast(t("deleted"), { label: t("undo"), run: undo });
}

function rename() {
  const conversation = current;
  const button = $("title");
  const input = h("input", {
    class: "title-input",
    "aria-label": t("rename"),
    value: conversation.title,
    maxLength: 200,
  });
  let title = conversation.title;
  input.addEventListener("input", () => (title = input.value.trim()));
  input.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") (event.stopPropagation(), (title = conversation.title));
    if (["Enter", "Escape"].includes(event.key)) input.blur();
  });
  input.addEventListener("blur", () => {
    input.replaceWith(button);
    conversation.title = title;
    if (conversations.includes(conversation)) save(conversation);
    draw();
  });
  button.replaceWith(input);
  input.select();
}

function settings(focus = null) {
  openSettings(current, { changed, language, exportOne, exportAll, importFile }, focus);
}

function changed() {
  localStorage.setItem(LAST_SETTINGS, JSON.stringify(current.settings));
  if (conversations.includes(current)) save(current);
  drawComposer();
}

function language(name) {
  setLanguage(name);
  thread.clear();
  draw();
}

function exportOne() {
  download([current], current.title || "conversation");
}

function exportAll() {
  download(conversations, "conversations");
}

function download(list, name) {
  const url = URL.createObjectURL(new Blob([exported(list)], { type: "application/json" }));
  h("a", { href: url, download: `${name.replace(/[^\p{L}\p{N}]+/gu, "-")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importFile(file) {
  let read;
  try {
    read = imported(await file.text());
  } catch (error) {
    toast(t("importFailed", error.message));
    return;
  }
  const replaced = new Set(read.map(({ id }) => id));
  conversations = [...read.map(closeInterrupted), ...conversations.filter(({ id }) => !replaced.has(id))];
  conversations.sort((one, other) => other.updated - one.updated);
  read.forEach(save);
  toast(t("imported", read.length));
  if (read.length) open(read[0]);
}

/* ---- what is kept ---- */

function save(conversation) {
  kept(store.put(structuredClone(conversation)));
}

/** Waits for the browser's storage; what fails is said, once a page. */
let complained = false;
async function kept(work) {
  try {
    await work;
  } catch (error) {
    if (!complained) toast(t("noStorage", error.message));
    complained = true;
  }
}

function otherTab(id, conversation) {
  const here = conversations.find((other) => other.id === id);
  if (here && runs.of(here)) return;
  conversations = conversations.filter((other) => other !== here);
  if (conversation) conversations.push(conversation);
  conversations.sort((one, other) => other.updated - one.updated);
  if (here && here === current) {
    if (conversation) current = conversation;
    else begin();
  }
  draw();
}

/* ---- what is on the screen ---- */

let drawing = 0;
let lastCost = 0;

/** An answer that grows is drawn at most once a frame, and takes at most a fifth of the time. */
function onGrow(conversation, turn) {
  if (conversation !== current || drawing) return;
  drawing = setTimeout(() => {
    requestAnimationFrame(() => {
      drawing = 0;
      if (conversation !== current || runs.of(current)?.turn !== turn) return;
      const begun = performance.now();
      thread.grow(conversation, turn);
      drawContext();
      lastCost = performance.now() - begun;
    });
  }, 4 * lastCost);
}

function onEnd(conversation, turn) {
  if (conversations.includes(conversation)) save(conversation);
  if (conversation !== current) return;
  draw();
  say(turn.error ? t("stopped") : t("answerEnds"));
  if (turn.error?.status === 401) thread.actions.askKey(turn);
}

function say(text) {
  $("status").textContent = text;
}

function draw() {
  translate(document);
  sidebar.draw(conversations, current);
  $("title").textContent = current.title || t("untitled");
  document.title = current.title ? `${current.title} · glimmer` : "glimmer";
  $("welcome").hidden = path(current).length > 0;
  thread.draw(current, runs.of(current)?.turn ?? null);
  drawComposer();
}

function drawComposer() {
  const running = runs.of(current) !== null;
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("send").disabled = !question.value.trim();
  $("thinking").setAttribute("aria-pressed", current.settings.thinking);
  const tools = count(() => readTools(current.settings.tools).length);
  drawChip($("tools-chip"), tools ? t("toolsChip", tools) : t("toolsChipNone"), tools !== 0);
  drawChip($("format-chip"), t("formatChip"), count(() => (readFormat(current.settings.format) ? 1 : 0)) !== 0);
  $("model").textContent = model.id.split("/").at(-1); // the id may be the path of a directory
  $("model").title = model.id;
  $("hint").textContent = t("hint");
  drawContext();
  drawStarters();
}

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

function drawContext() {
  const usage = path(current).findLast((turn) => turn.usage)?.usage;
  $("context").hidden = !usage;
  if (!usage) return;
  const used = usage.prompt + usage.completion;
  const limit = model.max_model_len;
  $("context-used").textContent = n(used);
  $("context-limit").textContent = limit ? ` / ${n(limit)}` : "";
  $("context").title = limit ? t("contextUsed", n(used), n(limit)) : t("contextUsedAlone", n(used));
  const meter = $("context-meter");
  meter.hidden = !limit;
  meter.setAttribute("aria-label", $("context").title);
  if (limit) Object.assign(meter, { max: limit, high: 0.85 * limit, value: used });
}

function drawStarters() {
  const starter = (text, note, prepare) =>
    h(
      "button",
      {
        type: "button",
        class: "starter",
        onclick: () => (prepare?.(), (question.value = text), grow(question), drawComposer(), question.focus()),
      },
      text,
      note && h("small", {}, note),
    );
  const withTool = () => {
    if (current.settings.tools.trim()) return;
    current.settings.tools = JSON.stringify([EXAMPLE_TOOL], null, 2); // for this conversation alone
  };
  $("starters").replaceChildren(
    starter(t("starterMath")),
    starter(t("starterCode")),
    starter(t("starterTool"), t("starterToolNote"), withTool),
  );
}

/* ---- beginning ---- */

async function loadModels() {
  try {
    [model = model] = await models();
    drawComposer();
  } catch (error) {
    if (error.status === 401) openKey((key, remember) => (setApiKey(key, remember), loadModels()));
    else toast(error.message || t("errorUnreachable"), { label: t("retry"), run: loadModels });
  }
}

function bind() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
  $("stop").addEventListener("click", () => runs.stop(current));
  $("new-conversation").addEventListener("click", begin);
  $("title").addEventListener("click", rename);
  $("open-settings").addEventListener("click", () => settings());
  $("tools-chip").addEventListener("click", () => settings("tools"));
  $("format-chip").addEventListener("click", () => settings("format"));
  $("thinking").addEventListener("click", () => {
    current.settings.thinking = !current.settings.thinking;
    changed();
  });
  question.addEventListener("input", () => (grow(question), drawComposer()));
  question.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // Enter chooses a character of an input method
    if (event.key === "Enter" && !event.shiftKey) (event.preventDefault(), send());
    if (event.key === "ArrowUp" && !question.value) editLast(event);
  });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") runs.stop(current);
    if (event.key === "/" && !event.target.closest("input, textarea, select"))
      (event.preventDefault(), question.focus());
    if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey))
      (event.preventDefault(), begin());
  });
  addEventListener("pagehide", () => runs.of(current) && save(current));
}

function editLast(event) {
  const buttons = document.querySelectorAll(".edit-turn");
  if (!buttons.length) return;
  event.preventDefault();
  [...buttons].at(-1).click();
}

async function start() {
  const asked = location.hash.slice(1);
  bind();
  begin();
  try {
    conversations = (await store.all()).map(closeInterrupted).sort((one, other) => other.updated - one.updated);
    store.onOtherTab(otherTab);
  } catch (error) {
    toast(t("noStorage", error.message));
  }
  const wanted = conversations.find(({ id }) => id === asked);
  if (wanted) open(wanted);
  else draw();
  await loadModels();
}

start();
