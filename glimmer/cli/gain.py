"""What drafts bring, for `glimmer bench --speculative`: bursts of answers with and without them, in turn.

Both kinds of bursts are of one process and of the same prompts, so that what else the machine does meets both alike.
The answers are greedy; to questions, where the checkpoint has a chat template, else to random token ids.
"""

import random
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glimmer.config import SamplingParams

if TYPE_CHECKING:
    from glimmer.llm import LLM

BURSTS, WARM_BURSTS = 10, 2  # pairs of bursts with and without drafts that count, and that pass by before
ANSWER, PROMPT = 96, 64  # tokens of an answer in a burst, at most; of a random prompt
CONTEXT = 256  # tokens of prompt and answer, with room for the chat template
QUESTIONS = (
    "Introduce Paris.", "What is 471 + 318?", "What is the capital of Italy?", "Tell me about Berlin.",
    "What is 81 - 25?", "Where is Tokyo?", "Say it three times: one, two, three.", "Who are you?",
)  # fmt: skip


@dataclass
class Gain:
    """What drafts bring to `batch` sequences.

    rates              tokens per second of neighbouring bursts, without and with drafts
    steps, tokens      with drafts: steps of all sequences, and the tokens that these brought
    drafted, accepted  drafts by their place among those of a step
    """

    batch: int
    rates: list[tuple[float, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of the neighbours' ratios."""
        return statistics.median(drafting / plain for plain, drafting in self.rates)

    @property
    def tokens_per_step(self) -> float:
        """That a step brings to a sequence, with drafts."""
        return self.tokens / self.steps

    @property
    def shares(self) -> list[float]:
        """Of the drafts at each place that was reached, how many were accepted."""
        return [round(accepted / drafted, 3) for accepted, drafted in zip(self.accepted, self.drafted) if drafted]

    def __str__(self) -> str:
        accepted = ", ".join(f"{100 * share:.0f} %" for share in self.shares) or "none were made"
        return f"{self.ratio:>11,.2f}x  {self.tokens_per_step:.2f} tokens a step; accepted by place: {accepted}"

    def as_json(self) -> dict[str, Any]:
        """For the line that machines read."""
        return {
            "gain": round(self.ratio, 3),
            "tokens_per_step": round(self.tokens_per_step, 3),
            "accepted": self.shares,
        }


def measure(model: "LLM", source: random.Random, batch: int) -> Gain:
    """Bursts of `batch` answers each, after a few that let the engine find out how many drafts pay."""
    gain, asks = Gain(batch), model.chat_template is not None and model.tokenizer is not None
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=not asks)
    for i in range(WARM_BURSTS + BURSTS):
        if asks:
            turns = [QUESTIONS[(i * batch + j) % len(QUESTIONS)] for j in range(batch)]
            prompts: list[Any] = [model.render([{"role": "user", "content": turn}]) for turn in turns]
        else:
            ids = range(3, model.model_config.vocab_size)
            prompts = [{"prompt_token_ids": source.choices(ids, k=PROMPT)} for _ in range(batch)]
        rates: dict[bool, float] = {}
        for drafts in (False, True) if i % 2 else (True, False):
            before = _counts(model)
            with nullcontext() if drafts else model.without_drafts():
                rates[drafts] = _burst(model, prompts, params)
            if drafts and i >= WARM_BURSTS:
                _add(gain, before, _counts(model))
        if i >= WARM_BURSTS:
            gain.rates.append((rates[False], rates[True]))
    return gain


def _burst(model: "LLM", prompts: list[Any], params: SamplingParams) -> float:
    """Tokens per second from the first step that brings some to the last one."""
    marks: list[tuple[float, int]] = []
    model.generate(prompts, params, on_step=lambda new: marks.append((time.perf_counter(), new)))
    return sum(new for _, new in marks[1:]) / (marks[-1][0] - marks[0][0])


def _counts(model: "LLM") -> tuple[int, int, list[int], list[int]]:
    stats = model.stats
    drafted, accepted = list(stats.num_draft_tokens_per_pos), list(stats.num_accepted_tokens_per_pos)
    return stats.num_steps, stats.num_tokens, drafted, accepted


def _add(
    gain: Gain, before: tuple[int, int, list[int], list[int]], after: tuple[int, int, list[int], list[int]]
) -> None:
    """What has been counted between two moments."""
    gain.steps += after[0] - before[0]
    gain.tokens += after[1] - before[1]
    for sums, then, now in ((gain.drafted, before[2], after[2]), (gain.accepted, before[3], after[3])):
        sums += [0] * (len(now) - len(sums))
        for place, count in enumerate(now):
            sums[place] += count - (then[place] if place < len(then) else 0)
