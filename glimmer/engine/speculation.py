"""Speculation: joins a source of drafts (draft.py) with the choice of how many (switch.py). The engine's Drafter.

Not here: which drafts are accepted (sampler.py), and what has come of them in all (stats.py).
"""

from collections.abc import Sequence
from time import perf_counter

from torch import Tensor

from glimmer.config import SpeculativeConfig
from glimmer.engine.draft import KEEP, LookupSource, MTPSource, Source
from glimmer.engine.runner import Runner
from glimmer.engine.sequence import SamplerOutput, Step
from glimmer.engine.switch import Switch


class Speculation:
    """As many drafts as pay, at most `most`; with `fixed`, always `most`, and nothing depends on a clock.

    paused: no drafts are made; rank 0 may change it between two steps.
    """

    def __init__(self, source: Source, most: int, fixed: bool):
        self.source, self.most = source, most
        self.switch = None if fixed else Switch(most, source.recent)
        self.paused = False

    @property
    def lookahead(self) -> int:
        return self.source.lookahead

    @property
    def gain(self) -> float:
        """How much faster drafts make the engine just now, as far as is known; 1 where their number is fixed."""
        return 1.0 if self.switch is None else self.switch.gain

    def rows_of(self, blocks: Sequence[int]) -> list[int]:
        return self.source.rows_of(blocks)

    def set_rows(self, blocks: Sequence[int], rows: Sequence[int]) -> None:
        self.source.set_rows(blocks, rows)

    def choose(self, outputs: list[SamplerOutput], step: Step, seconds: float) -> int | None:
        switch = self.switch
        if self.paused:
            return KEEP
        if switch is None:
            return self.most
        decoding = all(chunk.num_known == 1 for chunk in step.chunks)
        if decoding and switch.rests(len(step.chunks)):
            return KEEP if switch.keeps else None
        drafts = [
            (len(chunk.drafts), len(output.tokens) - 1) for chunk, output in zip(step.chunks, outputs) if output.tokens
        ]
        for checked, accepted in drafts:
            if checked:
                switch.checked(checked, accepted)
        if not decoding:
            switch.prompted(seconds)
        elif len(drafts) == len(step.chunks):
            switch.stepped(len(drafts), drafts, seconds)
        count = switch.choose(len(step.chunks), prompts=not decoding)
        return KEEP if count is None and switch.keeps else count

    def propose(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step, count: int | None) -> None:
        begin = perf_counter()
        self.source.propose(hidden, outputs, step, count)
        if self.switch is not None and count is not None and count != KEEP:
            made = sum(len(chunk.sequence.drafts) for chunk in step.chunks) / len(step.chunks)
            prompts = any(chunk.num_known > 1 for chunk in step.chunks)
            self.switch.drafted(made, perf_counter() - begin, prompts)


def make_speculation(runner: Runner, config: SpeculativeConfig, vocab_size: int) -> Speculation | None:
    """What drafts for an engine with this runner; None if nothing does. vocab_size: ids below it may be sampled."""
    if runner.drafts_by == "off":
        return None
    source: Source = LookupSource(config.prompt_lookup_max, config.prompt_lookup_min)
    if runner.drafts_by == "mtp":
        num_blocks = runner.kv_cache_config.num_blocks
        source = MTPSource(runner, num_blocks, runner.block_size, vocab_size, config.max_drafts)
    return Speculation(source, config.max_drafts, fixed=config.num_speculative_tokens is not None)
