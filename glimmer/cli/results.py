"""Prompts as they are read from files, and results as they are written to files.

One prompt is one row: index, prompt, text, prompt_tokens, completion_tokens, finish_reason, error (None, or why there
is no answer). Prompts come from texts and .txt files; rows go to a .jsonl file, each safe on disk before the next is
waited for, so that a run which is cut off at any moment can be continued. Not here: how an answer comes about.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from glimmer.cli.options import locate
from glimmer.errors import ConfigError, GlimmerError

if TYPE_CHECKING:
    from glimmer.llm import RequestOutput


def read_prompts(data: list[str], prompts: list[str], home: Path | None) -> list[str]:
    """All prompts, in order. A .txt file has one a line; there, and in `data`, \\n means a new line.

    Empty lines are prompts too (rows and lines keep step), except at the end of a file. What ends in .txt is a file,
    unless it has spaces and there is no such file. Raises ConfigError: no such file, not text, no prompt at all.
    """
    found: list[str] = []
    for value, escaped in [(value, True) for value in data] + [(value, False) for value in prompts]:
        file = locate(value, home) if value.endswith(".txt") and len(value) < 1000 else None
        if file is not None and (file.is_file() or not re.search(r"\s", value)):
            found += [line.replace("\\n", "\n") for line in _lines(file)]
        else:
            found.append(value.replace("\\n", "\n") if escaped else value)
    for prompt in found:
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ConfigError(
                f"prompt {prompt:.40}".encode("ascii", "backslashreplace").decode(),
                "text in UTF-8",
                "check the terminal's encoding",
            )
    if not found:
        raise ConfigError(
            "no prompt",
            "a text, several texts, or a .txt file with one a line",
            'e.g. glimmer predict "请介绍一下北京", or --predict_data prompts.txt',
        )
    return found


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except OSError as error:
        raise ConfigError(
            f"prompt file {str(file)!r}: {error.strerror}",
            "a text file in UTF-8 with one prompt a line",
            "check the path; a question that ends in .txt needs a space in it",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"prompt file {str(file)!r}: {error}", "a text file in UTF-8 with one prompt a line", "save it in UTF-8"
        ) from None
    if lines == [""]:
        raise ConfigError(f"prompt file {str(file)!r} is empty", "one prompt a line", "write some")
    return lines


def row(index: int, prompt: str, output: "RequestOutput | None", error: GlimmerError | None) -> dict[str, Any]:
    """What is kept of one prompt."""
    answer = output.outputs[0] if output is not None and output.outputs else None
    return {
        "index": index,
        "prompt": prompt,
        "text": answer.text if answer else "",
        "prompt_tokens": len(output.prompt_token_ids) if output is not None else 0,
        "completion_tokens": len(answer.token_ids) if answer else 0,
        "finish_reason": answer.finish_reason if answer else "error",
        "error": None if error is None else f"{error.found}; expected: {error.expected}; to do: {error.todo}",
    }


class Results:
    """The answers so far, {index: row}, and the file that keeps them, if there is one.

    Raises ConfigError where the file holds other rows than these prompts', or cannot be written.
    """

    def __init__(self, prompts: list[str], path: Path | None, resume: bool):
        self.prompts, self.path = prompts, path
        self.file: BinaryIO | None = None
        self.rows: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        if not resume and path.is_file() and path.stat().st_size:
            raise ConfigError(
                f"--output {path} is there already", "a new file", "add --resume to continue it, or choose another name"
            )
        try:
            self.file = path.open("a+b")
            self._load(self.file)
        except OSError as error:
            raise ConfigError(f"--output {path}: {error.strerror}", "a file to write to", "check the path") from None

    @property
    def todo(self) -> list[int]:
        """Indices of the prompts that have no row."""
        return [i for i in range(len(self.prompts)) if i not in self.rows]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[row["index"]] = row
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise ConfigError(
                f"--output {self.path}: {error.strerror}",
                "space on the disk for a row",
                "free some space; the same command with --resume answers the rest",
            ) from None

    def _load(self, file: BinaryIO) -> None:
        """Take what an interrupted run has left; a last line that it did not finish is cut off."""
        file.seek(0)
        *lines, last = file.read().split(b"\n")
        for n, line in enumerate(lines, 1):
            if not self._take(line, n):
                raise ConfigError(
                    f"--output {self.path} line {n} is no row of results",
                    "rows that this command wrote",
                    "correct the line, or choose another file",
                )
        if last and self._take(last, len(lines) + 1):
            file.write(b"\n")
            file.flush()
        elif last:
            file.truncate(file.tell() - len(last))

    def _take(self, line: bytes, n: int) -> bool:
        """Keep the row in line n; False if it is none. ConfigError if it belongs to another prompt."""
        try:
            row = json.loads(line)
            index, prompt = row["index"], row["prompt"]
            row["text"], row["error"]
        except (ValueError, KeyError, TypeError):
            return False
        now = self.prompts[index] if index in range(len(self.prompts)) else None
        if now != prompt:
            raise ConfigError(
                f"--output {self.path} line {n} answers prompt {index}, {prompt!r:.60}; that prompt is now {now!r:.60}",
                "the prompts with which the file was begun",
                "give those, or choose another file",
            )
        self.rows[index] = row
        return True


def save(file: Path, content: str) -> None:
    """Write a file so that it is there wholly or not at all. ConfigError if it cannot be written."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        raise ConfigError(
            f"{file.absolute()}: {error.strerror}",
            "a directory that can be written",
            "start the command from another directory; --output keeps answers elsewhere",
        ) from None
