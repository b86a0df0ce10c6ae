"""Engine: requests in, tokens out, any number at once. `step` is the whole of one step.

All ranks of a group run the same engine on the same requests; they decide alike, and rank 0's tokens count.
Token ids only: text, stop strings and prompts as strings belong to llm.py. One thread calls an engine: see loop.py.
"""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from glimmer.batch import Batch
from glimmer.config import EngineConfig
from glimmer.engine.blocks import Blocks
from glimmer.engine.disk_cache import BlockIO, BlockRows, DiskCache
from glimmer.engine.sampler import Sampler
from glimmer.engine.scheduler import Scheduler
from glimmer.engine.sequence import Constraint, Logprob, Output, Request, SamplerOutput, Sequence, Step, failure
from glimmer.engine.stats import Stats
from glimmer.errors import EngineError, RequestError, shown
from glimmer.group import Group

log = logging.getLogger("glimmer")


class CacheSize(Protocol):
    """How much the cache holds, and the longest sequence that it and the model allow."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...


class StepRunner(BlockIO, Protocol):
    """What computes a step: engine/runner.py, or a scripted one in tests."""

    @property
    def kv_cache_config(self) -> CacheSize: ...

    def running(self) -> AbstractContextManager[None]:
        """The time in which steps are computed: torch's threads are those that the backend wants."""

    def batch(self, step: Step) -> Batch:
        """The step as tensors."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Hidden states (T, H) of all rows, and logits (R, V) of those that the batch wants; None if it wants none."""

    def forbid(self, logits: Tensor, allowed: Tensor) -> None:
        """logits (N, V) = -infinity at id i where bit i % 8 of byte i // 8 of allowed (N, V/8 or more) is 0."""


class Drafter(BlockRows, Protocol):
    """What guesses the tokens that come next. lookahead: see Scheduler."""

    @property
    def lookahead(self) -> int: ...

    def choose(self, outputs: list[SamplerOutput], step: Step, seconds: float) -> int | None:
        """How many tokens to guess for each sequence after a step; asked on rank 0, whose answer is every rank's.

        0: none, but what later guesses need is computed; draft.KEEP: it is kept for the time when guesses are wanted;
        None: neither. seconds: from the step's beginning to its outputs.
        """

    def propose(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step, count: int | None) -> None:
        """Set `drafts` of the step's sequences: at most `count` guesses of what follows the tokens of their outputs.

        hidden: (T, H), the hidden states of the step's rows. Called after each step, before update() appends the
        outputs' tokens to the sequences. On several ranks, every rank must propose the same.
        """


class Clock:
    """Told when a step begins, when a part of it is over, and when it ends; profile.py has one that measures."""

    def begin(self) -> None:
        """A step begins."""

    def lap(self, part: str) -> None:
        """What has been done since the last call was `part`."""

    def end(self) -> None:
        """A step is over."""


