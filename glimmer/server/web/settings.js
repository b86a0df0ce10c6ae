/**
 * Dialogs: the settings of a conversation and of the page, and the API key. A setting is kept as the text that was typed;
 * request.js reads it, and says here what cannot be read.
 */

import { h, iconButton } from "./dom.js";
import { LANGUAGES, currentLanguage, t } from "./i18n.js";
import { NUMBERS, SettingError, readFormat, readNumber, readTools } from "./request.js";

const THEME = "glimmer.theme";

/** Why a setting cannot be sent, in the user's words; "" if it can. */
function complaint(name, text) {
  try {
    if (name === "tools") readTools(text);
    else if (name === "format") readFormat(text);
    else if (name in NUMBERS && text.trim()) readNumber(name, text);
    return "";
  } catch (error) {
    if (error instanceof SettingError) return t(error.key, error.message);
    throw error;
  }
}

/** A labelled field with its hint and its complaint, which are read out with it. */
function field(label, control, hint = "") {
  const id = `setting-${control.name}`;
  control.id = id;
  const problem = h("p", { class: "problem", id: `${id}-problem` });
  control.setAttribute("aria-describedby", `${id}-problem ${id}-hint`);
  return h(
    "div",
    { class: "field" },
    h("label", { for: id }, label),
    control,
    problem,
    hint && h("p", { class: "field-hint", id: `${id}-hint` }, hint),
  );
}

function showComplaint(control) {
  const problem = complaint(control.name, control.value);
  control.setAttribute("aria-invalid", problem !== "");
  document.getElementById(`${control.id}-problem`).textContent = problem;
}

function select(name, value, options) {
  return h(
    "select",
    { name },
    ...Object.entries(options).map(([key, label]) => h("option", { value: key, selected: key === value }, label)),
  );
}

function section(title, hint, ...fields) {
  return h("fieldset", {}, h("legend", {}, title), hint && h("p", { class: "field-hint" }, hint), ...fields);
}

/** Opens a modal dialog that is removed when it closes. */
function open(className, title, ...content) {
  const dialog = h("dialog", { class: className, "aria-label": title });
  const close = iconButton("close", t("close"), () => dialog.close());
  dialog.append(
    h("div", { class: "dialog-head" }, h("h2", {}, title), close),
    h("div", { class: "dialog-body" }, ...content),
  );
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside the dialog
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

export function applyTheme(theme) {
  if (theme) localStorage.setItem(THEME, theme);
  else localStorage.removeItem(THEME);
  document.documentElement.dataset.theme = theme;
}

/**
 * The settings. `conversation.settings` changes as the user types; `actions`: changed(), language(name), exportOne(),
 * exportAll(), importFile(file). `focus` is the name of the setting to begin with.
 */
export function openSettings(conversation, actions, focus = null) {
  const { settings } = conversation;
  const area = (name, rows) =>
    h("textarea", {
      name,
      rows,
      spellcheck: name === "system" ? null : "false",
      class: name === "system" ? "" : "code",
      value: settings[name],
    });
  const number = (name) =>
    field(
      t(name),
      h("input", { name, inputmode: "decimal", autocomplete: "off", placeholder: "–", value: settings[name] }),
    );
  const form = h(
    "form",
    { class: "settings-form", onsubmit: (event) => event.preventDefault() },
    section(t("instructions"), t("settingsHint"), field(t("system"), area("system", 3))),
    section(
      t("sampling"),
      t("samplingHint"),
      h("div", { class: "grid" }, ...Object.keys(NUMBERS).map(number)),
      field(t("stopStrings"), area("stop", 2)),
    ),
    section(
      t("tools"),
      t("toolsHint"),
      field(t("toolsLabel"), area("tools", 6)),
      field(
        t("tool_choice"),
        select("tool_choice", settings.tool_choice, {
          auto: t("toolChoiceAuto"),
          required: t("toolChoiceRequired"),
          none: t("toolChoiceNone"),
        }),
      ),
    ),
    section(t("answerForm"), t("formatHint"), field(t("formatChip"), area("format", 5))),
  );
  form.addEventListener("input", ({ target }) => {
    settings[target.name] = target.value;
    showComplaint(target);
    actions.changed();
  });
  const theme = select("theme", localStorage.getItem(THEME) ?? "", {
    "": t("systemTheme"),
    light: t("light"),
    dark: t("dark"),
  });
  theme.addEventListener("change", () => applyTheme(theme.value));
  const language = select("language", currentLanguage(), LANGUAGES);
  language.addEventListener("change", () => {
    actions.language(language.value);
    dialog.close();
    openSettings(conversation, actions, "language");
  });
  const file = h("input", {
    type: "file",
    accept: ".json,application/json",
    class: "visually-hidden",
    tabIndex: -1,
    "aria-label": t("import"),
  });
  file.addEventListener("change", () => file.files[0] && actions.importFile(file.files[0]));
  const button = (label, onclick) => h("button", { type: "button", class: "quiet", onclick }, label);
  const page = h(
    "div",
    { class: "settings-form" },
    section(
      t("thisPage"),
      "",
      h("div", { class: "grid" }, field(t("appearance"), theme), field(t("language"), language)),
    ),
    section(
      t("data"),
      t("dataHint"),
      h(
        "div",
        { class: "buttons" },
        button(t("exportOne"), actions.exportOne),
        button(t("exportAll"), actions.exportAll),
        button(t("import"), () => file.click()),
        file,
      ),
    ),
  );
  const dialog = open("sheet", t("settings"), form, page);
  for (const control of form.elements) if (control.name) showComplaint(control);
  (focus && dialog.querySelector(`[name="${focus}"]`))?.focus();
}

/** Asks for the API key; `onkey(key, remember)` takes it. */
export function openKey(onkey) {
  const key = h("input", { type: "password", name: "key", autocomplete: "off", required: true });
  const remember = h("input", { type: "checkbox", name: "remember" });
  const save = (event) => {
    event.preventDefault();
    dialog.close();
    onkey(key.value.trim(), remember.checked);
  };
  const form = h(
    "form",
    { class: "settings-form", onsubmit: save },
    h("p", { class: "field-hint" }, t("keyHint")),
    field(t("keyTitle"), key),
    h("label", { class: "check" }, remember, t("keyRemember")),
    h("div", { class: "edit-actions" }, h("button", { type: "submit", class: "primary" }, t("save"))),
  );
  const dialog = open("small", t("keyTitle"), form);
  key.focus();
}
