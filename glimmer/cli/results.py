"""Prompts as they are read from files, and results as they are written to files.

One prompt is one row: index, prompt, text, prompt_tokens, completion_tokens, finish_reason, error (None, or why there
is no answer), made_by (the model and the settings that made it). Prompts come from texts, from .txt and .jsonl files
and from stdin; rows go to a .jsonl file, each safe on disk before the next is waited for, so that a run which is cut
off at any moment can be continued. Not here: how an answer comes about.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glimmer.cli.options import locate
from glimmer.cli.row_file import RowFile, encode
from glimmer.errors import ConfigError, GlimmerError
from glimmer.foreign import parse_json, read_text, typed_text

if TYPE_CHECKING:
    from glimmer.outputs import CompletionOutput, RequestOutput

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a conversation

STREAMS = re.compile(r"-|/dev/stdin|/dev/fd/[0-9]{1,4}")  # read to their end, as a .txt or a .jsonl file
MAX_PROMPT_FILE = 1 << 30  # bytes of a file of prompts


# ---------------------------------------------------------------------- prompts


def read_prompts(
    data: Sequence[str],
    prompts: Sequence[str],
    home: Path | None,
    literal: Sequence[str] = (),
    say: Callable[[str], object] = lambda line: None,
) -> list[Prompt]:
    """All prompts, in order: those of `data`, of `prompts`, and `literal`, which name no files.

    A .txt file has one prompt a line; there, and in `data`, \\n is a new line and \\\\n a backslash and an n. Empty
    lines are prompts too (rows and lines keep step), except at the end. A .jsonl file has {"prompt": text} or
    {"messages": [...]} in each line. `-` and /dev/stdin are read as .txt files are, or as .jsonl files if their first
    line is one of those objects. What ends in .txt or .jsonl is a
    file; a text with spaces of which there is no such file is a prompt, and `say` tells of either.
    Raises ConfigError: no such file, not text, no prompt at all.
    """
    found: list[Prompt] = []
    for value, escaped in [(value, True) for value in data] + [(value, False) for value in prompts]:
        read = _from_file(value, home, say)
        found += [_unescaped(_typed(value)) if escaped else _typed(value)] if read is None else read
    found += map(_typed, literal)
    if not found:
        raise ConfigError(
            "no prompt",
            "a text, several texts, or a .txt or .jsonl file with one a line",
            'e.g. glimmer predict "请介绍一下北京", or --predict_data prompts.txt',
        )
    return found


def _typed(prompt: str) -> str:
    try:
        return typed_text(prompt)
    except ValueError:
        raise ConfigError(f"prompt {prompt!a:.80}", "text in UTF-8", "check the terminal's encoding") from None


def _unescaped(line: str) -> str:
    """\\n as a new line; another backslash before it keeps it as it is."""
    return re.sub(r"(\\?)\\n", lambda found: "\\n" if found[1] else "\n", line)


def is_prompt_file(value: str) -> bool:
    """Whether a word is the name of a file that is read as prompts, rather than a prompt."""
    return STREAMS.fullmatch(value) is not None or value.endswith((".txt", ".jsonl"))


def _from_file(value: str, home: Path | None, say: Callable[[str], object]) -> list[Prompt] | None:
    """The prompts of a file; None where `value` is a prompt itself."""
    if STREAMS.fullmatch(value):
        content, name = _read(value, regular=False), "stdin" if value == "-" else value
        try:
            as_records = _prompt_of(parse_json(content.partition("\n")[0])) is not None
        except ValueError:
            as_records = False
        if as_records:
            say(f"each line of {name} is read as a line of a .jsonl file, as the first one is")
        return [*(_records if as_records else _lines)(content, name)]
    if not is_prompt_file(value) or len(value) > 1000 or "\n" in value:
        return None
    file = str(locate(value, home))
    path_like = value.startswith(("/", "~", "./", "../")) or os.path.isdir(os.path.dirname(value))
    if not os.path.lexists(file) and re.search(r"\s", value) and not path_like:
        say(f"{value!r:.80} is taken as a prompt: there is no file of that name")
        return None
    content = _read(file, regular=True)
    found: list[Prompt] = [*(_records if value.endswith(".jsonl") else _lines)(content, file)]
    say(f"{len(found)} prompt{'s' * (len(found) > 1)} from {file}")
    return found


def _read(name: str, regular: bool) -> str:
    """The text of a file, or of what stdin and the shell's <(...) are."""
    what = f"prompt file {name!r}" if name != "-" else "prompts from stdin"
    hint = "; a prompt that ends like a file's name is written after a lone --" if regular else ""

    def refused(found: str, expected: str, todo: str) -> ConfigError:
        return ConfigError(f"prompts: {found}", expected, todo + hint)

    try:
        descriptor = None if regular else os.dup(0) if name == "-" else os.open(name, os.O_RDONLY)
        text = read_text(Path("stdin" if name == "-" else name), MAX_PROMPT_FILE, refused, "utf-8-sig", descriptor)
    except OSError as error:
        raise ConfigError(
            f"{what}: {error.strerror}",
            "a text file in UTF-8 with one prompt a line",
            f"check the path{hint}",
        ) from None
    if not text.strip():
        raise ConfigError(f"{what} is empty", "one prompt a line", "write some")
    return text.replace("\r\n", "\n")


