/** The list of conversations, newest first: choosing one, deleting one; on a narrow screen a drawer. */

import { h, iconButton } from "./dom.js";
import { t } from "./i18n.js";

const NARROW = matchMedia("(max-width: 52rem)");

export class Sidebar {
  #list = document.getElementById("conversations");
  #bar = document.getElementById("sidebar");
  #backdrop = document.getElementById("backdrop");
  #opener = document.getElementById("open-sidebar");
  #open = !NARROW.matches;

  constructor(actions) {
    this.actions = actions;
    this.#opener.addEventListener("click", () => this.toggle(!this.#open));
    this.#backdrop.addEventListener("click", () => this.toggle(false));
    document.getElementById("close-sidebar").addEventListener("click", () => this.toggle(false));
    this.#bar.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !NARROW.matches) return;
      event.stopPropagation();
      this.toggle(false);
    });
    NARROW.addEventListener("change", () => this.toggle(!NARROW.matches));
    this.toggle(this.#open);
  }

  toggle(open) {
    const drawer = NARROW.matches;
    const focusBack = drawer && this.#open && !open && this.#bar.contains(document.activeElement);
    this.#open = open;
    this.#bar.classList.toggle("open", open);
    this.#bar.inert = !open;
    this.#backdrop.hidden = !(open && drawer);
    this.#opener.setAttribute("aria-expanded", open);
    if (focusBack) this.#opener.focus();
  }

  /** After a choice the drawer has done its work. */
  leave() {
    if (NARROW.matches) this.toggle(false);
  }

  draw(conversations, current) {
    const items = conversations.map((conversation) => {
      const title = conversation.title || t("untitled");
      const here = conversation === current;
      return h(
        "li",
        { class: here ? "here" : "" },
        h(
          "button",
          {
            type: "button",
            class: "conversation",
            "aria-current": here ? "page" : null,
            onclick: () => this.actions.open(conversation),
          },
          title,
        ),
        iconButton("trash", t("deleteOne", title), () => this.actions.remove(conversation)),
      );
    });
    this.#list.replaceChildren(...items);
  }
}
