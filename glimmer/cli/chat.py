"""`glimmer chat`: talk to a model in a terminal.

    glimmer chat MODEL                         the model answers in a process of its own, which ends with this one
    glimmer chat --url http://127.0.0.1:8000   a server that runs already answers
    echo question | glimmer chat -             one question, and the answer on stdout

Answers come as they are written, as Markdown; thoughts are folded. Ctrl-C stops the answer and nothing else; Ctrl-D, or
/exit, ends. A call of a tool is shown, and what is typed next is its result. Lines that begin with / are commands.
Not here: how things look (chat_screen.py), how a server is asked (api.py).
"""

import json
import os
import shlex
import stat
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from glimmer.cli import demo, exits
from glimmer.cli.api import Api, ServerRefusal, own_server, serve_words
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, SAMPLING, Command, Option, Settings, path, pick, text, truth, without
from glimmer.cli.results import save
from glimmer.config import SamplingParams
from glimmer.errors import ConfigError, EngineError, RequestError, shown
from glimmer.foreign import parse_json, read_text
from glimmer.hub import model_directory
from glimmer.model_config import ModelConfig

if TYPE_CHECKING:
    from glimmer.cli import chat_screen
else:
    chat_screen = lazy("glimmer.cli.chat_screen")

MAX_FILE = 64 << 20  # bytes of a conversation, of tools, of a question from stdin
ENGINE_OPTIONS = without(ENGINE, "skip_tokenizer_init")
SAMPLED = pick(
    SAMPLING, "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "repetition_penalty",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip
COMMAND = Command(
    "chat",
    "Talk to a model in the terminal.",
    "[MODEL] [-] [options]",
    {
        "conversation": {
            "system": Option(text, "TEXT", "the system message"),
            "prompt": Option(text, "TEXT", "ask this, print the answer, and end; `-`: what stdin says", flags=("-p",)),
            "no_think": Option(truth, "", "ask for answers without thinking"),
            "show_thinking": Option(truth, "", "do not fold the thoughts"),
            "tools": Option(path, "FILE.json", "a JSON list of the tools that the model may call"),
            "load": Option(path, "FILE.json", "begin with this conversation, and its tools (what /save writes)"),
            "plain": Option(truth, "", "no colours, no Markdown"),
        },
        "the server": {
            "url": Option(text, "URL", "ask this server", "a process of its own"),
            "api_key": Option(text, "KEY", "sent as Bearer, with --url"),
        },
        "answers": SAMPLED,
        "engine of its own process": ENGINE_OPTIONS,
    },
    positional=("model", "prompt"),
)


def main(argv: list[str]) -> int:
    """Talk until the end; returns the exit code."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    conversation = Conversation.from_settings(settings)
    engine = settings.fields(ENGINE_OPTIONS)
    question = settings.take("prompt")
    if engine.get("model") == "-":  # the two words without a flag may come in either order
        question, directory = engine.pop("model"), question
        engine |= {} if directory is None else {"model": directory}
    named = engine.pop("model", None) if "url" in settings.given else None
    if "url" in settings.given and engine:
        raise ConfigError(
            f"--url with {', '.join(engine)}", "settings of the engine only without a server", "leave out one"
        )
    if "url" in settings.given:
        server: Any = nullcontext(Api(settings.take("url"), settings.take("api_key")))
    else:
        engine["model"] = str(model_directory(engine.get("model") or demo.default_model(COMMAND.name)))
        ModelConfig.load(engine["model"])  # refused before a question is read and processes are started
        server = own_server(serve_words(engine), quiet=True)
    if question == "-" or (question is None and not exits.is_terminal(sys.stdin)):
        question = _from_stdin()
    screen: chat_screen.Screen = (
        chat_screen.Plain()
        if settings.take("plain", False) or not exits.is_terminal(sys.stdout)
        else chat_screen.Terminal(settings.take("show_thinking", False))
    )
    with screen.waiting("loading the model") if "url" not in settings.given else nullcontext(), server as api:
        conversation.model = named or api.model()
        screen.ready()
        if question is not None:
            return Talk(api, conversation, screen).once(question)
        return Talk(api, conversation, screen).run()


def _from_stdin() -> str:
    try:
        question = read_text(Path("stdin"), MAX_FILE, ConfigError, "utf-8-sig", os.dup(0))
    except OSError as error:
        raise ConfigError(f"stdin: {error.strerror}", "a question", "pipe one in") from None
    if not question.strip():
        raise ConfigError("stdin is empty", "a question", "pipe one in, e.g. echo question | glimmer chat -")
    return question.rstrip("\n")


# ---------------------------------------------------------------------- the conversation


@dataclass
class Conversation:
    """What has been said, and how answers are made."""

    model: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    thinking: bool = True

    @classmethod
    def from_settings(cls, settings: Settings) -> "Conversation":
        """As the command line says. Raises ConfigError or RequestError."""
        sampling = settings.fields(SAMPLED)
        settings.check(SamplingParams, sampling)
        made = cls(sampling=sampling, thinking=not settings.take("no_think", False))
        if "load" in settings.given:
            made.load(Path(settings.take("load")))
        if "tools" in settings.given:
            made.tools = read_list(Path(settings.take("tools")), "tools")
        if "system" in settings.given:
            made.set_system(settings.take("system"))
        return made

    @property
    def request(self) -> dict[str, Any]:
        """The body that asks for the next answer."""
        body = {"model": self.model, "messages": self.messages, "stream": True, **self.sampling}
        body |= {"stream_options": {"include_usage": True}}
        body |= {} if self.thinking else {"chat_template_kwargs": {"enable_thinking": False}}
        return body | ({"tools": self.tools} if self.tools else {})

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """Calls of the last answer that have no result yet."""
        results = {message.get("tool_call_id") for message in self.messages if message["role"] == "tool"}
        last: dict[str, Any] = next((one for one in reversed(self.messages) if one["role"] == "assistant"), {})
        return [call for call in last.get("tool_calls") or () if call["id"] not in results]

    def set_system(self, content: str) -> None:
        """Set the system message; an empty one removes it."""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if content:
            self.messages.insert(0, {"role": "system", "content": content})

    def drop_answer(self) -> bool:
        """Forget the last answer, back to the user's message; False if there is none to be answered."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] in ("assistant", "tool"):
            end -= 1
        if not end or self.messages[end - 1]["role"] != "user":
            return False
        del self.messages[end:]
        return True

    def load(self, file: Path) -> None:
        """Go on with a file that `save` has written, its tools too, or with a list of messages in OpenAI's form."""
        found = _read(file, "messages")
        messages = _list_of(found, file, "messages")
        for number, message in enumerate(messages):
            try:
                msgspec.convert(message, _Message)
            except msgspec.ValidationError as error:
                raise ConfigError(
                    f"{file}, message {number}: {error}", "messages in OpenAI's form", "correct the file"
                ) from None
        if isinstance(found, dict) and "tools" in found:
            self.tools = _list_of(found, file, "tools")
        self.messages = messages

    def save(self, file: Path) -> None:
        """Write messages and tools to a file, as JSON."""
        save(file, json.dumps({"messages": self.messages, "tools": self.tools}, ensure_ascii=False, indent=1) + "\n")


class _Function(msgspec.Struct):
    name: str


class _Call(msgspec.Struct):
    id: str
    function: _Function


class _Message(msgspec.Struct):
    """As much of a message's form as is relied on here; the rest is the server's to check."""

    role: str
    tool_calls: list[_Call] | None = None


def read_list(file: Path, key: str) -> list[dict[str, Any]]:
    """A JSON list of objects, or the one under `key`. ConfigError if there is none."""
    return _list_of(_read(file, key), file, key)


def _read(file: Path, key: str) -> Any:
    try:
        return parse_json(read_text(file, MAX_FILE, ConfigError))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", f"a file of {key}", "check the path") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error!s:.200}", f"a list of {key}", "correct the file") from None


