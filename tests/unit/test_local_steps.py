"""The thread of compiled steps: an error in it is told, and what waits for it is bounded."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from milliways.cluster.host import local_steps
from milliways.cluster.host.local_steps import LocalSteps
from milliways.runtime.clock import SystemClock
from milliways.runtime.reactor import Reactor
from milliways.wire.calls import Refusal, StoreBlocks
from milliways.wire.errors import RefusalReason
from milliways.workers.core import WorkerCore
from tests.simulation.fake_model import FakeExperts, fake_config

TIMEOUT_S = 20.0
BLOCK_BYTES = 16 << 20


class FakeNode:
    given_up = -1

    def give_up(self, batch: int) -> None:
        self.given_up = batch


@dataclass
class FakeKv:
    """Keys and values that are written when the test allows it."""

    block_bytes: int = BLOCK_BYTES
    may_write: threading.Event = field(default_factory=threading.Event)
    written: list[int] = field(default_factory=list[int])

    def blocks_fault(self, call: StoreBlocks) -> Refusal | None:
        return None

    def write_block(self, block_id: int, *arrays: np.ndarray) -> None:
        assert self.may_write.wait(TIMEOUT_S)
        self.written.append(block_id)

    def read_blocks(self, block_ids: tuple[int, ...]) -> Any:
        raise MemoryError("no memory for the copy")


class Bench:
    def __init__(self) -> None:
        self.faults: list[BaseException] = []
        self.has_failed = threading.Event()
        self.routing = Reactor(SystemClock(), name="routing")
        core = WorkerCore(
            "w", 1, FakeExperts(fake_config(num_layers=2), set()), None, self.routing.tasks
        )
        self.steps = LocalSteps(cast("Any", FakeNode()), core, self.routing, self._on_fault)
        self.kv = FakeKv()

    def _on_fault(self, error: BaseException) -> None:
        self.faults.append(error)
        self.has_failed.set()

    def close(self) -> None:
        self.kv.may_write.set()
        self.steps.close()
        self.routing.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_error_in_the_thread_is_told(bench: Bench) -> None:
    """Otherwise the router would wait for an answer that never comes."""
    bench.steps.blocks_of(cast("Any", bench.kv)).read_blocks((1,))
    assert bench.has_failed.wait(TIMEOUT_S)
    assert isinstance(bench.faults[0], MemoryError)


def test_copies_that_wait_for_a_step_are_bounded(bench: Bench) -> None:
    """A step may wait for experts that no worker holds; meanwhile other routers send blocks."""
    call = cast("StoreBlocks", None)
    one = np.zeros(1)
    num_taken = 0
    while bench.steps.blocks_of(cast("Any", bench.kv)).blocks_fault(call) is None:
        bench.steps.blocks_of(cast("Any", bench.kv)).write_block(num_taken, one, one, one)
        num_taken += 1
        assert num_taken < 100
    # One is being written.
    assert num_taken in (
        local_steps.MAX_WAITING_BYTES // BLOCK_BYTES,
        local_steps.MAX_WAITING_BYTES // BLOCK_BYTES + 1,
    )
    refusal = bench.steps.blocks_of(cast("Any", bench.kv)).blocks_fault(call)
    assert refusal is not None and refusal.reason is RefusalReason.OVERLOADED
    bench.kv.may_write.set()
    wait_until_s = threading.Event()
    for _ in range(1000):
        if len(bench.kv.written) == num_taken:
            break
        wait_until_s.wait(0.01)
    assert bench.kv.written == list(range(num_taken))
    assert bench.steps.blocks_of(cast("Any", bench.kv)).blocks_fault(call) is None
