/** The page: holds the conversations, and binds what is on the screen to what the user may do. */

import { models, setApiKey } from "./api.js";
import { Composer } from "./composer.js";
import { SETTINGS, addTurn, choose, closeInterrupted, newConversation, path, removeTurn } from "./conversation.js";
import { h, icon, toast } from "./dom.js";
import { setLanguage, t, translate } from "./i18n.js";
import { SettingError, requestBody } from "./request.js";
import { Runs } from "./runs.js";
import { openKey, openSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { exported, imported } from "./transfer.js";

const LAST_SETTINGS = "glimmer.settings"; // those with which the next conversation begins
const LONGEST_TITLE = 60;

const $ = (id) => document.getElementById(id);

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

const composer = new Composer({
  send,
  stop: () => runs.stop(current),
  editLast: () => [...document.querySelectorAll(".edit-turn")].at(-1)?.click(),
  openSetting: settings,
  toggleThinking() {
    current.settings.thinking = !current.settings.thinking;
    changed();
  },
  giveTool(text) {
    current.settings.tools = text; // for this conversation alone
    drawComposer();
  },
});

/* ---- what the user does ---- */

/** Asks what was written; false if that is not possible now. */
function send(text) {
  if (!ready()) return false;
  const last = path(current).at(-1);
  const turn = addTurn(current, last?.id ?? null, { role: "user", content: text });
  current.title ||= text.split("\n")[0].slice(0, LONGEST_TITLE);
  ask(current, turn);
  return true;
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
  if (matchMedia("(hover: hover)").matches) composer.focus(); // a keyboard on the screen would hide the conversation
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
    save(conversation);
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
  save(current);
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

/** Keeps a conversation, unless it has not begun or was deleted. */
function save(conversation) {
  if (conversations.includes(conversation)) kept(store.put(structuredClone(conversation)));
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
      composer.drawContext(current, model);
      lastCost = performance.now() - begun;
    });
  }, 4 * lastCost);
}

function onEnd(conversation, turn) {
  save(conversation);
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
  $("model").textContent = model.id.split("/").at(-1); // the id may be the path of a directory
  $("model").title = model.id;
  thread.draw(current, runs.of(current)?.turn ?? null);
  drawComposer();
}

function drawComposer() {
  composer.draw(current, runs.of(current) !== null, model);
}

/* ---- beginning ---- */

async function loadModels() {
  try {
    [model = model] = await models();
    draw();
  } catch (error) {
    if (error.status === 401) openKey((key, remember) => (setApiKey(key, remember), loadModels()));
    else toast(error.message || t("errorUnreachable"), { label: t("retry"), run: loadModels });
  }
}

function bind() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
  $("new-conversation").addEventListener("click", begin);
  $("title").addEventListener("click", rename);
  $("open-settings").addEventListener("click", () => settings());
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select");
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") return runs.stop(current);
    if (event.key === "/" && !typing) composer.focus();
    else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) begin();
    else return;
    event.preventDefault();
  });
  addEventListener("pagehide", () => runs.of(current) && save(current));
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
