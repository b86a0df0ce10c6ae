/**
 * Text of a model as safe elements: Markdown, mathematics and highlighted code.
 *
 * Nothing that a model writes is taken as HTML: tags are shown as they were written. What Markdown makes passes through
 * DOMPurify all the same, with a short list of elements. Links open in a new tab and name http, https or mailto; an image
 * that is not part of the text itself becomes a link, so nothing is fetched. The page's content security policy would stop
 * what got past this.
 */

import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import hljs from "./vendor/highlight/highlight.min.js";
import { Marked } from "./vendor/marked/marked.esm.js";
import "./vendor/katex/katex.min.js"; // defines globalThis.katex

import { copyButton, h } from "./dom.js";
import { t } from "./i18n.js";

const { katex } = globalThis;
const LONGEST_HIGHLIGHTED = 50_000; // characters of a block of code; a longer one is shown plain
const LONGEST_FORMULA = 5_000;
const LONGEST_EMPHASIS = 5_000; // in a longer paragraph, a star is a star: looking for its fellow takes too long

const SANITIZE = {
  ALLOWED_TAGS: [
    ...["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "li", "pre", "code", "span"],
    ...["strong", "em", "del", "a", "img", "table", "thead", "tbody", "tr", "th", "td"],
  ],
  ALLOWED_ATTR: ["href", "src", "alt", "title", "align", "start", "class"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const LINK = /^(https?:|mailto:)/i;
const IMAGE = /^data:image\/(png|jpeg|gif|webp);base64,/i;

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.hasAttribute("href")) {
    const href = element.getAttribute("href");
    if (!LINK.test(href) || !URL.canParse(href)) element.removeAttribute("href");
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
  if (element.localName === "img" && !IMAGE.test(element.getAttribute("src") ?? "")) element.remove();
});

const escaped = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

/** Formulas: $a$, $$a$$, \(a\), \[a\]. A dollar before a space, or after one at the end, is a dollar. */
const DISPLAY = /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])/;
const INLINE = /^(?:\$(?![\s$])((?:\\[\s\S]|[^\\$\n])*?[^\s\\$]|\\[^\s$])\$(?!\d)|\\\(([\s\S]+?)\\\))/;

function formula(display, pattern) {
  return (source) => {
    const match = pattern.exec(source);
    return match ? { type: "formula", raw: match[0], text: match[1] ?? match[2], display } : undefined;
  };
}

