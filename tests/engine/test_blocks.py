"""Blocks: counted, shared by content, and taken back oldest first."""

from glimmer.config import SamplingParams
from glimmer.engine.blocks import Blocks
from glimmer.engine.sequence import Request, Sequence


def sequence(*tokens: int) -> Sequence:
    return Sequence(Request("r", tokens, SamplingParams(), "s"), 100)


def computed(blocks: Blocks, *tokens: int) -> Sequence:
    """A sequence all of whose tokens are in the cache."""
    new = sequence(*tokens)
    blocks.share(new, blocks.match_prefix(new))
    before = new.num_computed_tokens
    assert blocks.allocate(new, len(tokens))
    new.num_computed_tokens = len(tokens)
    blocks.cache_full_blocks(new, before)
    return new


def test_grow_takes_all_or_nothing():
    blocks = Blocks(3, 4, reuse=True)
    held = sequence(*range(8))
    assert blocks.allocate(held, 8) and len(held.blocks) == 2
    assert blocks.allocate(held, 7) and len(held.blocks) == 2
    other = sequence(*range(100, 108))
    assert not blocks.allocate(other, 8) and other.blocks == [] and blocks.free == 1
    blocks.check([held, other])


def test_only_full_blocks_with_the_same_history_are_shared():
    blocks = Blocks(10, 2, reuse=True)
    first = computed(blocks, 1, 2, 3, 4, 5)
    assert blocks.match_prefix(sequence(1, 2, 3, 4, 9)) == first.blocks[:2]
    assert blocks.match_prefix(sequence(1, 2, 3, 4)) == first.blocks[:1], "one token is left to compute"
    assert blocks.match_prefix(sequence(3, 4, 5)) == [], "same tokens, other history"
    assert blocks.match_prefix(sequence(0, 2, 3, 4, 9)) == []


def test_released_blocks_are_found_again_until_they_are_needed():
    blocks = Blocks(4, 2, reuse=True)
    first = computed(blocks, 1, 2, 3, 4, 5)
    blocks.release(first)
    assert blocks.free == 4 and len(blocks.match_prefix(sequence(1, 2, 3, 4, 5))) == 2
    second = computed(blocks, 1, 2, 3, 4, 6, 7)
    blocks.check([second])
    third = sequence(8, 9)
    assert blocks.allocate(third, 2)
    blocks.check([second, third])
    blocks.release(second)
    blocks.release(third)
    big = sequence(*range(20, 28))
    assert blocks.allocate(big, 8)
    assert blocks.match_prefix(sequence(1, 2, 3, 4, 5)) == [], "overwritten blocks are forgotten"
    blocks.check([big])


def test_the_beginning_outlives_the_end():
    blocks = Blocks(4, 2, reuse=True)
    blocks.release(computed(blocks, 1, 2, 3, 4, 5, 6, 7))
    assert blocks.allocate(sequence(9, 9, 9, 9), 4)
    assert len(blocks.match_prefix(sequence(1, 2, 3, 4, 5, 6, 7))) == 2


def test_blocks_of_no_use_to_others_are_taken_first():
    blocks = Blocks(5, 2, reuse=True)
    first = computed(blocks, 1, 2, 3)
    known, loose = first.blocks
    blocks.release(first)
    second = sequence(7, 7, 7, 7, 7, 7, 7, 7)
    assert blocks.allocate(second, 8) and second.blocks[0] == loose and known not in second.blocks
    blocks.check([second])


def test_without_reuse_nothing_is_remembered():
    blocks = Blocks(4, 2, reuse=False)
    computed(blocks, 1, 2, 3)
    assert blocks.match_prefix(sequence(1, 2, 3)) == []


def test_blocks_are_shared_among_requests_of_one_salt_only():
    blocks = Blocks(10, 2, reuse=True)
    salted = lambda salt: Sequence(Request("r", (1, 2, 3, 4, 5), SamplingParams(), "s", cache_salt=salt), 100)
    first = salted("a")
    assert blocks.allocate(first, 4)
    first.num_computed_tokens = 4
    blocks.cache_full_blocks(first, 0)
    assert blocks.match_prefix(salted("a")) == first.blocks
    assert blocks.match_prefix(salted("b")) == blocks.match_prefix(salted("")) == []