def _lines(content: str, name: str) -> list[Prompt]:
    return [_unescaped(line) for line in content.rstrip().split("\n")]


def _records(content: str, name: str) -> Iterator[Prompt]:
    """The prompts of a .jsonl file."""
    for n, line in enumerate(content.rstrip().split("\n"), 1):
        reason = ""
        try:
            prompt = _prompt_of(parse_json(line))
        except ValueError as error:
            prompt, reason = None, f" ({error!s:.120})"
        if prompt is None:
            raise ConfigError(
                f"{name} line {n}: {line:.80}{reason}",
                '{"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}, ...]}, and no other key',
                "correct the line; sampling is set for all prompts together, by options",
            )
        yield prompt


def _prompt_of(record: Any) -> Prompt | None:
    """The prompt in a line's object; None if there is anything else in it."""
    kind, prompt = next(iter(record.items())) if isinstance(record, dict) and len(record) == 1 else ("", None)
    if kind == "prompt" and isinstance(prompt, str):
        return prompt
    if kind == "messages" and isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return prompt or None
    return None


# ---------------------------------------------------------------------- rows


def row(index: int, prompt: Prompt, output: "RequestOutput | None", error: GlimmerError | None) -> dict[str, Any]:
    """What is kept of one prompt. `outputs` has all answers where there are several, logprobs where they are wanted."""
    answers = output.outputs if output is not None else []
    first = answers[0] if answers else None
    kept: dict[str, Any] = {
        "index": index,
        "prompt": prompt,
        "text": first.text if first else "",
        "prompt_tokens": len(output.prompt_token_ids) if output is not None else 0,
        "completion_tokens": len(first.token_ids) if first else 0,
        "finish_reason": first.finish_reason if first else "error",
        "error": None if error is None else f"{error.found}; expected: {error.expected}; to do: {error.todo}",
    }
    if first is not None and first.logprobs is not None:
        kept["logprobs"] = _logprobs(first)
    if len(answers) > 1:
        kept["outputs"] = [
            {"text": one.text, "completion_tokens": len(one.token_ids), "finish_reason": one.finish_reason}
            | ({} if one.logprobs is None else {"logprobs": _logprobs(one)})
            for one in answers
        ]
    return kept


def _logprobs(answer: "CompletionOutput") -> list[list[dict[str, Any]]]:
    """For each token of an answer: itself, then the likeliest ones."""
    return [
        [
            {"token_id": id, "token": one.decoded_token, "logprob": one.logprob, "rank": one.rank}
            for id, one in sorted(place.items(), key=lambda item: item[0] != chosen)
        ]
        for chosen, place in zip(answer.token_ids, answer.logprobs or ())
    ]


