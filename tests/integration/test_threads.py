"""Threads of a worker that meet: nothing that one of them reads changes under its hands.

The interpreter changes threads a thousand times as often as usual, so that seconds are enough.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from milliways.cluster.host.local_calls import LocalCore
from milliways.cluster.host.worker_process import Fault, WorkerProcess
from milliways.cluster.settings.config import LOOPBACK, ClusterConfig, config_from_tree
from milliways.model.runner import CacheSize
from milliways.runtime.clock import SystemClock
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.calls import (
    AbandonBatch,
    Abandoned,
    BeginBatch,
    Call,
    ExpertInput,
    Fence,
    Refusal,
    Result,
    RunExperts,
    TokenRows,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.view import ClusterView, Declared, Member, WorkerState
from milliways.workers.core import WorkerCore
from milliways.workers.devices import Device
from milliways.workers.experts import ExpertGroup
from milliways.workers.loading import ShardLoader
from tests.shards import ShardFactory

SECONDS = 3.0
OWN, STRANGER = "own", "stranger"
NUM_LAYERS, NUM_EXPERTS, NUM_BATCHES = 12, 8, 15
EVERY_EXPERT = frozenset(ExpertId(n, e) for n in range(NUM_LAYERS) for e in range(NUM_EXPERTS))


@pytest.fixture(autouse=True)
def impatient_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Hammer:
    """Threads that do something again and again, until one of them fails or time is over."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._until_s = 0.0

    def run(self, acts: Sequence[Callable[[], object]]) -> None:
        for act in acts:
            # What is compiled is compiled before the time starts.
            act()
        self._until_s = time.monotonic() + SECONDS
        threads = [threading.Thread(target=self._repeat, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.errors == []

    def _repeat(self, act: Callable[[], object]) -> None:
        while not self.errors and time.monotonic() < self._until_s:
            try:
                act()
            except BaseException as error:
                self.errors.append(error)


def remember_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a stack of experts read once, so that a second is enough for many loads."""
    load = ShardLoader._load_stack
    stacks: dict[tuple[int, tuple[int, ...]], ExpertGroup] = {}

    def remembered(
        loader: ShardLoader, layer: int, expert_ids: list[int], device: Device
    ) -> ExpertGroup:
        key = (layer, tuple(expert_ids))
        if key not in stacks:
            stacks[key] = load(loader, layer, expert_ids, device)
        return stacks[key]

    monkeypatch.setattr(ShardLoader, "_load_stack", remembered)


def test_status_and_describe_answer_while_experts_come_and_go(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_stacks(monkeypatch)
    hammer = Hammer()
    tree = {
        "model": {"path": str(golden_dir / "mini8"), "dtype": "float32"},
        "workers": {"count": 1, "kv_tokens": 64, "warm_up": False, "transport": "grpc"},
    }
    config: ClusterConfig = config_from_tree(tree)
    process = WorkerProcess(config, "worker-0", 1, LOOPBACK, hammer.errors.append)
    spawned = process.start()
    try:
        plan = ShardPlan(first_layer=0, num_layers=NUM_LAYERS, has_ends=True, experts=EVERY_EXPERT)
        half = frozenset(expert_id for expert_id in EVERY_EXPERT if expert_id.layer % 2)
        process.load(plan)

        def load_and_unload() -> None:
            process.unload(half)
            process.load(plan)

        def describe() -> None:
            existing = process.describe(spawned)
            assert existing is not None and half <= existing.held <= EVERY_EXPERT

        def status() -> None:
            assert 48 <= process.status().num_experts <= 96

        hammer.run([load_and_unload, describe, status])
        # Its attention shard is used in the router's thread alone.
        answer: Pending[Result] = Pending()
        sink = process._sessions.sink
        process._compute.call(lambda: sink.submit(begin(1), fence_of(STRANGER), answer.resolve))
        result = answer.result()
        assert isinstance(result, Refusal) and result.reason is RefusalReason.NOT_HELD
    finally:
        process.stop()


def test_router_takes_the_limits_that_a_view_declares(golden_dir: Path) -> None:
    tree = {
        "model": {"path": str(golden_dir / "mini8"), "dtype": "float32"},
        "workers": {"count": 1, "kv_tokens": 64, "warm_up": False, "transport": "grpc"},
    }
    config = config_from_tree(tree)
    faults: list[BaseException] = []
    process = WorkerProcess(config, "worker-0", 1, LOOPBACK, faults.append)
    process.start()
    try:
        values = {
            "router.max_waiting": 7,
            "router.step_timeout_s": 3.0,
            "router.request_timeout_s": 4.0,
            # Arrays have this size: it stays until the worker is started again.
            "router.max_running": 2,
        }
        declared = Declared(values=values, at_s=1.0)
        process.publish(ClusterView(placement_epoch=1, members={}, declared=declared))
        scheduler = process._router.scheduler.limits
        assert (scheduler.max_waiting, scheduler.max_running) == (7, config.router.max_running)
        assert process._dispatcher.limits.timeout_s == process._pipeline.timeout_s == 3.0
        assert process._router_server.request_timeout_s == 4.0
    finally:
        process.stop()
    assert faults == []


def begin(batch_id: int) -> BeginBatch:
    tokens = TokenRows(
        token_ids_T=np.array([5], np.int32),
        positions_T=np.array([0], np.int32),
        slots_T=np.array([0], np.int32),
        block_tables_BM=np.array([[3]], np.int32),
        logits_rows_W=np.array([], np.int32),
        samples=(),
    )
    return BeginBatch(batch_id, 0, tokens)


def fence_of(router_id: str) -> Fence:
    return Fence(
        placement_epoch=0,
        incarnation=1,
        step=1,
        timeout_s=0.0,
        router_id=router_id,
        router_incarnation=1,
    )


class Experts:
    """Experts that cost no time, so that threads meet often."""

    def fault_of(self, call: RunExperts) -> Refusal | None:
        return None

    def run(self, call: RunExperts) -> np.ndarray:
        return call.rows_TD


class TwoThreads:
    """A worker's core on its two threads."""

    def __init__(self, make_core: Callable[[Tasks], WorkerCore], on_fault: Fault) -> None:
        clock = SystemClock()
        self.compute = Reactor(clock, on_fault=on_fault, name="compute")
        self.routing = Reactor(clock, on_fault=on_fault, name="router")
        self.core = make_core(self.compute.tasks)
        # As `WorkerProcess` has it: what the shard has of the model is for its own router.
        self.core.queued.attach(None)
        self.local = LocalCore(self.core, self.compute, self.routing)
        self.compute.start()
        self.routing.start()
        self.compute.call(lambda: self.compute.tasks.start_service(self.core.serve()))

    def ask(self, call: Call) -> Result:
        """What the router of this process gets at once; in its thread."""
        results: list[Result] = []
        self.local.submit(call, fence_of(OWN), results.append)
        (result,) = results
        return result

    def queue(self, call: Call) -> Pending[Result]:
        """What a router of another process gets; in the compute thread."""
        answer: Pending[Result] = Pending()
        self.core.submit(call, fence_of(STRANGER), answer.resolve)
        return answer

    def close(self) -> None:
        self.routing.close()
        self.compute.close()


def test_router_is_lost_while_another_one_computes(golden_dir: Path) -> None:
    hammer = Hammer()
    member = Member(
        worker_id="worker-0",
        incarnation=1,
        address="",
        state=WorkerState.READY,
        num_layers=NUM_LAYERS,
        has_ends=True,
        # Batches stop for the expert that is elsewhere.
        experts=EVERY_EXPERT - {ExpertId(0, 0)},
    )
    size = CacheSize(num_blocks=16, block_size=4, max_slots=2)
    make_core = partial(ShardFactory(golden_dir / "mini8", size), member)
    threads = TwoThreads(make_core, hammer.errors.append)

    def compute_batches() -> None:
        for batch_id in range(NUM_BATCHES):
            assert isinstance(threads.ask(begin(batch_id)), ExpertInput)
        for batch_id in range(NUM_BATCHES):
            assert isinstance(threads.ask(AbandonBatch(batch_id)), Abandoned)

    def lose_routers() -> None:
        for _ in range(1000):
            threads.core.router_gone(STRANGER)

    try:
        hammer.run(
            [
                lambda: threads.routing.call(compute_batches),
                lambda: threads.compute.call(lose_routers),
            ]
        )
    finally:
        threads.close()


def test_counts_have_every_call_of_both_threads() -> None:
    hammer = Hammer()

    def make_core(tasks: Tasks) -> WorkerCore:
        core = WorkerCore("worker-0", 1, Experts(), None, tasks)
        core.fence.move(WorkerState.READY)
        return core

    threads = TwoThreads(make_core, hammer.errors.append)
    call = RunExperts(0, np.ones((1, 32), np.float32), np.array([[3, -1]], np.int32))
    num_calls = {OWN: 0, STRANGER: 0}

    def ask_directly() -> None:
        for _ in range(100):
            threads.core.direct.compute_now(call, fence_of(OWN))
        num_calls[OWN] += 100

    def queue_calls() -> Pending[Result]:
        num_calls[STRANGER] += 100
        return [threads.queue(call) for _ in range(100)][-1]

    try:
        hammer.run(
            [
                lambda: threads.routing.call(ask_directly),
                lambda: threads.compute.ask(queue_calls, 10.0),
            ]
        )
        assert threads.core.num_calls == threads.core.num_rows == sum(num_calls.values())
    finally:
        threads.close()
