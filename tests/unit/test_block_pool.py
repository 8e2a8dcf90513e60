"""KV blocks: held, let go, found again by prefix, evicted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from milliways.model.block_pool import BlockPool, chain_digest
from milliways.model.errors import OutOfBlocksError

BLOCK = 4


def published(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """Computes a sequence, publishes it and lets it go; returns the blocks it had."""
    blocks = pool.allocate(-(-len(token_ids) // BLOCK))
    pool.publish(token_ids, blocks)
    pool.free(blocks)
    return blocks


def test_blocks_of_an_equal_prefix_are_reused() -> None:
    pool = BlockPool(8, BLOCK)
    blocks = published(pool, list(range(10)))
    assert pool.match_prefix([*range(8), 99, 98]) == blocks[:2]
    assert pool.num_held == 2
    pool.check_integrity()


def test_last_token_is_never_taken_from_the_cache() -> None:
    pool = BlockPool(8, BLOCK)
    blocks = published(pool, list(range(8)))
    assert pool.match_prefix(list(range(8))) == blocks[:1]


def test_same_block_after_another_prefix_is_not_reused() -> None:
    pool = BlockPool(8, BLOCK)
    published(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.match_prefix([9, 9, 9, 9, 5, 6, 7, 8, 0]) == []


def test_shared_block_outlives_its_first_holder() -> None:
    pool = BlockPool(2, BLOCK)
    first = pool.allocate(1)
    pool.publish([1, 2, 3, 4], first)
    second = pool.match_prefix([1, 2, 3, 4, 5])
    pool.free(first)
    assert second == first and pool.num_held == 1 and not pool.can_allocate(2)


def test_idle_blocks_are_evicted_oldest_first_when_blocks_run_out() -> None:
    pool = BlockPool(2, BLOCK)
    published(pool, [1, 1, 1, 1])
    published(pool, [2, 2, 2, 2])
    pool.allocate(1)
    assert pool.match_prefix([1, 1, 1, 1, 0]) == []
    assert len(pool.match_prefix([2, 2, 2, 2, 0])) == 1
    pool.check_integrity()


def test_later_blocks_of_a_prefix_are_evicted_before_earlier_ones() -> None:
    pool = BlockPool(3, BLOCK)
    blocks = published(pool, [1, 1, 1, 1, 2, 2, 2, 2])
    pool.allocate(2)
    assert pool.match_prefix([1, 1, 1, 1, 2, 2, 2, 2, 3]) == blocks[:1]


def test_failed_allocation_takes_nothing_and_names_both_numbers() -> None:
    pool = BlockPool(3, BLOCK)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="2 KV blocks are needed, but only 1"):
        pool.allocate(2)
    assert pool.num_available == 1


def digests_of(token_ids: list[int]) -> list[bytes]:
    """The names of the full blocks of a sequence."""
    digests = [b""]
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        digests.append(chain_digest(digests[-1], token_ids[start : start + BLOCK]))
    return digests[1:]


def test_block_published_by_its_digest_is_found_by_its_tokens() -> None:
    pool = BlockPool(4, BLOCK)
    tokens = list(range(8))
    first, second = digests_of(tokens)
    blocks = pool.allocate(2)
    pool.publish_next(blocks[0], first, b"")
    pool.publish_next(blocks[1], second, first)
    pool.free(blocks)
    pool.check_integrity()
    assert pool.num_held == 0
    assert pool.match_prefix([*tokens, 9]) == blocks


def test_chain_is_held_completely_or_not_at_all() -> None:
    pool = BlockPool(3, BLOCK)
    blocks = published(pool, [1, 1, 1, 1, 2, 2, 2, 2])
    first, second = digests_of([1, 1, 1, 1, 2, 2, 2, 2])
    assert pool.hold_chain(second) == blocks and pool.num_held == 2
    pool.free(blocks)
    assert pool.hold_chain(b"") == []
    assert pool.hold_chain(b"an unknown hash") is None
    # The later block is evicted first. The earlier one is then a chain by itself.
    pool.allocate(2)
    assert pool.hold_chain(second) is None and pool.num_held == 2
    assert pool.hold_chain(first) == blocks[:1]
    assert pool.try_hold(second) is None and pool.try_hold(first) == blocks[0]
    pool.free(blocks[:1])
    pool.free(blocks[:1])
    pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Random sequences begin, grow, share blocks and end; the invariants always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, BLOCK)
        self.sequences: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def start(self, tokens: list[int]) -> None:
        blocks = self.pool.match_prefix(tokens)
        num_missing = -(-len(tokens) // BLOCK) - len(blocks)
        if self.pool.can_allocate(num_missing):
            blocks = blocks + self.pool.allocate(num_missing)
            self.pool.publish(tokens, blocks)
            self.sequences.append((tokens, blocks))
        else:
            self.pool.free(blocks)

    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        if self.sequences:
            place = data.draw(st.integers(0, len(self.sequences) - 1))
            self.pool.free(self.sequences.pop(place)[1])

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        held = {block for _, blocks in self.sequences for block in blocks}
        assert self.pool.num_held == len(held)

    @invariant()
    def shared_blocks_hold_equal_prefixes(self) -> None:
        contents: dict[int, list[int]] = {}
        for tokens, blocks in self.sequences:
            for i, block in enumerate(blocks):
                prefix = tokens[: (i + 1) * BLOCK]
                assert contents.setdefault(block, prefix) == prefix


TestPool = PoolMachine.TestCase


@given(st.integers(-3, 0))
def test_pool_without_blocks_is_a_programming_error(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(num_blocks, BLOCK)
