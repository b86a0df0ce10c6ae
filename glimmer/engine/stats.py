"""Stats: what an engine has counted since it began. Read by `glimmer bench` and by the server's /metrics."""

from dataclasses import dataclass, field

from glimmer.engine.sequence import SamplerOutput, Step


@dataclass
class Stats:
    """Sums over steps that brought a sequence tokens; each sequence of a step counts as one.

    num_steps, num_tokens           such steps, and the tokens that they brought
    num_drafts, num_draft_tokens    those in which drafts were checked, and how many drafts these were
    num_accepted_tokens             drafts that were accepted
    num_draft_tokens_per_pos, num_accepted_tokens_per_pos    the same two by place among a sequence's drafts
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_draft_tokens_per_pos: list[int] = field(default_factory=list)
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    def count(self, step: Step, outputs: list[SamplerOutput]) -> None:
        """A step, and what was sampled in it."""
        for chunk, output in zip(step.chunks, outputs, strict=True):
            if not output.tokens:
                continue
            drafts, accepted = len(chunk.drafts), len(output.tokens) - 1
            self.num_steps += 1
            self.num_tokens += 1 + accepted
            if drafts:
                self.num_drafts += 1
                self.num_draft_tokens += drafts
                self.num_accepted_tokens += accepted
                for counts, n in (
                    (self.num_draft_tokens_per_pos, drafts),
                    (self.num_accepted_tokens_per_pos, accepted),
                ):
                    counts += [0] * (drafts - len(counts))
                    for i in range(n):
                        counts[i] += 1
