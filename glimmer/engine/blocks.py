"""Blocks: who owns which block of the cache, and which full blocks can be used again.

A block is free, or referenced by one or more sequences. A full block whose tokens are all computed is known by a hash
of everything from the beginning of its sequence to its own end; a sequence that begins with the same tokens shares it.
Free blocks keep their hash until they are taken for something else. First those go that have none, then the longest
unused.
Only numbers here: the tensors are model/cache.py's.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Sequence_
from hashlib import blake2b

from glimmer.engine.sequence import Sequence


class Blocks:
    """A pool of `count` blocks of `size` tokens."""

    def __init__(self, count: int, size: int, reuse: bool):
        self.count, self.size, self.reuse = count, size, reuse
        self._references = [0] * count
        self._hash_of: list[bytes | None] = [None] * count
        self._block_of: dict[bytes, int] = {}
        self._generation = [0] * count  # how often a block has been taken for something new
        self._free = OrderedDict.fromkeys(range(count))  # in the order in which they will be taken

    @property
    def free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks for that many tokens."""
        return -(-tokens // self.size)

    def allocate(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate the blocks of the sequence's first `tokens` tokens. False, and no change, if too few are free."""
        more = self.needed(tokens) - len(sequence.blocks)
        if more > len(self._free):
            return False
        for _ in range(more):
            block, _ = self._free.popitem(last=False)
            if (digest := self._hash_of[block]) is not None:
                del self._block_of[digest]
                self._hash_of[block] = None
            self._references[block] = 1
            self._generation[block] += 1
            sequence.blocks.append(block)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take all blocks away from a sequence; its last ones are taken again first, its beginning lives longest."""
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:  # of no use to anyone, and its memory is in use already
                    self._free.move_to_end(block, last=False)
        sequence.blocks.clear()
        sequence.num_computed_tokens = 0

    def generations(self, blocks: Sequence_[int]) -> list[int]:
        """A number for each block, which changes before the block is written for something new. For any thread."""
        return [self._generation[block] for block in blocks]

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the sequence's beginning. At least one token is left to be computed."""
        found = []
        if self.reuse:
            for digest in self.hashes(sequence, (len(sequence.tokens) - 1) // self.size):
                if digest not in self._block_of:
                    break
                found.append(self._block_of[digest])
        return found

    def share(self, sequence: Sequence, blocks: Sequence_[int]) -> None:
        """Begin a sequence with blocks that `match_prefix` found."""
        for block in blocks:
            self._free.pop(block, None)
            self._references[block] += 1
        sequence.blocks = list(blocks)
        sequence.num_computed_tokens = len(blocks) * self.size

    def cache_full_blocks(self, sequence: Sequence, before: int) -> None:
        """The sequence has computed more than `before` tokens: offer the blocks filled since to others."""
        if not self.reuse:
            return
        last = sequence.num_computed_tokens // self.size
        digests = self.hashes(sequence, last)
        for i in range(before // self.size, last):
            block = sequence.blocks[i]
            if digests[i] not in self._block_of and self._hash_of[block] is None:
                self._block_of[digests[i]], self._hash_of[block] = block, digests[i]

    def hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Digests of the first `count` full blocks, each covering all tokens up to its own end."""
        known = sequence.hashes
        salt = (
            blake2b(sequence.request.cache_salt.encode(errors="surrogatepass"), digest_size=16).digest()
            if sequence.request.cache_salt
            else b""
        )
        for i in range(len(known), count):
            tokens = array("q", sequence.tokens[i * self.size : (i + 1) * self.size])
            known.append(blake2b(tokens.tobytes(), key=known[-1] if known else salt, digest_size=16).digest())
        return known[:count]

    def check(self, sequences: Sequence_[Sequence]) -> None:
        """Assert that every block is free or held, exactly as often as it is referenced. For tests."""
        held = [0] * self.count
        for sequence in sequences:
            for block in sequence.blocks:
                held[block] += 1
        assert held == self._references, "references do not match the sequences' blocks"
        assert {b for b, n in enumerate(held) if n == 0} == set(self._free), "free list does not match references"
        assert all(self._hash_of[b] == digest for digest, b in self._block_of.items()), "hashes do not match blocks"
