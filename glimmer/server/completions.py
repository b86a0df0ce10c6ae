"""OpenAI's completions: a text, or token ids, to be continued; and the tokens of a text. It translates only.

A request may hold several prompts: each is a request of its own for the engine, and the answers' numbers run on. Not
here: chat (openai.py), what the fields may be (openai_types.py).
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimmer.errors import RequestError, shown
from glimmer.server.answer import Delta, Finished, Place
from glimmer.server.exchange import EventStream, begun, chunks_of, convert, json_response, read_request, until_gone
from glimmer.server.openai import (
    LOWEST,
    Chunk,
    Head,
    UsageSoFar,
    sampling_params,
    structured_outputs,
    usage_of,
    usage_wanted,
)
from glimmer.server.openai_types import CompletionBody, DetokenizeBody, TokenizeBody, refuse_unsupported
from glimmer.server.service import HUGE, ChatRequest, CompletionRequest, Done, Events, Service, Started, Usage

router = APIRouter()

MAX_PROMPTS = 1024  # in one request; and answers
MAX_TOKENS = 16  # of an answer, where nobody says otherwise: OpenAI's default


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    service: Service = request.app.state.service

    def read(raw: Chunk) -> tuple[CompletionBody, list[CompletionRequest]]:
        refuse_unsupported(raw, "/v1/completions")
        body = convert(raw, CompletionBody)
        return body, completion_requests(body, service)

    body, asked = await read_request(request, service, read)
    events = _together([service.complete(one) for one in asked], body.n or 1)
    texts = _texts(body, len(asked))
    head = Head("cmpl", "text_completion", service)
    if body.stream:
        return EventStream(chunks_of(_chunks(await begun(events), head, body, texts)), service)
    return json_response(await until_gone(request, _answer(events, head, body, texts)))


def completion_requests(body: CompletionBody, service: Service) -> list[CompletionRequest]:
    """What a body asks for, a request for each prompt. RequestError names the field at fault."""
    prompts = _prompts(body)
    most = service.config.max_logprobs
    if body.logprobs is not None and not 0 <= body.logprobs <= most:
        found = f"logprobs={shown(body.logprobs)}"
        raise RequestError("logprobs", found, f"a number from 0 to {most}", "lower logprobs")
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        found = f"n={body.n} for {len(prompts)} prompts"
        raise RequestError("n", found, f"at most {MAX_PROMPTS} answers", "send several requests")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens", "max_tokens=0", "at least 1; 0 only with echo", "raise max_tokens")
    if body.echo and body.logprobs is not None and (body.n or 1) > 1:
        raise RequestError("n", f"n={body.n} with echo and logprobs", "1", "leave one of them out")
    limit = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = sampling_params(
        body,
        service,
        max_tokens=max(limit, 1) if body.echo else limit,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    salt, special = body.cache_salt or "", body.add_special_tokens is not False
    form = structured_outputs(body)[1]
    return [
        CompletionRequest(prompt=one, params=params, add_special_tokens=special, cache_salt=salt, form_field=form)
        for one in prompts
    ]


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts of a body: it may have one or several, each a text or token ids."""
    is_id = lambda value: isinstance(value, int) and not isinstance(value, bool)
    given = body.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and all(map(is_id, given))) else given
    if len(prompts) > MAX_PROMPTS:
        raise RequestError("prompt", f"{len(prompts)} prompts", f"at most {MAX_PROMPTS}", "send several requests")
    if not prompts or not all(
        isinstance(one, str) or (isinstance(one, list) and all(map(is_id, one))) for one in prompts
    ):
        accepted = "a text, a list of token ids, or a list of such"
        raise RequestError("prompt", f"prompt={shown(given)}", accepted, "send one of these as prompt")
    if not all(prompts):
        raise RequestError("prompt", "an empty prompt", "at least one token", "give the model a text to continue")
    return prompts


async def _together(several: Sequence[Events], n: int) -> Events:
    """The events of several requests, with their answers' numbers running on; at the end one Done."""
    if len(several) == 1:
        async with aclosing(several[0]):
            async for event in several[0]:
                yield event
        return
    coming = {asyncio.ensure_future(anext(events)): number for number, events in enumerate(several)}
    usages: list[Usage] = []
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = coming.pop(task)
                event = task.result()
                if isinstance(event, Done):
                    usages.append(event.usage)
                    continue
                coming[asyncio.ensure_future(anext(several[number]))] = number
                yield replace(event, index=number * n + event.index)
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for events in several:
            await events.aclose()
    yield Done(
        Usage(
            sum(one.prompt_tokens for one in usages),
            sum(one.cached_tokens for one in usages),
            sum(one.completion_tokens for one in usages),
            sum(one.reasoning_tokens for one in usages),
        )
    )


