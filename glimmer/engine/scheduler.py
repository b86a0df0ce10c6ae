"""Who computes which tokens (`schedule`), and what came of it (`update`).

Running sequences go first, in the order of their arrival, and then new ones; but a long prompt leaves up to half of the
step's token budget to sequences that need few tokens, so that a short request does not wait until the long ones that
came before it have been read. When blocks run out, the latest arrival gives its own back and waits again. Decisions
depend on arrival order and counts only, never on clocks or values, so that all ranks decide alike.
"""

from collections import deque
from itertools import islice

from glimmer.engine.blocks import Blocks
from glimmer.engine.disk_cache import DiskCache
from glimmer.engine.sequence import Chunk, FinishReason, Output, SamplerOutput, Sequence, Step, problem_of

# With prompt_logprobs every prompt row has logits, a vocabulary wide each: 128 rows of 151,552 float32 are 78 MB.
PROMPT_LOGPROB_ROWS = 128


class Scheduler:
    """max_tokens: most tokens in a step; max_sequences: most sequences running at once.

    lookahead: tokens beyond those of a step for which a sequence gets blocks, where many are free: what a drafter
    computes after the step.

    disk: where blocks are looked for that memory does not hold, if anywhere.
    """

    def __init__(self, blocks: Blocks, max_tokens: int, max_sequences: int, lookahead: int = 0):
        self.blocks, self.max_tokens, self.max_sequences = blocks, max_tokens, max_sequences
        self.lookahead = lookahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.disk: DiskCache | None = None
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """A new sequence; the caller has checked that it can fit when alone."""
        assert self.blocks.needed(sequence.max_total_tokens) <= self.blocks.count, "a sequence that can never fit"
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a sequence, wherever it is. False if there is none (it may just have finished)."""
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.request.id == request_id:
                    queue.remove(sequence)
                    if self.disk is None or not self.disk.forget(sequence):
                        self._leave(sequence)
                    return True
        return False

    def schedule(self) -> Step:
        """Choose the chunks of the next step and give them blocks. No chunks only when there are no sequences, or when
        all of them wait for the disk."""
        if self.disk is not None:
            self.disk.collect()
        budget, kept = self.max_tokens, self._kept()
        chunks: list[Chunk] = []
        i = 0
        while i < len(self.running) and budget > 0:
            sequence = self.running[i]
            if self._needs_few(sequence):
                n = self._length(sequence, budget)
                kept = max(0, kept - n)
            elif budget > kept:
                n = self._length(sequence, budget - kept)
            else:
                i += 1
                continue
            while not self.blocks.allocate(sequence, sequence.num_computed_tokens + n):
                latest = self.running.pop()  # it has no chunk yet: it comes later, or is this very sequence
                self.preempt(latest)
                if latest is sequence:
                    break
            else:
                chunks.append(self._chunk(sequence, n, budget))
                budget -= chunks[-1].n
                i += 1
        self._admit(chunks, budget, kept)
        assert chunks or self.reading or not (self.running or self.waiting), "sequences, but nothing to compute"
        return Step(tuple(chunks))

    @property
    def reading(self) -> bool:
        """Whether blocks are being read from disk."""
        return self.disk is not None and bool(self.disk.fetches)

    def _needs_few(self, sequence: Sequence) -> bool:
        """Whether a quarter of a step is enough for the tokens of a sequence that are not computed yet."""
        return len(sequence.tokens) - sequence.num_computed_tokens <= self.max_tokens // 4

    def _kept(self) -> int:
        """Tokens of the step that long prompts leave to sequences that need few: half of it at most."""
        wanting, free = [one for one in self.running if self._needs_few(one)], self.blocks.free
        for one in islice(self.waiting, max(0, self.max_sequences - len(self.running))):
            if self._needs_few(one):
                free -= self.blocks.needed(len(one.tokens))
                if free < 0:
                    break
                wanting.append(one)
        return min(self.max_tokens // 2, sum(len(one.tokens) - one.num_computed_tokens for one in wanting))

    def _admit(self, chunks: list[Chunk], budget: int, kept: int) -> None:
        """Start waiting sequences while budget, max_sequences and blocks allow it.

        First come, first served, both among those that need few tokens, for which `kept` of the budget is there, and
        among the others.
        """
        full = budget <= kept  # for long prompts
        coming = self._coming(chunks)
        if self.disk is not None:
            coming |= self.disk.coming()
        # Those that wait for blocks that others compute in this step, for the disk, or for more of the budget.
        held: deque[Sequence] = deque()
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting.popleft()
            few = self._needs_few(sequence)
            if full and not few:
                held.append(sequence)
                continue
            if self.disk is not None and sequence in self.disk.fetches:
                held.append(sequence)
                continue
            afresh = sequence.request.params.prompt_logprobs is not None
            found = [] if afresh else self.blocks.match_prefix(sequence)
            if self._follows(sequence, len(found), coming):
                held.append(sequence)
                continue
            self.blocks.share(sequence, found)
            if self.blocks.needed(len(sequence.tokens)) - len(found) > self.blocks.free:
                self.blocks.release(sequence)  # it starts when there are blocks for all of its known tokens
                self.waiting.appendleft(sequence)
                break
            if self.disk is not None and not afresh and self.disk.begin(sequence):
                held.append(sequence)
                coming |= self.disk.coming()
                continue
            n = self._length(sequence, budget if few else budget - kept)
            grown = self.blocks.allocate(sequence, sequence.num_computed_tokens + n)
            assert grown, "free blocks were counted"
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            self.running.append(sequence)
            chunks.append(self._chunk(sequence, n, budget))
            coming |= self._coming(chunks[-1:])
            budget -= chunks[-1].n
            kept = max(0, kept - n) if few else kept
            full = full or budget <= kept
        self.waiting.extendleft(reversed(held))

    def _coming(self, chunks: list[Chunk]) -> set[bytes]:
        """Hashes of the prompt blocks that these chunks will have filled after the step."""
        if not self.blocks.reuse:
            return set()
        return {
            digest
            for chunk in chunks
            if chunk.start < chunk.sequence.prompt_length
            for digest in self.blocks.hashes(chunk.sequence, (chunk.start + chunk.num_known) // self.blocks.size)
        }

    def _follows(self, sequence: Sequence, found: int, coming: set[bytes]) -> bool:
        """Whether the first block that this sequence lacks is being computed for another in this step."""
        if not coming or sequence.request.params.prompt_logprobs is not None:
            return False
        if (len(sequence.tokens) - 1) // self.blocks.size <= found:
            return False
        return self.blocks.hashes(sequence, found + 1)[found] in coming

    def _length(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of the sequence to compute in this step."""
        if (
            sequence.request.params.prompt_logprobs is not None
            and sequence.num_computed_tokens < sequence.prompt_length
        ):
            budget = min(budget, PROMPT_LOGPROB_ROWS)
        return min(len(sequence.tokens) - sequence.num_computed_tokens, budget)

    def _chunk(self, sequence: Sequence, n: int, budget: int) -> Chunk:
        """The next n known tokens, and as many of the drafts after them as fit; their logits as far as they are wanted.

        Logits are wanted of the last known token and of drafts, and of every prompt token that has a log-probability
        to give.
        """
        start, drafts = sequence.num_computed_tokens, []
        if start + n == len(sequence.tokens):
            drafts = self._take_drafts(sequence, budget - n)
            if self.lookahead and self.blocks.free > len(self.running):
                ahead = start + n + len(drafts) + self.lookahead
                self.blocks.allocate(sequence, min(ahead, sequence.max_total_tokens))
        rows = 1 + len(drafts) if start + n == len(sequence.tokens) else 0
        if sequence.request.params.prompt_logprobs is not None and start < sequence.prompt_length:
            rows = n + len(drafts)
        return Chunk(sequence, start, n + len(drafts), rows, tuple(drafts))

    def _take_drafts(self, sequence: Sequence, budget: int) -> list[int]:
        """The sequence's drafts, cut to the budget, to its own end, and to the blocks that are free."""
        known = len(sequence.tokens)
        count = min(len(sequence.drafts), budget, sequence.max_total_tokens - known - 1)
        if self.blocks.free <= len(self.running):  # known tokens need what is left
            count = min(count, len(sequence.blocks) * self.blocks.size - known)
        while count > 0 and not self.blocks.allocate(sequence, known + count):
            count -= 1
        drafts, sequence.drafts = sequence.drafts[: max(0, count)], []
        return drafts

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it waits, first in the queue, and computes its tokens again."""
        self.blocks.release(sequence)
        sequence.looked_up = False
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """A sequence ends, and gives its blocks back."""
        if self.disk is not None:
            self.disk.used(sequence)
        self.blocks.release(sequence)

    def update(self, step: Step, outputs: list[SamplerOutput]) -> list[Output]:
        """Advance the sequences of the step, append their new tokens, free the blocks of those that ended."""
        known = [self._advance(chunk, output) for chunk, output in zip(step.chunks, outputs, strict=True)]
        return [output for output in known if output is not None]

    def _advance(self, chunk: Chunk, sampled: SamplerOutput) -> Output | None:
        """What the step brought to one sequence; None if there is nothing to say about it."""
        sequence, problem, finish = chunk.sequence, sampled.problem, None
        # A sequence that was preempted within its prompt computes it again, but reports each row once.
        prompt_logprobs = sampled.prompt_logprobs[max(0, sequence.num_prompt_logprobs_sent - chunk.start) :]
        sequence.num_prompt_logprobs_sent += len(prompt_logprobs)
        tokens: list[int] = []
        for token in sampled.tokens:
            tokens.append(token)
            try:
                finish = sequence.append(token)
            except Exception as error:  # of its constraint: it ends this answer only
                problem = problem_of("a request's constraint", error)
            if finish is not None or problem is not None:
                break  # what was accepted beyond the end is no part of the answer
        if sampled.problem is None:  # keys and values are right for the known tokens and the accepted drafts
            sequence.num_computed_tokens += chunk.num_known + max(0, len(tokens) - 1)
            self.blocks.cache_full_blocks(sequence, chunk.start)
            if self.disk is not None:
                self.disk.offer(sequence, chunk.start)
        if problem is not None:
            finish = FinishReason.ERROR
        if finish is not None:
            self.running.remove(sequence)
            self._leave(sequence)
        elif not tokens and not prompt_logprobs:
            return None
        logprobs, cached = sampled.logprobs[: len(tokens)], sequence.num_cached_tokens
        return Output(sequence.request.id, tuple(tokens), logprobs, prompt_logprobs, finish, problem, cached)
