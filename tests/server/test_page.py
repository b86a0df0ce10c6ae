"""The web page in a real browser: headless Chromium, the real server, the demo model. Its files, without a browser too.

The browser tests are skipped where there is no Chromium or no playwright. Each ends by looking at what the browser
complained of: nothing may break the content security policy, fail in a script, or ask another server for anything.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jobs import until
from servers import ROOT, Server

from glimmer.server import page as served

WEB = ROOT / "glimmer" / "server" / "web"
VENDORED = re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", (WEB / "vendor" / "VENDORED.md").read_text(), re.M)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HOSTILE = f"""<script>window.harmed = 1</script> <img src=x onerror="window.harmed = 1"> <b onclick="harmed=1">b</b>
[script](javascript:window.harmed=1) [data](data:text/html,<script>harmed=1</script>) [up](//example.com)
[ok](https://example.com) ![remote](https://example.com/a.png) ![own](/v1/models)
![svg](data:image/svg+xml;base64,PHN2Zz4=) ![](data:image/png;base64,{PIXEL})
<svg><style><a id="</style><img src=1 onerror=window.harmed=1>">
<iframe srcdoc="<script>parent.harmed=1</script>"></iframe>

$\\href{{javascript:window.harmed=1}}{{x}}$ $\\includegraphics{{https://example.com/b.png}}$
$\\htmlStyle{{color:red}}{{y}}$

```html"><img src=x onerror=harmed=1>
<script>window.harmed = 1</script>
```
<form action="https://example.com"><input autofocus onfocus="window.harmed=1"></form><base href="https://example.com/">"""
RICH = r"""Let \(p^2 = 2q^2\), so $q^{2}$ costs $5 or $10:

$$
\begin{aligned} a &= b \\ c &= d \end{aligned}
$$

and \[ \boxed{x} \], **“强调”**是。

| a | b |
|:--|--:|
| 1<br>2 | `x|y` |

1. one
   ```python
   def f(x): return x  # $not$ a formula
   ```
2. [two][ref] ~~three~~

> a quotation
> of two lines

[ref]: https://example.com/two"""


def test_the_files_are_those_that_the_list_names():
    """Vendored libraries are what their authors published: names and checksums stand in VENDORED.md."""
    names = {str(file.relative_to(WEB / "vendor")) for file in (WEB / "vendor").rglob("*") if file.is_file()}
    assert names == {name for name, _ in VENDORED} | {"VENDORED.md"} and len(VENDORED) > 20
    for name, digest in VENDORED:
        assert hashlib.sha256((WEB / "vendor" / name).read_bytes()).hexdigest() == digest, name
    for folder in (WEB / "vendor").iterdir():
        assert not folder.is_dir() or (folder / "LICENSE").is_file(), folder


def test_the_page_says_each_word_in_both_languages():
    words = dict(re.findall(r"^  (\w+): \[\s*(.+?),?\s*\],$", (WEB / "i18n.js").read_text(), re.M | re.S))
    assert len(words) > 80 and all(len(json.loads(f"[{pair}]")) == 2 for pair in words.values())
    said = (WEB / "index.html").read_text() + "".join(file.read_text() for file in WEB.glob("*.js"))
    used = set(re.findall(r'\bt\("(\w+)"', said)) | set(
        re.findall(r'data-(?:text|label|title|placeholder)="(\w+)"', said)
    )
    assert used <= words.keys()
    assert not {name for name in words if not re.search(rf'["`]{name}["`]|  {name}: \{{', said)}, (
        "words that nothing says"
    )


@pytest.mark.slow
def test_the_files_come_with_headers_that_let_nothing_else_in(server):
    html = server.get("/")
    files = ["/", *(f"/web/{file.relative_to(WEB)}" for file in WEB.rglob("*") if file.suffix in served.MEDIA_TYPES)]
    with httpx.Client(base_url=server.url) as client:
        for name in files:
            answer = client.get(name)
            assert answer.status_code == 200, name
            assert served.HEADERS.items() <= dict(answer.headers).items(), name
            assert answer.headers["content-type"] == served.MEDIA_TYPES[Path(name).suffix or ".html"]
            again = client.get(name, headers={"if-none-match": answer.headers["etag"]})
            assert again.status_code == 304 and served.HEADERS.items() <= dict(again.headers).items()
        for name in ("/web/", "/web/nothing.js", "/web/../page.py", "/web/%2e%2e/page.py", "/web/..%2fpage.py"):
            assert client.get(name).status_code == 404, name
    policy = dict(rule.split(" ", 1) for rule in html.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in html.headers["content-security-policy"]
    assert not re.search(r"<script(?! [^>]*src=)|<style|\sstyle=|\son\w+=|https?://", html.text)


def test_the_page_behind_a_proxy_with_a_prefix():
    """Whether the proxy takes the prefix off or not; the page names its files relatively."""
    app = FastAPI()
    served.mount(app)
    with TestClient(app, root_path="/glimmer") as client:
        for path in ("/", "/web/main.js", "/glimmer/", "/glimmer/web/main.js"):
            assert client.get(path).status_code == 200, path
    assert not re.search(r'(?:src|href)="/', (WEB / "index.html").read_text())


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
    if BROWSER is None:
        pytest.skip(f"the page's tests need a browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A tab with the page, in a browser profile of its own; `expected`: HTTP errors that the test is about."""

    def __init__(self, browser, url: str, **options):
        self.url = url
        self.complaints: list[str] = []
        self.expected = ""
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        self.context.set_default_timeout(20_000)
        self.context.on("request", self._asked)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(f"script: {error}"))
        self.page.on("console", lambda message: message.type in ("error", "warning") and self._said(message.text))
        self.page.goto(url)

    def _asked(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.complaints.append(f"asked for {request.url}")

    def _said(self, text: str) -> None:
        if not (self.expected and self.expected in text):
            self.complaints.append(f"console: {text}")

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def answered(self) -> str:
        """Wait for the end of the last answer; its text."""
        self.page.wait_for_selector(".turn.assistant:last-child[aria-busy=false]")
        return self.page.inner_text(".turn.assistant:last-child > .markdown")

    def set(self, name: str, value: str) -> None:
        """Type a setting."""
        self.page.click("#open-settings")
        self.page.fill(f"[name={name}]", value)
        self.page.keyboard.press("Escape")

    def load(self, *turns: dict) -> None:
        """Import a conversation of these turns, each below the one before."""
        self.load_file(conversation(*turns))

    def load_file(self, content: object) -> None:
        """Import a file."""
        text = content if isinstance(content, str) else json.dumps(content)
        self.page.click("#open-settings")
        self.page.set_input_files("input[type=file]", {"name": "a.json", "mimeType": "", "buffer": text.encode()})
        self.page.keyboard.press("Escape")


def conversation(*turns: dict) -> dict:
    """A file as the page exports it."""
    made, chosen, parent = {}, {}, None
    for number, turn in enumerate(turns):
        name = f"t{number}"
        answer = {"reasoning": "", "calls": [], "finish": "stop", "usage": None, "error": None}
        answer["times"] = dict.fromkeys(("start", "first", "thought", "end"), 1)
        made[name] = (
            {"id": name, "parent": parent, "created": number} | (answer if turn["role"] == "assistant" else {}) | turn
        )
        chosen[parent or ""] = name
        parent = name
    one = {"id": "c0", "title": "Imported", "created": 1, "updated": 1, "settings": {}, "turns": made, "chosen": chosen}
    return {"format": "glimmer-conversations", "version": 1, "conversations": [one]}


@pytest.fixture
def tab(browser, server):
    """tab(**options) -> Tab; what its browser complained of fails the test."""
    opened: list[Tab] = []

    def open_tab(url: str = f"{server.url}/", **options) -> Tab:
        opened.append(Tab(browser, url, **options))
        return opened[-1]

    yield open_tab
    for one in opened:
        one.context.close()
        assert one.complaints == []


slow = pytest.mark.slow


@slow
def test_a_conversation_with_thinking_figures_and_reload(tab):
    one = tab()
    one.ask("What is 347 + 586?")
    assert one.answered() == "347+586=933"
    thinking = one.page.locator(".turn.assistant .thinking")
    assert not thinking.evaluate("details => details.open")
    thinking.locator("summary").click()
    thinking.locator(".thoughts:has-text('so 933')").wait_for()
    one.ask("What is 347 + 586?")  # its prompt begins as the first one's, which is cached
    assert one.answered() == "347+586=933"
    figures = one.page.inner_text(".turn.assistant:last-child .figures")
    assert re.search(r"\d+ tokens", figures) and re.search(r"[\d.]+ tokens/s", figures) and "from the cache" in figures
    assert re.fullmatch(r"\d+ / 1,024", one.page.inner_text("#context"))
    one.page.click("#title")
    one.page.fill(".title-input", "A sum")
    one.page.keyboard.press("Enter")
    until(lambda: one.page.title().startswith("A sum"))
    one.page.reload()
    assert one.answered() == "347+586=933" and one.page.locator(".turn").count() == 4
    assert one.page.inner_text("#title") == "A sum" == one.page.inner_text(".conversation")


@slow
def test_thinking_is_switched_off(tab):
    one = tab()
    one.page.click("#thinking")
    one.ask("What is the capital of France?")
    one.answered()
    assert one.page.locator(".thinking:visible").count() == 0
    one.page.reload()
    assert one.page.get_attribute("#thinking", "aria-pressed") == "false"


@slow
def test_settings_are_sent_and_nothing_else(tab):
    one = tab()
    one.page.wait_for_selector("#model:not(:empty)")
    typed = {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_k": "40",
        "seed": "7",
        "max_tokens": "5",
        "stop": "one,\n\ntwo,",
    }
    for name, value in typed.items():
        one.set(name, value)
    with one.page.expect_request("**/v1/chat/completions") as sent:
        one.ask("<|user|>")
    one.answered()
    assert "cut at the token limit" in one.page.inner_text(".note")
    body = sent.value.post_data_json
    assert body.pop("messages") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|user|>"}]
    assert body.pop("model") and body.pop("stream") is True and body.pop("stream_options")["include_usage"]
    assert body == {
        "chat_template_kwargs": {"enable_thinking": True},
        "special_tokens_in_content": "text",
        "stop": ["one,", "two,"],
        **{"temperature": 0.5, "top_k": 40, "seed": 7, "max_tokens": 5},
    }
    one.page.click("#new-conversation")  # begins with the same settings
    one.page.click("#open-settings")
    assert {name: one.page.input_value(f"[name={name}]") for name in typed} == typed


@slow
def test_stop_and_reload_keep_what_was_there(tab):
    one = tab()
    at_first_text = """action => new MutationObserver((_, watch) => {
        if (!document.querySelector(".running > .markdown:not(:empty)")) return;
        watch.disconnect();
        if (action === "reload") location.reload();
        else document.body.dispatchEvent(new KeyboardEvent("keydown", { key: action, bubbles: true }));
    }).observe(document.querySelector("#thread"), { childList: true, subtree: true })"""
    one.set("min_tokens", "900")
    one.page.evaluate(at_first_text, "Escape")
    one.ask("Tell me about Paris.")
    one.answered()
    assert one.page.inner_text(".note") == "Stopped." and one.page.is_visible("#send")
    shown = one.page.text_content(".turn.assistant")
    one.page.reload()
    one.answered()
    assert one.page.text_content(".turn.assistant") == shown
    one.page.evaluate(at_first_text, "reload")
    with one.page.expect_navigation():
        one.page.click("[title='Answer again']")
    assert one.answered()
    assert "incomplete" in one.page.inner_text(".note[role=alert]") and one.page.inner_text(".version") == "2 / 2"


@slow
def test_branches_of_questions_and_answers(tab):
    one = tab()
    one.set("temperature", "0")
    one.ask("What is 12 + 30?")
    assert one.answered() == "12+30=42"
    one.page.fill("#question", "")
    one.page.press("#question", "ArrowUp")  # edits the last question
    one.page.fill(".edit-area", "What is 20 + 35?")
    one.page.keyboard.press("Enter")
    one.page.wait_for_selector(".turn.user .version:text('2 / 2')")
    assert one.answered() == "20+35=55"
    one.page.click(".turn.assistant [title='Answer again']")
    one.page.wait_for_selector(".turn.assistant .version:text('2 / 2')")
    assert one.answered() == "20+35=55"
    one.page.click(".turn.user [title='Previous version']")
    assert one.answered() == "12+30=42" and one.page.locator(".turn").count() == 2
    one.page.reload()
    assert one.answered() == "12+30=42"
    assert one.page.inner_text(".turn.user .version") == "1 / 2"


@slow
def test_a_tool_call_and_its_result(tab):
    one = tab(locale="zh-CN")
    one.set("tools", json.dumps([TOOL], ensure_ascii=False))
    one.set("temperature", "0")
    one.ask("巴黎今天天气怎么样？")
    one.page.wait_for_selector(".call textarea")
    assert one.page.inner_text(".call-name") == "get_weather"
    assert json.loads(one.page.inner_text(".call-arguments")) == {"city": "巴黎"}
    one.page.fill(".call textarea", '{"temperature": 21, "weather": "晴"}')
    one.page.click(".calls button[type=submit]")
    one.page.wait_for_selector(".turn.assistant:nth-of-type(3)")
    assert "21" in one.answered()
    one.page.reload()
    assert "21" in one.answered() and "晴" in one.page.inner_text(".call-result")


@slow
def test_an_answer_follows_the_schema(tab):
    one = tab()
    city = {"properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    schema = {"type": "object", "additionalProperties": False} | city
    one.set("format", json.dumps(schema))
    one.ask("Tell me about Paris.")
    assert json.loads(one.answered()) == {"city": "Rome"}
    one.set("format", json.dumps({"not": {}}))
    one.expected = "400"
    one.ask("Tell me about Paris.")
    one.page.wait_for_selector(".note[role=alert] >> text=not")


@slow
def test_what_cannot_be_sent_is_said_where_it_is_typed(tab):
    one = tab()
    one.set("tools", '[{"name"}]')
    one.set("temperature", "hot")
    one.ask("Hello")
    one.page.wait_for_selector("dialog [name=temperature][aria-invalid=true]:focus")
    assert "JSON" in one.page.inner_text("#setting-tools-problem")
    assert one.page.input_value("#question") == "Hello" and one.page.locator(".turn").count() == 0


@slow
def test_errors_stand_in_the_conversation_with_a_way_on(tab):
    one = tab()
    one.expected = "Failed to load resource"
    one.page.wait_for_selector("#model:not(:empty)")
    one.context.set_offline(True)
    one.ask("What is 347 + 586?")
    one.page.wait_for_selector(".note[role=alert]")
    assert "cannot be reached" in one.page.inner_text(".note")
    one.context.set_offline(False)
    one.page.click(".note >> text=Try again")
    assert one.answered() == "347+586=933" and one.page.locator(".version").count() == 0
    one.ask("word " * 2000)
    one.answered()
    assert "(400)" in one.page.inner_text(".note[role=alert]")


@slow
def test_the_api_key_is_asked_for(tab):
    with Server("--api-key", "the-key") as closed:
        one = tab(f"{closed.url}/")
        one.expected = "401"
        one.page.fill("[name=key]", "wrong")
        one.page.keyboard.press("Enter")
        until(lambda: one.page.input_value("[name=key]") == "")
        one.page.fill("[name=key]", "the-key")
        one.page.keyboard.press("Enter")
        one.page.wait_for_selector("#model:not(:empty)")
        one.ask("What is 347 + 586?")
        assert one.answered() == "347+586=933"


@slow
def test_nothing_of_an_answer_runs_or_is_fetched(tab):
    one = tab()
    one.page.wait_for_selector("#model:not(:empty)")
    asked: list[str] = []
    one.context.on("request", lambda request: asked.append(request.url))
    call = {"id": HOSTILE, "name": HOSTILE, "arguments": HOSTILE}
    one.load(
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": HOSTILE, "reasoning": HOSTILE, "calls": [call]},
        {"role": "tool", "results": [{"id": HOSTILE, "content": HOSTILE}]},
        {"role": "assistant", "content": "", "error": {"code": HOSTILE, "message": HOSTILE, "status": 400}},
    )
    one.page.click(".thinking summary")
    one.page.wait_for_selector(".thoughts img")
    one.page.wait_for_timeout(200)
    assert one.page.evaluate("window.harmed") is None
    assert [url for url in asked if not url.startswith(("data:", "blob:", f"{one.url}web/"))] == []
    assert (
        one.page.locator(
            ".thread :is(script, iframe, form[action], base, style, svg style, b, [onerror], [onclick])"
        ).count()
        == 0
    )
    sources = one.page.eval_on_selector_all(".thread img", "all => all.map((one) => one.src)")
    assert set(sources) == {f"data:image/png;base64,{PIXEL}"}
    links = one.page.eval_on_selector_all(
        ".thread a[href]", "all => all.map((one) => [one.protocol, one.target, one.rel])"
    )
    assert links and all(link == ["https:", "_blank", "noopener noreferrer"] for link in links)
    assert "<script>window.harmed = 1</script>" in one.page.inner_text(".turn.assistant > .markdown")
    one.page.locator("a:text-is('script')").first.click(force=True)
    assert one.page.evaluate("window.harmed") is None and one.page.url.startswith(one.url)


@slow
def test_a_growing_text_ends_as_the_whole_text_looks(tab):
    """Blocks that do not change are kept while a text grows; wherever it is cut, the end is the same."""
    one = tab()
    script = """async (text) => {
        const { MarkdownView } = await import("/web/markdown.js");
        const whole = document.createElement("div"), grown = document.createElement("div");
        new MarkdownView(whole).update(text);
        const view = new MarkdownView(grown);
        for (let end = 0; end <= text.length; end++) view.update(text.slice(0, end));
        return [whole.innerHTML, grown.innerHTML];
    }"""
    whole, grown = one.page.evaluate(script, RICH)
    assert grown == whole
    assert whole.count('class="katex"') == 4 and whole.count("katex-display") == 2 and "$5 or $10" in whole
    assert "<strong>“强调”</strong>" in whole and "1<br>2" in whole and "hljs-keyword" in whole
    assert 'href="https://example.com/two"' in whole and "$not$" in whole


@slow
def test_degenerate_texts_do_not_stop_the_page(tab):
    """What a model that repeats itself may write: each is shown within seconds, whatever Markdown makes of it."""
    one = tab()
    script = """async (text) => {
        const { MarkdownView } = await import("/web/markdown.js");
        const shown = document.createElement("div"), begun = performance.now();
        new MarkdownView(shown).update(text);
        return [shown.childNodes.length > 0, (performance.now() - begun) / 1000];
    }"""
    for piece in ("$", "**", "[", "`", "\\(", "<a ", ">", "$a ", "_a*", "**中", "- ", "$$\n", "|a", "![", "&amp;"):
        shown, seconds = one.page.evaluate(script, piece * 2000)
        assert shown and seconds < 10, piece


@slow
def test_conversations_are_exported_and_imported(tab):
    one = tab()
    one.load({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "**Good day.**"})
    one.page.wait_for_selector("strong:text('Good day.')")
    one.page.click("#open-settings")
    with one.page.expect_download() as download:
        one.page.click("text=Export all")
    exported = json.loads(Path(download.value.path()).read_text())
    wanted = conversation({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "**Good day.**"})
    assert exported["conversations"][0]["turns"] == wanted["conversations"][0]["turns"]
    one.page.keyboard.press("Escape")
    one.page.click("[aria-label='Delete “Imported”']")
    assert one.page.locator(".conversation").count() == 0
    one.page.click("text=Undo")
    one.page.wait_for_selector("strong:text('Good day.')")


@slow
def test_a_file_that_is_none_of_ours_changes_nothing(tab):
    one = tab()
    for change, named in (
        (lambda file, first: file.update(format="other"), "format"),
        (lambda file, first: file.update(conversations={}), "conversations"),
        (lambda file, first: first["turns"]["t0"].update(parent="t0"), "parent"),
        (lambda file, first: first["turns"]["t0"].update(role="system"), "role"),
        (lambda file, first: first["turns"]["t0"].update(content=[]), "content"),
        (lambda file, first: first["chosen"].update({"": "t9"}), "chosen"),
        (lambda file, first: first.update(id="__proto__"), "id"),
        (lambda file, first: first["settings"].update(tools=1), "settings.tools"),
    ):
        file = conversation({"role": "user", "content": "Hello"})
        change(file, file["conversations"][0])
        one.load_file(file)
        one.page.wait_for_selector(f"#toast:has-text('\"{named}\"')")
        assert one.page.locator(".conversation").count() == 0
    one.load_file("{")
    one.page.wait_for_selector("#toast:has-text('JSON')")


@slow
def test_a_narrow_dark_chinese_screen(tab):
    one = tab(
        viewport={"width": 360, "height": 700}, color_scheme="dark", locale="zh-CN", is_mobile=True, has_touch=True
    )
    assert one.page.get_attribute("#question", "placeholder") == "输入消息"
    one.load({"role": "user", "content": "x" * 400}, {"role": "assistant", "content": RICH + "\n\n" + "`y`" * 200})
    one.page.wait_for_selector(".katex")
    assert one.page.evaluate("document.documentElement.scrollWidth") == 360
    assert one.page.evaluate("document.querySelector('#scroller').scrollWidth") <= 360
    box = one.page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 700
    assert not one.page.is_visible("#sidebar")
    one.page.tap("#open-sidebar")
    assert one.page.is_visible("#sidebar") and one.page.evaluate("document.querySelector('#sidebar').inert") is False
    one.page.tap("#close-sidebar")
    assert not one.page.is_visible("#sidebar")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = one.page.evaluate(ground)
    one.page.tap("#open-settings")
    one.page.select_option("[name=theme]", "light")
    light = one.page.evaluate(ground)
    assert light != dark
    one.page.select_option("[name=language]", "en")
    one.page.wait_for_selector("h2:text('Settings')")
    one.page.reload()
    assert one.page.evaluate(ground) == light and one.page.get_attribute("#question", "placeholder") == "Message"
    assert one.page.evaluate("document.documentElement.lang") == "en"


@slow
def test_the_keyboard_is_enough(tab):
    one = tab()
    one.page.keyboard.type("What is 12 + 30?")  # the box has the focus
    one.page.keyboard.press("Shift+Enter")
    one.page.keyboard.type("And why?")
    assert one.page.input_value("#question") == "What is 12 + 30?\nAnd why?"
    one.page.evaluate("document.activeElement.blur()")
    one.page.keyboard.press("/")
    assert one.page.evaluate("document.activeElement.id") == "question" and "/" not in one.page.input_value("#question")
    one.page.keyboard.press("Enter")
    one.answered()
    one.page.keyboard.press("Control+Shift+O")
    assert one.page.locator(".turn").count() == 0 and one.page.is_visible("#welcome")
    seen = set()
    for _ in range(25):
        one.page.keyboard.press("Tab")
        seen.add(one.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"new-conversation", "conversation", "title", "open-settings", "starter", "thinking", "tools-chip"} <= seen
    unnamed = "all => all.filter((one) => !(one.ariaLabel || one.textContent.trim())).map((one) => one.outerHTML)"
    assert one.page.eval_on_selector_all("button, textarea", unnamed) == []
