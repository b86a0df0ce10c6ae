"""What APIs share that tell a conversation in blocks or items: messages in OpenAI's form are put together from these.

Thoughts, texts and calls of the assistant that follow one another are one message. A text may be sealed, so that a
client hands it back as it got it; it is no secret. Errors of the core are told in an API's own words. Not here: the
blocks and items themselves (anthropic_types.py, responses_types.py).
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from glimmer.errors import RequestError, shown
from glimmer.server.service import Events

Json = dict[str, Any]
SEAL = "glimmer."


class Turns:
    """A conversation as it is put together."""

    def __init__(self) -> None:
        self.messages: list[Json] = []

    def say(self, role: str, text: str) -> None:
        """A message of the system or of the user."""
        self.messages.append({"role": role, "content": text})

    def result(self, id: str, text: str) -> None:
        """What a tool has answered."""
        self.messages.append({"role": "tool", "tool_call_id": id, "content": text})

    def think(self, text: str) -> None:
        """Thoughts of the assistant."""
        message = self._assistant()
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def speak(self, text: str) -> None:
        """Text of the assistant."""
        self._assistant()["content"] += text

    def call(self, id: str, name: str, arguments: str | Json) -> None:
        """A call that the assistant made. arguments: a JSON object, or its text."""
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._assistant().setdefault("tool_calls", []).append(call)

    def _assistant(self) -> Json:
        """The message of the assistant that is being put together."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.say("assistant", "")
        return self.messages[-1]


def seal(text: str) -> str:
    """A text in a form that clients do not look into."""
    return SEAL + base64.urlsafe_b64encode(text.encode(errors="replace")).decode()


def unseal(sealed: object) -> str:
    """The text that was sealed; nothing for what another server has sealed."""
    if not isinstance(sealed, str) or not sealed.startswith(SEAL):
        return ""
    try:
        return base64.urlsafe_b64decode(sealed.removeprefix(SEAL).encode()).decode()
    except (binascii.Error, UnicodeError):
        return ""


def need(value: object, key: str, kind: type, at: str) -> Any:
    """value[key], a text, an object or a list as `kind` says, else RequestError. at: where `value` stands."""
    found = value.get(key) if isinstance(value, dict) else None
    if isinstance(found, kind):
        return found
    expected = "a text" if kind is str else "an object" if kind is dict else "a list"
    said = "absent" if found is None else shown(found)
    raise RequestError(f"{at}.{key}", f"{at}.{key} is {said}", expected, f"send {expected} as {at}.{key}")


def parts_of(content: object, at: str, text: str) -> Iterator[tuple[Json, str]]:
    """The parts of a content, and where each stands; a text alone is a part of type `text`."""
    if isinstance(content, str):
        yield {"type": text, "text": content}, at
        return
    if not isinstance(content, list):
        raise RequestError(at, f"{at} is {shown(content)}", "a text, or a list of parts", f"correct {at}")
    for i, part in enumerate(content):
        need(part, "type", str, f"{at}[{i}]")
        yield part, f"{at}[{i}]"


def texts_of(content: object, at: str, kinds: Sequence[str]) -> list[str]:
    """The texts of a content that holds nothing else. The first of `kinds` is what a text alone is."""
    texts = []
    for part, place in parts_of(content, at, kinds[0]):
        if part["type"] not in kinds:
            raise unknown(part, place, kinds)
        texts.append(need(part, "refusal" if part["type"] == "refusal" else "text", str, place))
    return texts


def unknown(part: Json, at: str, kinds: Sequence[str]) -> RequestError:
    """The error for a part that the models cannot read."""
    return RequestError(
        f"{at}.type",
        f"{at} is of type {shown(part['type'])}",
        f"{' or '.join(kinds)}: the models read text, and calls of the tools that a request describes",
        "leave it out, or send what it says as text",
    )


Words = Callable[[str], str]


def words(names: Mapping[str, str | Callable[[re.Match[str]], str]]) -> Words:
    """A translation of names: expressions and what stands in their place."""
    expressions = [(re.compile(expression), name) for expression, name in names.items()]

    def translate(text: str) -> str:
        for expression, name in expressions:
            text = expression.sub(name, text)
        return text

    return translate


@contextmanager
def told_in(words: Words) -> Iterator[None]:
    """RequestErrors name fields as an API does."""
    try:
        yield
    except RequestError as error:
        raise type(error)(words(error.field), words(error.found), words(error.expected), words(error.todo)) from None


async def events_in(words: Words, events: Events) -> Events:
    """The same events, with errors that name fields as an API does."""
    async with aclosing(events):
        with told_in(words):
            async for event in events:
                yield event
