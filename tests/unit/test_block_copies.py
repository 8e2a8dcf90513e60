"""What a router makes of blocks that another one sends: kept like its own, at nobody's cost."""

from collections.abc import Sequence

import numpy as np

from milliways.model.block_pool import BlockPool, chain_digest
from milliways.router.block_copies import BlockCopies
from milliways.router.limits import SchedulerLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.scheduler import Scheduler
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.calls import BlocksStored, Refusal, StoreBlocks
from milliways.wire.errors import RefusalReason

BLOCK = 2
PROMPT = (5, 6, 7, 8, 9, 10, 11, 12)


class FakeArrays:
    """Keeps the tokens of a block for its keys."""

    first_layer = 0
    block_bytes = 64

    def __init__(self) -> None:
        self.contents: dict[int, tuple[int, ...]] = {}
        self.fault: Refusal | None = None

    def read_blocks(self, block_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def write_block(
        self,
        block_id: int,
        token_ids_P: np.ndarray,
        keys_LPRK: np.ndarray,
        values_LPRK: np.ndarray,
    ) -> None:
        self.contents[block_id] = tuple(token_ids_P.tolist())

    def blocks_fault(self, call: StoreBlocks) -> Refusal | None:
        return self.fault


class Bench:
    """A router's blocks, and what another one sends to be kept there."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.arrays = FakeArrays()
        tasks = Tasks(FakeClock())
        links = LinkTable("b", 1, lambda member: Pending(), tasks)
        scheduler = Scheduler(self.pool, SchedulerLimits())
        self.copies = BlockCopies(scheduler, links, tasks, lambda: self.arrays, 1.0)

    def store(self, prompt: tuple[int, ...], first: int, end: int) -> BlocksStored | RefusalReason:
        """Sends the blocks from `first` to `end` of a sequence."""
        parent = b""
        for start in range(0, first * BLOCK, BLOCK):
            parent = chain_digest(parent, prompt[start : start + BLOCK])
        token_ids_CP = np.array(prompt[first * BLOCK : end * BLOCK], np.int32).reshape(-1, BLOCK)
        keys_CLPRK = np.zeros((end - first, 1, BLOCK, 1, 1), np.float32)
        result = self.copies.store(
            StoreBlocks(
                first_layer=0,
                parent=parent,
                token_ids_CP=token_ids_CP,
                keys_CLPRK=keys_CLPRK,
                values_CLPRK=keys_CLPRK,
            )
        )
        self.pool.check_integrity()
        assert isinstance(result, BlocksStored | Refusal)
        return result if isinstance(result, BlocksStored) else result.reason

    def found(self, prompt: tuple[int, ...]) -> list[tuple[int, ...]]:
        """What a sequence with this prompt would find."""
        block_ids = self.pool.match_prefix((*prompt, 0))
        self.pool.free(block_ids)
        return [self.arrays.contents[block_id] for block_id in block_ids]


def test_blocks_that_follow_one_another_are_found_by_their_tokens_and_held_by_nobody() -> None:
    bench = Bench(8)
    assert bench.store(PROMPT, 0, 3) == BlocksStored(3)
    assert bench.store(PROMPT, 3, 4) == BlocksStored(1)
    assert bench.found(PROMPT) == [(5, 6), (7, 8), (9, 10), (11, 12)]
    assert bench.pool.num_held == 0 and bench.copies.num_kept == 4


def test_what_is_here_is_not_written_again() -> None:
    bench = Bench(8)
    bench.store(PROMPT, 0, 2)
    bench.arrays.contents.clear()
    assert bench.store(PROMPT, 0, 4) == BlocksStored(4)
    assert sorted(bench.arrays.contents.values()) == [(9, 10), (11, 12)]


def test_without_those_before_a_block_is_refused() -> None:
    bench = Bench(8)
    assert bench.store(PROMPT, 1, 2) is RefusalReason.NOT_HELD
    assert bench.found(PROMPT) == [] and not bench.arrays.contents


def test_what_running_sequences_hold_is_not_touched() -> None:
    bench = Bench(4)
    held = bench.pool.allocate(2)
    assert bench.store(PROMPT, 0, 4) == BlocksStored(2)
    assert bench.store(PROMPT, 2, 4) is RefusalReason.OVERLOADED
    assert bench.found(PROMPT) == [(5, 6), (7, 8)]
    assert not set(held) & set(bench.arrays.contents)
    # A sequence that grows takes the copies back, the last one first.
    bench.pool.allocate(1)
    assert bench.found(PROMPT) == [(5, 6)]


def test_no_copy_takes_the_place_of_one_that_it_follows_on() -> None:
    bench = Bench(3)
    other = (50, 51, 52, 53)
    bench.store(other, 0, 2)
    # The other sequence's go, from its end on, and then nothing is left to give.
    assert bench.store(PROMPT, 0, 2) == BlocksStored(2)
    assert bench.found(other) == [(50, 51)]
    assert bench.store(PROMPT, 2, 4) == BlocksStored(1)
    assert bench.found(PROMPT) == [(5, 6), (7, 8), (9, 10)]
    assert bench.found(other) == []
    assert bench.store(PROMPT, 3, 4) is RefusalReason.OVERLOADED
    assert bench.found(PROMPT) == [(5, 6), (7, 8), (9, 10)]


def test_what_the_shard_cannot_hold_is_refused_as_it_says() -> None:
    bench = Bench(4)
    bench.arrays.fault = Refusal(RefusalReason.MALFORMED, "other sizes")
    assert bench.store(PROMPT, 0, 1) is RefusalReason.MALFORMED
