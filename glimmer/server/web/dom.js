/**
 * Making elements: `h` builds them from values (never from HTML text), `icon` draws the page's few icons, `copy` fills the
 * clipboard. Knows nothing of conversations.
 */

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h10",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5v5M8 13.5v5",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  down: "M12 5v14M6 13l6 6 6-6",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  copy: "M9 9h10v11H9zM6 15H5V4h10v2",
  done: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  thought: "M9 18h6M10 21h4M12 3a6 6 0 0 0-3.5 10.9c.6.5 1 1.1 1 1.9h5c0-.8.4-1.4 1-1.9A6 6 0 0 0 12 3z",
  tool: "M15.8 4.3a4.6 4.6 0 0 0-5.6 5.9l-5.6 5.6a2.2 2.2 0 0 0 3.1 3.1l5.7-5.6a4.6 4.6 0 0 0 5.9-5.6l-2.8 2.8-2.6-.7-.7-2.6z",
  braces: "M9 4c-3 0-3 1.5-3 4s0 4-2 4c2 0 2 1.5 2 4s0 4 3 4M15 4c3 0 3 1.5 3 4s0 4 2 4c-2 0-2 1.5-2 4s0 4-3 4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  warning: "M12 4L2.5 20h19zM12 10v5M12 17.5v.5",
};

/** An element with attributes (`class`, `onclick` and other listeners, `hidden`...) and children: elements or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || (name in element && typeof value !== "string")) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon alone; `label` is what it says to those who do not see it. */
export function iconButton(name, label, onclick, attributes = {}) {
  const button = h("button", {
    type: "button",
    class: "icon-button",
    title: label,
    "aria-label": label,
    onclick,
    ...attributes,
  });
  button.append(icon(name));
  return button;
}

/** A button that copies `text()` and shows for a moment that it has. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Pages from another machine without TLS have no clipboard object.
  const area = h("textarea", { class: "visually-hidden", value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Makes a text area as tall as its text; page.css limits it. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** Shows a message for a while, with an optional button. */
export function toast(message, action = null) {
  const box = document.getElementById("toast");
  clearTimeout(Number(box.dataset.timer));
  const button =
    action && h("button", { type: "button", onclick: () => ((box.hidden = true), action.run()) }, action.label);
  box.replaceChildren(message, ...(button ? [button] : []));
  box.hidden = false;
  box.dataset.timer = setTimeout(() => (box.hidden = true), 8000);
}
