"""Speculation: joins a source of drafts (draft.py) with the choice of how many."""

from torch import Tensor

from glimmer.config import SpeculativeConfig
from glimmer.engine.draft import LookupSource, MTPSource, Source
from glimmer.engine.runner import Runner
from glimmer.engine.sequence import SamplerOutput, Step


class Speculation:
    """The engine's Drafter: `source` guesses, a fixed number of tokens each step."""

    def __init__(self, source: Source, config: SpeculativeConfig):
        self.source, self.config = source, config

    @property
    def lookahead(self) -> int:
        return self.source.lookahead

    def choose(self, outputs: list[SamplerOutput], step: Step, seconds: float) -> int:
        return self.config.max_drafts

    def propose(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step, count: int) -> None:
        self.source.propose(hidden, outputs, step, count)


def make_speculation(runner: Runner, config: SpeculativeConfig, vocab_size: int) -> Speculation | None:
    """What drafts for an engine with this runner; None if nothing does. vocab_size: ids below it may be sampled."""
    if runner.drafts_by == "off":
        return None
    if runner.drafts_by == "ngram":
        return Speculation(LookupSource(config.prompt_lookup_max, config.prompt_lookup_min), config)
    num_blocks = runner.kv_cache_config.num_blocks
    return Speculation(MTPSource(runner, num_blocks, runner.block_size, vocab_size, config.max_drafts), config)
