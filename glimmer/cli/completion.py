"""What the shell may complete: commands, their options, and the values of options that have a few.

The shell runs `glimmer` with _ARGCOMPLETE in the environment; argcomplete answers from a parser of argparse, which is
made here from the options of the commands and serves for nothing else. Nothing here imports torch.
Switched on in bash or zsh by: eval "$(register-python-argcomplete glimmer)"
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import argcomplete
from argcomplete.completers import BaseCompleter, DirectoriesCompleter, FilesCompleter

from glimmer.cli import main
from glimmer.cli.options import Command, Flag, Option, path


def complete(line: str) -> None:
    """Write what may come next on this line to the file descriptor that the shell reads, and end the process."""
    argcomplete.autocomplete(parser(line), always_complete_options="long")


def parser(line: str = "") -> argparse.ArgumentParser:
    """All commands with their options, in the words of argparse. Of a command of two words, if the line begins so."""
    whole = argparse.ArgumentParser("glimmer")
    whole.add_argument("-V", "--version", action="store_true")
    commands = whole.add_subparsers()
    typed = " ".join(line.split()[1:3])
    for name, about in main.COMMANDS.items():
        if " " in name:
            continue
        longer = [other for other in main.COMMANDS if other.startswith(f"{name} ")]
        sub = commands.add_parser(name, help=about)
        if typed in longer:
            sub.add_argument("second", choices=[typed.rpartition(" ")[2]])
            _add_options(sub, typed)
        else:
            _add_options(sub, name, [other.rpartition(" ")[2] for other in longer])
    return whole


def _add_options(sub: argparse.ArgumentParser, name: str, second: Sequence[str] = ()) -> None:
    """The options of a command, and its words; second: words that make it another command."""
    command: Command = importlib.import_module(main.module(name)).COMMAND
    for key, option in command.own.items():
        _add(sub, command, key, option)
    for key in command.foreign.translated:
        if "." not in key and f"--{key}" in command.flags and key not in command.own:
            sub.add_argument(f"--{key}", nargs="*" if command.foreign.translated[key].several else None)
    _add_words(sub, command, second)


def _add(sub: argparse.ArgumentParser, command: Command, key: str, option: Option) -> None:
    ours = [name for name in option.flags if command.find(name) == Flag(key)]
    names = [f"--{key.replace('_', '-')}", *ours]
    if option.value == "":
        sub.add_argument(*names, action="store_true", help=option.help)
        if option.default == "True":
            sub.add_argument(f"--no-{key.replace('_', '-')}", *option.off, action="store_true", help=option.help)
        return
    action = sub.add_argument(*names, nargs="*" if option.several else None, help=option.help)
    if option.choices:
        action.choices = option.choices
    else:
        action.completer = _files(key, option)  # type: ignore[attr-defined]


def _add_words(sub: argparse.ArgumentParser, command: Command, second: Sequence[str]) -> None:
    """The words without a flag: prompts and prompt files, or the positional options; the first may be in `second`."""
    if command.positional is None:
        sub.add_argument("words", nargs="*").completer = FilesCompleter(["txt"])  # type: ignore[attr-defined]
        return
    for key in command.positional:
        action = sub.add_argument(f"word_{key}", nargs="?")
        action.completer = _WordsAnd(second, _files(key, command.own[key]))  # type: ignore[attr-defined]


def _files(key: str, option: Option) -> BaseCompleter:
    """The completer of an option without choices: directories, files, or nothing."""
    if option.kind is not path:
        return _Nothing()
    if option.value == "DIR":
        return DirectoriesCompleter()
    return FilesCompleter([option.value.rpartition(".")[2]] if "." in option.value else [])


class _WordsAnd(BaseCompleter):
    """Some words, and what another completer offers."""

    def __init__(self, words: Sequence[str], other: BaseCompleter):
        self._words, self._other = words, other

    def __call__(self, *, prefix: str, **others: Any) -> list[str]:
        return [*(word for word in self._words if word.startswith(prefix)), *self._other(prefix=prefix, **others)]


class _Nothing(BaseCompleter):
    """A number or a text: the shell has nothing to offer."""

    def __call__(self, **_: object) -> list[str]:
        return []
