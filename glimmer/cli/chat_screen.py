"""How `glimmer chat` looks: a terminal with Markdown and folded thoughts, or plain text for a pipe.

What a model or a server has written is shown without control characters: it cannot move the cursor, change the title or
write to the clipboard. Not here: what is said (chat.py).
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.markup import escape
from rich.panel import Panel
from rich.spinner import Spinner
from rich.syntax import Syntax
from rich.text import Text

from glimmer.cli import exits
from glimmer.errors import EngineError

SHOWN = str.maketrans(
    {c: chr(0x2400 + c) if c < 32 else "\ufffd" for c in (*range(32), 127, *range(128, 160)) if c not in (9, 10)}
)
FRAMES = 12  # a second
TAIL = 60  # characters of the thoughts that are shown while they come


def harmless(text: str) -> str:
    """A text without control characters, but for tabs and new lines."""
    return text.replace("\r\n", "\n").translate(SHOWN)


class Screen:
    """What a talk shows. This class shows nothing."""

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Something takes a while; until `ready`."""
        yield

    def ready(self) -> None:
        """What was waited for is there."""

    def welcome(self, model: str) -> None:
        """A talk begins."""

    @contextmanager
    def answering(self) -> Iterator[None]:
        """An answer comes."""
        yield

    def thought(self, piece: str) -> None:
        """More of the reasoning."""

    def text(self, piece: str) -> None:
        """More of the answer."""

    def call(self, name: str, arguments: str) -> None:
        """A call of a tool, with its arguments as JSON text."""

    def answered(self, figures: str, cut: str) -> None:
        """The answer has ended; cut: why it is not whole."""

    def note(self, line: str) -> None:
        """Something about the talk."""

    def error(self, text: str) -> None:
        """Something went wrong."""


class Plain(Screen):
    """Answers alone on stdout, as they come; all else on stderr. Thoughts are not shown."""

    def __init__(self) -> None:
        self._last = "\n"

    def text(self, piece: str) -> None:
        """As Screen says. BrokenPipeError where nobody reads any more."""
        self._last = piece[-1:]
        if error := exits.write(harmless(piece) if exits.is_terminal(sys.stdout) else piece):
            raise (
                BrokenPipeError
                if isinstance(error, BrokenPipeError)
                else EngineError(
                    f"stdout: {error.strerror}", "an output that takes the answer", "free some space, or choose another"
                )
            )

    def call(self, name: str, arguments: str) -> None:
        """As Screen says."""
        self.text(f"{'' if self._last == chr(10) else chr(10)}{name}({arguments})\n")

    def answered(self, figures: str, cut: str) -> None:
        """As Screen says."""
        if self._last != "\n":
            self.text("\n")
        if cut:
            exits.to_stderr(f"glimmer chat: {cut}")

    def note(self, line: str) -> None:
        """As Screen says."""
        exits.to_stderr(harmless(line))

    def error(self, text: str) -> None:
        """As Screen says."""
        exits.to_stderr(f"glimmer chat: {harmless(text)}")


