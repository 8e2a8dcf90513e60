"""Who may count on the blocks of an attention shard."""

from milliways.wire.errors import RefusalReason
from milliways.workers.block_ownership import BlockOwnership


def test_a_router_that_lost_its_blocks_unseen_is_told_once() -> None:
    ownership = BlockOwnership()
    assert ownership.enter(("a", 1)) is None
    assert ownership.enter(("b", 1)) is None
    refusal = ownership.enter(("a", 1))
    assert refusal is not None
    assert refusal.reason is RefusalReason.UNKNOWN_BATCH
    assert ownership.enter(("a", 1)) is None
    # And so is the other.
    assert ownership.enter(("b", 1)) is not None


def test_a_later_life_counts_on_nothing_and_is_let_in() -> None:
    ownership = BlockOwnership()
    for owner in [("a", 1), ("b", 1), ("a", 2), ("a", 3)]:
        assert ownership.enter(owner) is None, owner


def test_an_earlier_life_is_refused() -> None:
    ownership = BlockOwnership()
    ownership.enter(("a", 2))
    refusal = ownership.enter(("a", 1))
    assert refusal is not None
    assert refusal.reason is RefusalReason.STALE_INCARNATION
    assert ownership.owner == ("a", 2)
