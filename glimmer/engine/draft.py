"""Where drafts come from: the model's MTP layer, or a look-up of the last tokens in prompt and answer.

A source guesses what follows the tokens of a step's outputs, and leaves its guesses in Sequence.drafts; the next step
checks them. Nothing depends on a guess but the time that it saves. How many are wanted is decided by speculation.py.
Not here: the MTP layer itself (model/glm4_moe.py), and which drafts are accepted (sampler.py).
"""

from array import array
from collections import defaultdict, deque
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glimmer.batch import Batch
from glimmer.engine.sequence import Chunk, SamplerOutput, Sequence, Step

KEEP = -1  # in place of a number of guesses: none, and the MTP layer does not run, but its hidden states are kept
RECENT = 24  # steps, and rows of a chunk, whose hidden states are kept where the MTP layer does not run
CATCH_UP = 64  # of these rows, those that it computes in one step, about: as many as a short prompt has


class Source(Protocol):
    """A way to guess. lookahead: see Scheduler. recent: steps before the first guesses in which KEEP is of use."""

    lookahead: int
    recent: int

    def rows_of(self, blocks: Sequence_[int]) -> list[int]:
        """How many rows of its own the source has in each block."""

    def set_rows(self, blocks: Sequence_[int], rows: Sequence_[int]) -> None:
        """The blocks have been filled with what other blocks held that had these `rows_of`."""

    def propose(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step, count: int | None) -> None:
        """See engine.Drafter."""


class DraftModel(Protocol):
    """What computes the MTP layer: the Runner."""

    def draft(self, hidden: Tensor, batch: Batch) -> Tensor: ...
    def draft_chain(self, hidden: Tensor, batch: Batch | None, vocab_size: int) -> list[list[int]]: ...


@dataclass
class Context:
    """Which rows of the MTP layer's cache a sequence can use: `complete` blocks, and from there to position `end`.

    blocks: the sequence's own list when the rows were computed; a sequence that lost its blocks gets another list.
    """

    blocks: list[int]
    complete: list[int]
    end: int


@dataclass
class Rows:
    """What one chunk brings to the MTP layer.

    positions   of its rows; tokens: those that follow them
    earlier     hidden states of the first rows, if earlier steps have computed some
    first       the first of the others, among all rows of the step
    before      tokens in the cache before the first position
    table       the blocks that hold those and the new ones
    count       how many tokens are to be guessed
    """

    sequence: Sequence
    positions: range
    tokens: list[int]
    earlier: Tensor | None
    first: int
    before: int
    table: list[int]
    count: int