def _list_of(found: Any, file: Path, key: str) -> list[dict[str, Any]]:
    found = found.get(key) if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"{file} has no list of {key}", f'[...] or {{"{key}": [...]}}', "correct the file")
    return found


# ---------------------------------------------------------------------- talking


class Talk:
    """A conversation between a user at a screen and a model behind an Api."""

    def __init__(self, api: Api, conversation: Conversation, screen: "chat_screen.Screen"):
        self._api, self._conversation, self._screen = api, conversation, screen
        self._thoughts = ""  # of the last answer
        self._over = False

    def once(self, question: str) -> int:
        """One question, one answer. Raises what goes wrong, and KeyboardInterrupt after Ctrl-C."""
        self._conversation.messages.append({"role": "user", "content": question})
        if self._answer() == "stopped":
            raise KeyboardInterrupt
        return 0

    def run(self) -> int:
        """Until the user ends it."""
        self._screen.welcome(self._conversation.model)
        session = chat_screen.Input(history_file(), [f"/{name}" for name in COMMANDS])
        while not self._over:
            try:
                calls = self._conversation.open_calls
                self._take(session.read(f"result of {calls[0]['function']['name']}" if calls else ""))
            except KeyboardInterrupt:  # in an answer it is met there; here there is nothing to stop
                continue
            except EOFError:
                break
            except (ServerRefusal, EngineError) as error:
                self._screen.error(str(error))
                self._screen.note("/retry asks again")
            except (ConfigError, RequestError) as error:
                self._screen.error(str(error))
        return 0

    def _take(self, typed: str) -> None:
        """What the user has typed: a command, the result of a call, or a question."""
        calls = self._conversation.open_calls
        if typed.startswith("/") and not typed.startswith("//"):
            self._command(typed)
            return
        typed = typed.removeprefix("/") if typed.startswith("//") else typed
        if calls:
            message = {"role": "tool", "tool_call_id": calls[0]["id"], "content": typed}
            self._conversation.messages.append(message)
            if len(calls) > 1:
                return
        elif typed.strip():
            self._conversation.messages.append({"role": "user", "content": typed})
        else:
            return
        self._answer()

    def _answer(self) -> str | None:
        """Ask for the next answer and show it; returns why it ended. Ctrl-C keeps what has come: "stopped"."""
        content: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        usage: dict[str, Any] = {}
        reason = None
        begin = time.monotonic()
        try:
            with (
                self._screen.answering(),
                closing(self._api.events("/v1/chat/completions", self._conversation.request)) as events,
            ):
                for event in events:
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or ():
                        delta = choice.get("delta") or {}
                        reason = choice.get("finish_reason") or reason
                        if piece := delta.get("reasoning_content") or delta.get("reasoning"):
                            thoughts.append(piece)
                            self._screen.thought(piece)
                        if piece := delta.get("content"):
                            content.append(piece)
                            self._screen.text(piece)
                        for part in delta.get("tool_calls") or ():
                            _gather(calls, part)
        except KeyboardInterrupt:
            reason = "stopped"
        self._thoughts = "".join(thoughts)
        # A call that was cut off cannot be answered, and templates want arguments that are complete.
        whole = [call for call in calls if _is_json(call["function"]["arguments"])] if reason == "tool_calls" else []
        message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
        message |= {"reasoning_content": self._thoughts} if thoughts else {}
        message |= {"tool_calls": whole} if whole else {}
        if content or thoughts or whole:
            self._conversation.messages.append(message)
        for call in calls:
            self._screen.call(call["function"]["name"], call["function"]["arguments"])
        self._screen.answered(_figures(usage, time.monotonic() - begin), _cut(reason))
        return reason

    # ------------------------------------------------------------------ commands

    def _command(self, typed: str) -> None:
        name, _, argument = typed[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise ConfigError(f"/{name}", "one of /" + ", /".join(COMMANDS), "a text that begins with / is written //")
        command[1](self, argument.strip())

    def _help(self, _: str) -> None:
        for name, (about, _command) in COMMANDS.items():
            self._screen.note(f"/{name:<10} {about}")
        self._screen.note("Esc Enter begins a new line; Ctrl-C stops an answer; Ctrl-D ends")

    def _exit(self, _: str) -> None:
        self._over = True

    def _new(self, _: str) -> None:
        self._conversation.messages = [one for one in self._conversation.messages if one["role"] == "system"]
        self._screen.note("a new conversation")

    def _retry(self, _: str) -> None:
        if self._conversation.messages and self._conversation.messages[-1]["role"] == "tool":
            self._answer()  # of the results that are there
        elif self._conversation.drop_answer():
            self._answer()
        else:
            raise ConfigError("/retry of nothing", "a question", "ask one")

    def _undo(self, _: str) -> None:
        if not self._conversation.drop_answer():
            raise ConfigError("/undo of nothing", "a question", "ask one")
        asked = self._conversation.messages.pop()
        self._screen.note(f"forgotten: {asked.get('content')!s:.60}")

    def _system(self, argument: str) -> None:
        self._conversation.set_system(argument)
        self._screen.note("the system message is set" if argument else "there is no system message now")

    def _think(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise ConfigError(f"/think {argument}", "/think on, or /think off", "choose one of these")
        self._conversation.thinking = argument == "on"
        self._screen.note(f"thinking is {argument}")

    def _show_thoughts(self, _: str) -> None:
        self._screen.note(self._thoughts or "the last answer had no thoughts")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        option = SAMPLED.get(name)
        if not name:
            now = self._conversation.sampling
            self._screen.note(json.dumps(now, ensure_ascii=False) if now else "all as the server has them")
            return
        if option is None:
            raise ConfigError(f"/set {name}", f"one of {', '.join(SAMPLED)}", "e.g. /set temperature 0.7")
        changed = without(self._conversation.sampling, name)
        if value.strip():
            try:
                changed[name] = option.kind(shlex.split(value) if option.repeat else value.strip())
            except (ValueError, KeyError, TypeError, OverflowError):
                raise ConfigError(
                    f"/set {name} {shown(value)}", str(option.kind.__doc__), "correct the value"
                ) from None
        SamplingParams(**changed)
        self._conversation.sampling = changed
        self._screen.note(f"{name} is {changed.get(name, 'the default of the server')}")

    def _tools(self, argument: str) -> None:
        self._conversation.tools = read_list(_file(argument), "tools") if argument else []
        self._screen.note(f"{len(self._conversation.tools)} tools")

    def _save(self, argument: str) -> None:
        self._conversation.save(_file(argument))
        self._screen.note(f"saved: {argument}")

    def _load(self, argument: str) -> None:
        self._conversation.load(_file(argument))
        self._screen.note(f"{len(self._conversation.messages)} messages")


COMMANDS: dict[str, tuple[str, Callable[[Talk, str], None]]] = {
    "help": ("this list", Talk._help),
    "new": ("forget the conversation", Talk._new),
    "retry": ("another answer to the last question", Talk._retry),
    "undo": ("forget the last question and its answer", Talk._undo),
    "system": ("TEXT: set the system message; without TEXT: remove it", Talk._system),
    "think": ("on or off: whether the model thinks before it answers", Talk._think),
    "thoughts": ("what the model thought last", Talk._show_thoughts),
    "set": ("NAME VALUE: a sampling setting, e.g. temperature 0.7; without VALUE: the default", Talk._set),
    "tools": ("FILE.json: tools that the model may call; without FILE: none", Talk._tools),
    "save": ("FILE.json: write the conversation", Talk._save),
    "load": ("FILE.json: go on with a conversation", Talk._load),
    "exit": ("end", Talk._exit),
}


def _file(argument: str) -> Path:
    if not argument:
        raise ConfigError("no file", "the name of a file", "write it after the command")
    return Path(os.path.expanduser(argument))


def _gather(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a piece of a call to the calls of an answer."""
    index, function = part.get("index", len(calls)), part.get("function") or {}
    while len(calls) <= index:
        calls.append({"id": f"call_{len(calls)}", "type": "function", "function": {"name": "", "arguments": ""}})
    calls[index]["id"] = part.get("id") or calls[index]["id"]
    calls[index]["function"]["name"] += function.get("name") or ""
    calls[index]["function"]["arguments"] += function.get("arguments") or ""


def _is_json(arguments: str) -> bool:
    try:
        return isinstance(parse_json(arguments), dict)
    except ValueError:
        return False


def _figures(usage: dict[str, Any], seconds: float) -> str:
    """Tokens and speed in words; nothing where the server does not tell."""
    if not usage:
        return ""
    tokens, prompt = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    speed = f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"
    return f"{speed}; context {prompt + tokens}, {cached} cached"


def _cut(reason: str | None) -> str:
    """Why an answer is not whole, in words; "" if it is."""
    return {"length": "cut: the limit of tokens or the context is reached", "stopped": "stopped"}.get(reason or "", "")


def history_file() -> Path:
    """Where what was typed is kept, for this user's eyes only."""
    base = os.path.expanduser("~/.local/state")
    file = Path(base) / "glimmer" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
        os.chmod(file, stat.S_IRUSR | stat.S_IWUSR)
    except OSError:
        return Path(os.devnull)
    return file