@dataclass
class _Text:
    """What an answer has said so far, as far as log-probabilities need it, and what of it has not been told."""

    echo: bool
    only_prompt: bool
    most: int | None  # log-probabilities of a token
    length: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def begin(self, started: Started, service: Service) -> str:
        """The prompt is known: its text, if it shall be echoed."""
        if not self.echo:
            return ""
        if self.most is not None:  # nothing predicts the first token
            first = service.tokenizer.token_bytes(started.prompt_token_ids[0]).decode(errors="replace")
            self._add(first, None, None)
        return started.prompt

    def take(self, delta: Delta) -> str:
        """A piece of the answer: its text."""
        for place in delta.prompt_logprobs:
            self._place(place)
        if self.only_prompt:
            return ""
        for place in delta.logprobs:
            self._place(place)
        return delta.text

    def logprobs(self) -> Chunk | None:
        """The log-probabilities that have not been told yet."""
        if self.most is None:
            return None
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        told: Chunk = {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, [])
        return told

    def _place(self, place: Place) -> None:
        if self.most is not None:
            own = place[0]
            top = {one.text: max(one.logprob, LOWEST) for one in place if one is own or one.rank <= self.most}
            self._add(own.text, max(own.logprob, LOWEST), top)

    def _add(self, token: str, logprob: float | None, top: dict[str, float] | None) -> None:
        self.tokens.append(token)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(self.length)
        self.length += len(token)


def _texts(body: CompletionBody, prompts: int) -> list[_Text]:
    echo, answers = bool(body.echo), prompts * (body.n or 1)
    return [_Text(echo, echo and body.max_tokens == 0, body.logprobs) for _ in range(answers)]


def _counted(usage: Usage, body: CompletionBody) -> Chunk:
    return usage_of(replace(usage, completion_tokens=0) if body.max_tokens == 0 else usage)


async def _chunks(events: Events, head: Head, body: CompletionBody, texts: list[_Text]) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stream."""
    so_far = UsageSoFar(body)
    n = body.n or 1
    async with aclosing(events):
        async for event in events:
            others = so_far.after(event)
            if isinstance(event, Started):
                for index in range(event.index, event.index + n):
                    if text := texts[index].begin(event, head.service):
                        yield head([_choice(index, text, texts[index].logprobs())], **others)
            elif isinstance(event, Delta):
                text = texts[event.index].take(event)
                logprobs = texts[event.index].logprobs()
                # A token whose text is not complete (half a character, the beginning of a stop string) is a chunk with
                # an empty text, as in vLLM: programs that measure a server take the chunks for steps.
                tokens = event.token_ids and not texts[event.index].only_prompt
                if text or tokens or (logprobs and logprobs["tokens"]):
                    yield head([_choice(event.index, text, logprobs)], **others)
            elif isinstance(event, Finished):
                yield head([_choice(event.index, "", None, event)], **others)
            elif usage_wanted(body):
                yield head([], usage=_counted(event.usage, body))


async def _answer(events: Events, head: Head, body: CompletionBody, texts: list[_Text]) -> Chunk:
    """The whole response."""
    n = body.n or 1
    said: list[list[str]] = [[] for _ in texts]
    finished: dict[int, Finished] = {}
    usage: Chunk = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Started):
                for index in range(event.index, event.index + n):
                    said[index].append(texts[index].begin(event, head.service))
            elif isinstance(event, Delta):
                said[event.index].append(texts[event.index].take(event))
            elif isinstance(event, Finished):
                finished[event.index] = event
            else:
                usage = _counted(event.usage, body)
    choices = [_choice(i, "".join(said[i]), texts[i].logprobs(), finished[i]) for i in range(len(texts))]
    return head(choices, usage=usage)


def _choice(index: int, text: str, logprobs: Chunk | None, finished: Finished | None = None) -> Chunk:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finished and finished.reason}
    return choice | ({"stop_reason": finished.stop_reason} if finished else {})


# ---------------------------------------------------------------------- tokens


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of the prompt that a conversation becomes."""
    service: Service = request.app.state.service
    body = await read_request(request, service, lambda raw: convert(raw, TokenizeBody))
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt", "both or none of prompt and messages", "one of them", "send one of them")
    if body.messages is not None:
        continues = bool(body.continue_final_message)
        chat = ChatRequest(
            messages=body.messages,
            params=sampling_params(body, service, max_tokens=None, logprobs=None),
            tools=body.tools or None,
            chat_template_kwargs=body.chat_template_kwargs or {},
            add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continues,
        )
        _, ids = await service.render(chat)
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
        ids = await service.in_thread(lambda: service.tokenizer.encode(text, special), len(text) > HUGE)
    names = [service.tokenizer.id_to_token(id) for id in ids] if body.return_token_strs else None
    return json_response(
        {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": names}
    )


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids, control tokens among it."""
    service: Service = request.app.state.service
    body = await read_request(request, service, lambda raw: convert(raw, DetokenizeBody))
    decode = lambda: service.tokenizer.decode(body.tokens, False)
    return json_response({"prompt": await service.in_thread(decode, len(body.tokens) > HUGE)})