class RecentStates:
    """The hidden states of the latest steps in which the MTP layer has not run.

    Of each chunk the last RECENT rows. Nothing is looked at until somebody asks, so that a step costs one copy.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[Tensor, Step, list[SamplerOutput]]] = deque(maxlen=RECENT)

    def keep(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step) -> None:
        """hidden: (T, H), the rows of this step."""
        if len(hidden) == len(step.chunks):
            states = hidden.clone()
        else:
            ends = accumulate(chunk.n for chunk in step.chunks)
            states = hidden[[row for chunk, end in zip(step.chunks, ends) for row in range(end - _kept(chunk), end)]]
        self._steps.append((states, step, outputs))

    def clear(self) -> None:
        """Forget all of them."""
        self._steps.clear()

    def before(self, positions: dict[Sequence, int]) -> dict[Sequence, list[Tensor]]:
        """For each sequence the hidden states before its position, in order: RECENT or a few more, if none misses."""
        found: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in positions}
        ends = dict(positions)
        for states, step, outputs in reversed(self._steps):
            first = 0
            for chunk, output in zip(step.chunks, outputs, strict=True):
                kept, end = _kept(chunk), ends.get(chunk.sequence, 0)
                begin = chunk.start + chunk.n - kept
                if begin < end <= chunk.start + chunk.num_known + max(0, len(output.tokens) - 1):
                    found[chunk.sequence].insert(0, states[first : first + end - begin])
                    ends[chunk.sequence] = begin
                    if positions[chunk.sequence] - begin >= RECENT:
                        del ends[chunk.sequence]
                first += kept
        return found


def _kept(chunk: Chunk) -> int:
    """How many rows of a chunk are kept."""
    return min(chunk.n, RECENT)


class MTPSource:
    """Guesses by the MTP layer, whose row t pairs hidden state t with the token after it.

    The layer runs after the model on the same chunk, prompts included, since by then the token after each row is known.
    Its keys and values lie in the sequence's own blocks, in one more layer of the cache. The second and further guesses
    feed the layer its own hidden states, as rows behind the last one (chain.py); the next step writes the true rows
    over them.

    Where no guesses are wanted the layer does not run, and rows are missing. A block counts only if all of its rows are
    there, or, the last one, all up to the position that is computed; so the rows begin again at the beginning of a
    block. Where guesses are expected, the hidden states of the latest steps are kept, so that this is a block that has
    begun already, and the first guess comes after all of its rows. A block that sequences share ends with a row that
    was computed for the first of them: where another one goes on with another token, guesses may be slightly worse.
    """

    recent = RECENT

    def __init__(self, model: DraftModel, num_blocks: int, block_size: int, vocab_size: int, max_drafts: int):
        self.model, self.block_size, self.vocab_size = model, block_size, vocab_size
        self.lookahead = max_drafts - 1
        self._rows_of = array("i", [0]) * num_blocks  # by block: how many rows are there, from its beginning on
        self._contexts: WeakKeyDictionary[Sequence, Context] = WeakKeyDictionary()
        self._recent = RecentStates()

    def rows_of(self, blocks: Sequence_[int]) -> list[int]:
        return [self._rows_of[block] for block in blocks]

    def set_rows(self, blocks: Sequence_[int], rows: Sequence_[int]) -> None:
        for block, count in zip(blocks, rows, strict=True):
            self._rows_of[block] = min(count, self.block_size)

    def propose(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step, count: int | None) -> None:
        if count is not None and count != KEEP:
            return self._propose(hidden, outputs, step, count)
        for chunk in step.chunks:
            chunk.sequence.drafts = []
            if chunk.n > 1 or chunk.start % self.block_size == 0:  # else nothing is to be forgotten
                self._forget(chunk.sequence, chunk.start, chunk.start + chunk.n)
        if count == KEEP:
            self._recent.keep(hidden, outputs, step)
        else:
            self._recent.clear()

    @torch.inference_mode()
    def _propose(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step, count: int) -> None:
        parts: list[Rows] = []
        first, room, waits = 0, CATCH_UP, False
        earlier = self._recent.before({c.sequence: c.start for c in step.chunks if not self._goes_on(c)})
        for chunk, output in zip(step.chunks, outputs, strict=True):
            chunk.sequence.drafts = []
            if output.problem is None:
                part = self._rows(chunk, output, first, count, earlier.get(chunk.sequence, []), room)
                if part is not None:
                    parts.append(part)
                    room -= 0 if part.earlier is None else len(part.earlier)
                waits |= part is None
            else:
                self._forget(chunk.sequence, chunk.start, chunk.start + chunk.n)
            first += chunk.n
        if waits:
            self._recent.keep(hidden, outputs, step)
        else:
            self._recent.clear()
        if not parts:
            return
        computed = self.model.draft(_states(hidden, parts), self._batch(parts))
        ends = accumulate(len(part.positions) for part in parts)
        chains: defaultdict[int, list[tuple[Rows, int]]] = defaultdict(list)  # by length
        for part, end in zip(parts, ends):
            if part.count:
                chains[part.count].append((part, end - 1))
        for length, chain in chains.items():
            last = _take(computed, [row for _, row in chain])
            batch = self._batch([self._after(part, length - 1) for part, _ in chain]) if length > 1 else None
            for (part, _), drafts in zip(chain, self.model.draft_chain(last, batch, self.vocab_size), strict=True):
                part.sequence.drafts = drafts

    def _goes_on(self, chunk: Chunk) -> bool:
        """Whether the layer has computed the row before the chunk's first, for this sequence."""
        context = self._contexts.get(chunk.sequence)
        return context is not None and context.blocks is chunk.sequence.blocks and context.end == chunk.start

    def _context(self, chunk: Chunk, earlier: int) -> Context:
        """Where the rows of a chunk go on or begin, if so many before it can be computed."""
        sequence, size = chunk.sequence, self.block_size
        blocks, start = sequence.blocks, chunk.start - earlier
        context = self._contexts.get(sequence)
        if context is not None and context.blocks is blocks and start <= context.end <= chunk.start:
            return context
        if start % size and self._rows_of[blocks[start // size]] != start % size:
            start = (start // size + 1) * size
        complete = [block for block in blocks[: start // size] if self._rows_of[block] == size]
        context = self._contexts[sequence] = Context(blocks, complete, start)
        return context

    def _rows(
        self, chunk: Chunk, output: SamplerOutput, first: int, count: int, earlier: list[Tensor], room: int
    ) -> Rows | None:
        """The rows of a chunk whose next tokens are known, and at most `room` before it, of `earlier` hidden states;
        None if there is none that can be used."""
        sequence, size = chunk.sequence, self.block_size
        blocks = sequence.blocks
        context = self._context(chunk, sum(map(len, earlier)))
        if chunk.start - context.end > room:
            context = self._context(chunk, 0)
        start = context.end
        tokens = [*sequence.tokens[chunk.start + 1 : chunk.start + chunk.num_known + 1], *output.tokens]
        end = chunk.start + len(tokens)
        if start >= end:
            self._forget(sequence, chunk.start, chunk.start + chunk.n)
            return None
        begin = start // size
        if chunk.samples and not any(token in sequence.request.stop_ids for token in output.tokens):
            known = len(sequence.tokens) + len(output.tokens)
            count = max(0, min(count, sequence.max_total_tokens - known - 1, len(blocks) * size - end + 1))
        else:
            count = 0
        last = (end + max(0, count - 1) - 1) // size
        caught_up = max(0, chunk.start - start)
        rows = Rows(
            sequence,
            positions=range(start, end),
            tokens=[*sequence.tokens[start + 1 : chunk.start + 1], *tokens[max(0, start - chunk.start) :]],
            earlier=torch.cat(earlier)[-caught_up:] if caught_up else None,
            first=first + max(0, start - chunk.start),
            before=len(context.complete) * size + start % size,
            table=[*context.complete, *blocks[begin : last + 1]],
            count=count,
        )
        context.complete += blocks[begin : end // size]
        context.end = end
        for i in range(begin, (end - 1) // size + 1):
            self._rows_of[blocks[i]] = min(size, end - i * size)
        return rows

    def _forget(self, sequence: Sequence, start: int, end: int) -> None:
        """Rows of a sequence, from start to end, have been computed without those of the MTP layer. A block that begins
        before start has none of these beyond."""
        for i in range(-(-start // self.block_size), (end - 1) // self.block_size + 1):
            self._rows_of[sequence.blocks[i]] = 0

    def _after(self, part: Rows, count: int) -> Rows:
        """The next `count` rows, whose tokens are not known yet."""
        end, before = part.positions.stop, part.before + len(part.positions)
        return Rows(part.sequence, range(end, end + count), [0] * count, None, 0, before, part.table, 0)

    def _batch(self, parts: list[Rows]) -> Batch:
        size = self.block_size
        positions = [position for part in parts for position in part.positions]
        blocks = [part.sequence.blocks[position // size] for part in parts for position in part.positions]
        return Batch.of(
            tokens=[token for part in parts for token in part.tokens],
            positions=positions,
            slot_mapping=[block * size + position % size for block, position in zip(blocks, positions)],
            block_tables=[part.table for part in parts],
            logits_indices=[],
            query_lens=[len(part.positions) for part in parts],
            seq_lens=[part.before + len(part.positions) for part in parts],
        )


def _states(hidden: Tensor, parts: list[Rows]) -> Tensor:
    """The hidden states of all rows of these parts, where hidden (T, H) has those of the step."""
    if all(part.earlier is None for part in parts):
        return _take(hidden, [part.first + i for part in parts for i in range(len(part.positions))])
    pieces: list[Tensor] = []
    for part in parts:
        rows = len(part.positions)
        if part.earlier is not None:
            pieces.append(part.earlier)
            rows -= len(part.earlier)
        pieces.append(hidden[part.first : part.first + rows])
    return torch.cat(pieces)


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows (R, H) of x (T, H), in their order; a view where they follow each other."""
    first, last = rows[0], rows[-1]
    return x[first : last + 1] if last - first == len(rows) - 1 else x[rows]


class LookupSource:
    """Guesses that what followed the last tokens before, in prompt or answer, follows them again.

    longest, shortest: how many last tokens are compared; of all places that agree in the shortest, the one with which
    most agree counts, of equals the latest.
    """

    lookahead = recent = 0

    def __init__(self, longest: int, shortest: int):
        self.longest, self.shortest = longest, shortest
        self._indexes: WeakKeyDictionary[Sequence, TokenIndex] = WeakKeyDictionary()

    def rows_of(self, blocks: Sequence_[int]) -> list[int]:
        return [0] * len(blocks)

    def set_rows(self, blocks: Sequence_[int], rows: Sequence_[int]) -> None:
        """It has nothing in the cache."""

    def propose(self, hidden: Tensor, outputs: list[SamplerOutput], step: Step, count: int | None) -> None:
        for chunk, output in zip(step.chunks, outputs, strict=True):
            sequence = chunk.sequence
            sequence.drafts = []
            if count is None or count <= 0 or not output.tokens:
                continue
            index = self._indexes.get(sequence)
            if index is None:
                index = self._indexes[sequence] = TokenIndex(self.longest, self.shortest)
            index.extend(sequence.tokens, output.tokens)
            sequence.drafts = index.following(count)


class TokenIndex:
    """The tokens of one sequence, and for each few of them where the same ones have been before.

    A token is looked at once; a look-up compares at most MAX_COMPARED places.
    """

    MAX_COMPARED = 16

    def __init__(self, longest: int, shortest: int):
        self.longest, self.shortest = longest, shortest
        self.tokens: array[int] = array("q")
        self._indexed = shortest - 1  # ends up to here have been entered
        self._latest: dict[int, int] = {}  # hash of `shortest` tokens: where they have ended latest
        self._earlier: array[int] = array("q", [0]) * shortest  # by end: where the same tokens have ended before, or 0

    def extend(self, known: list[int], new: tuple[int, ...]) -> None:
        """The sequence holds the tokens of `known`, which begin with those here, and then `new`."""
        self.tokens.extend(known[len(self.tokens) :])
        self.tokens.extend(new)

    def following(self, count: int) -> list[int]:
        """Up to `count` tokens that have followed the last ones before; they may be among the last ones themselves."""
        tokens, size = self.tokens, len(self.tokens)
        for end in range(self._indexed + 1, size):
            key = hash(tuple(tokens[end - self.shortest : end]))
            self._earlier.append(self._latest.get(key, 0))
            self._latest[key] = end
        self._indexed = max(self._indexed, size - 1)
        if size <= self.shortest:
            return []
        best, place = 0, 0
        end = self._latest.get(hash(tuple(tokens[size - self.shortest :])), 0)
        for _ in range(self.MAX_COMPARED):
            if not end or best == self.longest:
                break
            same = 0
            while same < self.longest and same < end and tokens[end - 1 - same] == tokens[size - 1 - same]:
                same += 1
            if same > best:
                best, place = same, end
            end = self._earlier[end]
        if best < self.shortest:
            return []
        found = list(tokens[place : place + count])
        while len(found) < count:  # the last tokens repeat each other
            found.append(found[len(found) - (size - place)])
        return found