const inlineFormula = formula(false, INLINE);
const displayFormula = formula(true, DISPLAY);

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: [
    {
      name: "formula",
      level: "inline",
      start: (source) => source.search(/\$|\\[([]/),
      tokenizer: (source) => displayFormula(source) ?? inlineFormula(source),
      renderer: ({ text, display }) =>
        `<span class="${display ? "formula display" : "formula"}">${escaped(text)}</span>`,
    },
    {
      // A formula of several lines must not be cut into paragraphs.
      name: "formulaBlock",
      level: "block",
      start: (source) => source.search(/\n *(?:\$\$|\\\[)/),
      tokenizer(source) {
        const indent = /^ {0,3}/.exec(source)[0];
        const token = displayFormula(source.slice(indent.length));
        if (!token || !/^[ \t]*(\n|$)/.test(source.slice(indent.length + token.raw.length))) return undefined;
        return { type: "formulaBlock", raw: indent + token.raw, text: token.text };
      },
      renderer: ({ text }) => `<p><span class="formula display">${escaped(text)}</span></p>\n`,
    },
    {
      // CommonMark does not see emphasis that ends in punctuation before a Chinese character: **“强调”**是.
      name: "strongChinese",
      level: "inline",
      start: (source) => source.indexOf("**"),
      tokenizer(source) {
        const match = /^\*\*(?=\S)([^*\n]*[⺀-鿿！-￯“”‘’][^*\n]*)(?<=\S)\*\*(?!\*)/.exec(source);
        return match
          ? { type: "strong", raw: match[0], text: match[1], tokens: this.lexer.inlineTokens(match[1]) }
          : undefined;
      },
    },
  ],
  tokenizer: {
    html: () => undefined,
    emStrong: (source) => (source.length > LONGEST_EMPHASIS ? undefined : false), // false: as marked does it
    tag: (source) => {
      const match = /^<br *\/?>/i.exec(source); // the one way to write two lines in a cell of a table
      return match ? { type: "br", raw: match[0] } : undefined;
    },
  },
  renderer: {
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    image: ({ href, text }) =>
      IMAGE.test(href)
        ? `<img src="${escaped(href)}" alt="${escaped(text)}">`
        : `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    code: ({ text, lang }) =>
      `<pre><code class="${escaped((lang ?? "").match(/^[\w+#.-]+/)?.[0] ?? "")}">${escaped(text)}</code></pre>`,
  },
});

function showFormula(element) {
  const source = element.textContent;
  const displayMode = element.classList.contains("display");
  if (source.length > LONGEST_FORMULA) return;
  // In these, KaTeX writes style attributes into its MathML, which the content security policy does not let pass.
  const output = /\\(boxed|fbox|fcolorbox|pmb)\b/.test(source) ? "html" : "htmlAndMathml";
  try {
    katex.render(source, element, {
      displayMode,
      output,
      throwOnError: true,
      trust: false,
      strict: "ignore",
      maxSize: 20,
      maxExpand: 300,
    });
  } catch (error) {
    element.classList.add("broken");
    element.title = error.message;
    element.textContent = source;
    return;
  }
  if (output === "html") {
    element.setAttribute("role", "math");
    element.setAttribute("aria-label", source);
  }
}

/** The elements of a piece of code, highlighted if the language is known. */
export function highlighted(text, language) {
  if (!hljs.getLanguage(language) || text.length > LONGEST_HIGHLIGHTED) return document.createTextNode(text);
  return DOMPurify.sanitize(hljs.highlight(text, { language, ignoreIllegals: true }).value, SANITIZE);
}

function showCode(pre) {
  const code = pre.firstElementChild;
  const language = code.className;
  const text = code.textContent;
  code.replaceChildren(highlighted(text, language));
  const head = h(
    "div",
    { class: "code-head" },
    h("span", {}, language),
    copyButton(t("copy"), () => text),
  );
  pre.tabIndex = 0; // it scrolls sideways, also by keyboard
  const block = h("div", { class: "code-block" }, head);
  pre.replaceWith(block);
  block.append(pre);
}

/** The blocks of a text. What is nested too deeply for the library (thousands of >) is one block of plain text. */
function blocks(text) {
  try {
    return marked.lexer(text);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return Object.assign([{ type: "plain", raw: text }], { links: {} });
  }
}

function elements(token, links) {
  if (token.type === "plain") return [h("p", { class: "plain" }, token.raw)];
  const fragment = DOMPurify.sanitize(marked.parser(Object.assign([token], { links })), SANITIZE);
  fragment.querySelectorAll(".formula").forEach(showFormula);
  fragment.querySelectorAll("pre").forEach(showCode);
  fragment.querySelectorAll("table").forEach((table) => {
    const box = h("div", { class: "table-box", tabIndex: 0 });
    table.replaceWith(box);
    box.append(table);
  });
  return [...fragment.childNodes];
}

/** Shows a text that grows in `element`: only blocks that changed are made again. */
export class MarkdownView {
  #blocks = []; // [{raw, nodes}]
  #links = "{}";
  #text = "";

  constructor(element) {
    this.element = element;
  }

  update(text) {
    if (text === this.#text) return;
    this.#text = text;
    const tokens = blocks(text);
    const links = JSON.stringify(tokens.links);
    let same = 0;
    if (links === this.#links) {
      while (same < tokens.length && this.#blocks[same]?.raw === tokens[same].raw) same++;
    }
    this.#links = links;
    for (const { nodes } of this.#blocks.splice(same)) nodes.forEach((node) => node.remove());
    for (const token of tokens.slice(same)) {
      const nodes = elements(token, tokens.links);
      this.element.append(...nodes);
      this.#blocks.push({ raw: token.raw, nodes });
    }
  }
}