class Terminal(Screen):
    """Markdown as it comes: whole blocks are printed, the one that still grows is drawn again and again."""

    def __init__(self, show_thinking: bool):
        self._console, self._show_thinking = Console(highlight=False), show_thinking
        self._live: Live | None = None
        self._thoughts, self._rest, self._since = "", "", 0.0

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """As Screen says."""
        with self._drawing(Spinner("dots", Text(what, style="dim"))):
            yield

    def ready(self) -> None:
        """As Screen says."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def welcome(self, model: str) -> None:
        """As Screen says."""
        self._console.print(
            f"[bold]{escape(harmless(model))}[/bold] [dim]· /help · Ctrl-C stops an answer · Ctrl-D ends[/dim]"
        )

    @contextmanager
    def _drawing(self, first: RenderableType) -> Iterator[None]:
        self._live = Live(first, console=self._console, refresh_per_second=FRAMES, transient=True)
        self._live.start()
        try:
            yield
        finally:
            if self._live is not None:
                self._live.stop()
            self._live = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """As Screen says."""
        self._thoughts, self._rest, self._since = "", "", time.monotonic()
        with self._drawing(Spinner("dots", Text("…", style="dim"))):
            try:
                yield
            finally:
                self._fold()
                rest, self._rest = self._rest, ""
                if self._live is not None:
                    self._live.update(Text(""))
                if rest.strip():
                    self._console.print(Markdown(rest))

    def thought(self, piece: str) -> None:
        """As Screen says."""
        self._thoughts += harmless(piece)
        if self._live is not None:
            last = self._thoughts if self._show_thinking else " ".join(self._thoughts[-3 * TAIL :].split())[-TAIL:]
            self._live.update(Spinner("dots", Text(f"thinking  {last}", style="dim italic")))

    def _fold(self) -> None:
        """The thoughts are complete: one line stays of them, or all if they shall be shown."""
        if not self._thoughts.strip():
            return
        thoughts, self._thoughts = self._thoughts, ""
        if self._show_thinking:
            self._console.print(Text(thoughts.strip(), style="dim italic"))
        seconds = time.monotonic() - self._since
        self._console.print(Text(f"▸ thought for {seconds:.1f} s; /thoughts shows it", style="dim"))

    def text(self, piece: str) -> None:
        """As Screen says."""
        self._fold()
        self._rest += harmless(piece)
        whole, self._rest = split_blocks(self._rest)
        if whole.strip():
            self._console.print(Markdown(whole))
            self._console.print()
        if self._live is not None:
            self._live.update(Markdown(self._rest))

    def call(self, name: str, arguments: str) -> None:
        """As Screen says."""
        shown = Syntax(harmless(arguments), "json", background_color="default", word_wrap=True)
        self._console.print(
            Panel(Group(shown), title=f"call of {escape(harmless(name))}", title_align="left", style="cyan")
        )

    def answered(self, figures: str, cut: str) -> None:
        """As Screen says."""
        said = "; ".join(part for part in (cut, figures) if part)
        self._console.print(Text(said, style="yellow" if cut else "dim"))

    def note(self, line: str) -> None:
        """As Screen says."""
        self._console.print(Text(harmless(line), style="dim"))

    def error(self, text: str) -> None:
        """As Screen says."""
        self._console.print(Text(harmless(text), style="red"))


def split_blocks(text: str) -> tuple[str, str]:
    """(whole blocks of Markdown, the rest): blocks end at an empty line that is not within a fenced block of code."""
    fence, end, at = "", 0, 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        bare = line.strip()
        if fence:
            fence = "" if bare.startswith(fence) and not bare.strip(fence[0]) else fence
        elif bare.startswith(("```", "~~~")):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
        elif not bare and line.endswith("\n"):
            end = at
    return text[:end], text[end:]


class History(FileHistory):
    """What was typed, in a file as long as that can be written."""

    def store_string(self, string: str) -> None:
        """Keep a line; where there is no space, say so once, and keep no more."""
        try:
            super().store_string(string)
        except OSError as error:
            exits.to_stderr(f"glimmer chat: what is typed is not kept: {self.filename!s}: {error.strerror}")
            self.filename = os.devnull


class Input:
    """Where the user types: Enter sends, Esc Enter begins a new line, a pasted text keeps its lines."""

    def __init__(self, history: Path, commands: Sequence[str]):
        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        completer = WordCompleter(list(commands), sentence=True)
        self._session: PromptSession[str] = PromptSession(
            history=History(str(history)), completer=completer, complete_while_typing=False, key_bindings=keys
        )

    def read(self, about: str) -> str:
        """What the user types. KeyboardInterrupt and EOFError as input() raises them."""
        return self._session.prompt(f"{harmless(about)}> " if about else "> ")
