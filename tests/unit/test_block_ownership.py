"""Who may count on the blocks of an attention shard."""

from milliways.wire.errors import RefusalReason
from milliways.workers.block_ownership import BlockOwnership


def test_a_router_that_lost_its_blocks_unseen_is_told_once() -> None:
    tenancy = BlockOwnership()
    assert tenancy.enter(("a", 1)) is None
    assert tenancy.enter(("b", 1)) is None
    refusal = tenancy.enter(("a", 1))
    assert refusal is not None
    assert refusal.reason is RefusalReason.UNKNOWN_BATCH
    assert tenancy.enter(("a", 1)) is None
    # And so is the other.
    assert tenancy.enter(("b", 1)) is not None


def test_a_later_life_counts_on_nothing_and_is_let_in() -> None:
    tenancy = BlockOwnership()
    for owner in [("a", 1), ("b", 1), ("a", 2), ("a", 3)]:
        assert tenancy.enter(owner) is None, owner


def test_an_earlier_life_is_refused() -> None:
    tenancy = BlockOwnership()
    tenancy.enter(("a", 2))
    refusal = tenancy.enter(("a", 1))
    assert refusal is not None
    assert refusal.reason is RefusalReason.STALE_INCARNATION
    assert tenancy.tenant == ("a", 2)