class Results:
    """The answers so far, {index: row}, and the file that keeps them, if there is one.

    made_by: what rows are made by, in JSON's types; it is kept with each row. The file is locked while this is open.
    Rows without an answer are dropped from a file that is resumed: their prompts are tried again.
    Raises ConfigError where the file holds rows of other prompts or made by something else, is in use, is no regular
    file, or cannot be written.
    """

    def __init__(
        self, prompts: Sequence[Prompt], path: Path | None, resume: bool, made_by: Mapping[str, Any] | None = None
    ):
        self.prompts, self.made_by = prompts, dict(made_by or {})
        self.rows: dict[int, dict[str, Any]] = {}
        self.path = path
        self.file = None if path is None else RowFile(path, resume)
        if self.file is not None:
            self._load(self.file)

    def close(self) -> None:
        """Give the file free for others."""
        if self.file is not None:
            self.file.close()

    @property
    def todo(self) -> list[int]:
        """Indices of the prompts that have no row."""
        return [i for i in range(len(self.prompts)) if i not in self.rows]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row: it counts when it is on disk, and a row of which only a part fitted is taken back."""
        if self.made_by:
            row = row | {"made_by": self.made_by}
        if self.file is None:
            self.rows[row["index"]] = row
            return
        size = self.file.size + len(encode(row))
        try:
            self.file.add(row)
        finally:  # Ctrl-C may come between the row and whoever counts it
            if self.file.size == size:
                self.rows[row["index"]] = row

    def _load(self, file: RowFile) -> None:
        """Take what an interrupted run has left; a last line that it did not finish is left out."""
        lines, last = file.read()
        for n, line in enumerate(lines, 1):
            if not self._take(line, n):
                raise ConfigError(
                    f"--output {self.path} line {n} is no row of results",
                    "rows that this command wrote",
                    "correct the line, or choose another file",
                )
        if last and self._take(last, len(lines) + 1):
            lines.append(last)
        answered = [line for line in lines if json.loads(line)["error"] is None]
        if last or len(answered) < len(lines):
            self.rows = {index: row for index, row in self.rows.items() if row["error"] is None}
            file.replace(answered)

    def _take(self, line: bytes, n: int) -> bool:
        """Keep the row in line n; False if it is none. ConfigError if it belongs to another prompt or run."""
        try:
            row = parse_json(line)
            index, prompt = row["index"], row["prompt"]
            row["text"], row["error"]
        except (ValueError, KeyError, TypeError):
            return False
        now = self.prompts[index] if isinstance(index, int) and index in range(len(self.prompts)) else None
        if now != prompt:
            raise ConfigError(
                f"--output {self.path} line {n} answers prompt {index}, {prompt!r:.60}; that prompt is now {now!r:.60}",
                "the prompts with which the file was begun",
                "give those, or choose another file",
            )
        made_by = row.get("made_by", {})
        if row["error"] is None and made_by != self.made_by:
            raise ConfigError(
                f"--output {self.path} line {n} was made with {_difference(made_by, self.made_by)}",
                "rows of one file to be made by one model with the same settings",
                "give those with which the file was begun, or choose another file",
            )
        self.rows[index] = row
        return True


def _difference(then: Any, now: Mapping[str, Any]) -> str:
    """What differs between two makers, in words."""
    if not isinstance(then, dict) or not then:
        return "a model and settings that it does not name"
    none = "the default"
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    said = [f"{name} {then.get(name, none)!s:.60}, which is now {now.get(name, none)!s:.60}" for name in names]
    return "; ".join(said)


def save(file: Path, content: str) -> None:
    """Write a file so that it is there wholly or not at all. ConfigError if it cannot be written, or is no file."""
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():  # a device would be replaced
        raise ConfigError(f"{file} is no regular file", "a file to write", "choose another name")
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        try:
            with part.open("w", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}",
            "a directory that can be written, and space on its disk",
            "choose another directory (predict writes to the current one; its --output keeps answers elsewhere)",
        ) from None