class Engine:
    """vocab_size: ids that a prompt may hold; sampling_vocab_size: ids that may be sampled, from 0 on."""

    def __init__(
        self,
        config: EngineConfig,
        runner: StepRunner,
        group: Group,
        vocab_size: int,
        sampling_vocab_size: int,
        drafter: Drafter | None = None,
    ):
        self.runner, self.group, self.vocab_size, self.drafter = runner, group, vocab_size, drafter
        self.max_model_len = runner.kv_cache_config.max_model_len
        blocks = Blocks(runner.kv_cache_config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(blocks, config.max_num_batched_tokens, config.max_num_seqs)
        self.scheduler.lookahead = 0 if drafter is None else drafter.lookahead
        if config.kv_cache_dir is not None:
            limit = config.kv_cache_size_bytes
            self.scheduler.disk = DiskCache(Path(config.kv_cache_dir), limit, runner, blocks, group, drafter)
        self.sampler = Sampler(sampling_vocab_size, runner.forbid)
        self.clock = Clock()
        self.stats = Stats()

    @property
    def busy(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.scheduler.reading)

    @property
    def disk(self) -> DiskCache | None:
        """Blocks on disk, if there are any."""
        return self.scheduler.disk

    def close(self) -> None:
        """Nothing more will be asked: end what runs in other threads, and write what waits to be written."""
        if self.disk is not None:
            self.disk.close()

    def check(self, request: Request) -> None:
        """RequestError, with the field's name, if this engine cannot serve the request. Any thread may call this."""
        length, params = len(request.prompt_token_ids), request.params
        if length == 0:
            raise RequestError("prompt", "an empty prompt", "at least one token", "give the model a text to continue")
        if length >= self.max_model_len:
            raise RequestError(
                "prompt",
                f"a prompt of {length} tokens",
                f"at most {self.max_model_len - 1}: the context of {self.max_model_len} tokens holds prompt and answer",
                "shorten the prompt, or raise max_model_len if model and memory allow it",
            )
        for field, ids in (
            ("prompt", request.prompt_token_ids),
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids),
            ("stop_token_ids", params.stop_token_ids),
        ):
            sampled = field in ("logit_bias", "allowed_token_ids")
            limit = self.sampler.sampling_vocab_size if sampled else self.vocab_size
            if ids and not 0 <= min(ids) <= max(ids) < limit:
                found = f"token id {shown(min(ids) if min(ids) < 0 else max(ids))} in {field}"
                raise RequestError(field, found, f"ids from 0 to {limit - 1}", "remove that id")

    def add(self, request: Request, constraint: Constraint | None = None) -> None:
        """Queue a request; RequestError as `check`."""
        self.check(request)
        limit = self.max_model_len
        if request.params.max_tokens is not None:
            limit = min(limit, len(request.prompt_token_ids) + request.params.max_tokens)
        self.scheduler.add(Sequence(request, limit, constraint))

    def abort(self, request_id: str) -> bool:
        """Forget a request, whatever its state; False if it is not here any more. Nothing is said about it again."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Advance every running sequence by one step; return what became known.

        What fails in the step ends the step's own sequences, with the reason. EngineError where other ranks take part:
        how far they have come is not known.
        """
        clock, begin = self.clock, perf_counter()
        clock.begin()
        step = self.scheduler.schedule()  # who computes which tokens
        if not step.chunks:
            if self.disk is not None:
                self.disk.wait()
            return []
        try:
            batch = self.runner.batch(step)  # the same, as tensors
            clock.lap("scheduler, batch")
            hidden, logits = self.runner.forward(batch)  # the model
            clock.lap("model")
            sampled = self._sample(logits, step)  # a list of tokens for each sequence that is up to date
            count = None
            if self.drafter is not None and self.group.rank == 0:
                count = self.drafter.choose(sampled, step, perf_counter() - begin)
            sampled, count = self._agree(sampled, count)
            self.stats.count(step, sampled)
            clock.lap("sampler")
            if self.drafter is not None:
                self.drafter.propose(hidden, sampled, step, count)  # what may follow them
                clock.lap("drafter")
        except Exception as error:
            log.debug("a step failed", exc_info=error)
            if self.group.size > 1:
                raise
            sampled = [SamplerOutput(problem=failure("a step", error)) for _ in step.chunks]
        outputs = self.scheduler.update(step, sampled)  # blocks, stops, outputs
        clock.lap("scheduler, batch")
        clock.end()
        return outputs

    def _sample(self, logits: Tensor | None, step: Step) -> list[SamplerOutput]:
        """What rank 0 samples; nothing on other ranks."""
        return self.sampler.sample(logits, step) if self.group.rank == 0 else []

    def _agree(self, outputs: list[SamplerOutput], count: int | None) -> tuple[list[SamplerOutput], int | None]:
        """Rank 0's outputs, and its number of drafts, on every rank."""
        if self.group.size == 1:
            return outputs, count
        told, count = self.group.broadcast([[_to_json(output) for output in outputs], count])
        return [_from_json(output) for output in told], count


def _to_json(output: SamplerOutput) -> list[Any]:
    logprobs = [
        [[(id, found.logprob, found.rank) for id, found in place.items()] for place in places]
        for places in (output.logprobs, output.prompt_logprobs)
    ]
    problem = output.problem
    field = problem.field if isinstance(problem, RequestError) else None
    return [output.tokens, problem and (field, *problem.args), *logprobs]


def _from_json(output: list[Any]) -> SamplerOutput:
    tokens, told, *logprobs = output
    places = [tuple({id: Logprob(*found) for id, *found in place} for place in places) for places in logprobs]
    problem = told and (EngineError(*told[1:]) if told[0] is None else RequestError(*told))
    return SamplerOutput(tuple(tokens), problem, *places)
