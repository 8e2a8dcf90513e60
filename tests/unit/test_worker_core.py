"""A worker's decisions: what it refuses, what it computes together, what it forgets."""

import numpy as np
import pytest

from milliways.model.runner import CacheSize
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Tasks
from milliways.wire.calls import (
    AbandonBatch,
    BeginBatch,
    BlocksStored,
    Call,
    ExpertOutputs,
    Fence,
    Refusal,
    Result,
    RunExperts,
    StoreBlocks,
    TokenRows,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.placement import ExpertId
from milliways.wire.view import WorkerState
from milliways.workers.core import CoreLimits, WorkerCore
from tests.simulation.fake_model import FakeAttention, FakeExperts, fake_config

CONFIG = fake_config(num_layers=2)


class Bench:
    """A core with everything in it, whose calls are computed when the test says so."""

    def __init__(self, limits: CoreLimits | None = None) -> None:
        self.tasks = Tasks(FakeClock())
        # Not all of layer 0: batches stop there for the outputs of its experts.
        held = {ExpertId(0, 0), ExpertId(0, 1), *(ExpertId(1, e) for e in range(4))}
        self.experts = FakeExperts(CONFIG, held)
        size = CacheSize(num_blocks=8, block_size=2, max_slots=4)
        self.attention = FakeAttention(CONFIG, range(2), True, size, self.experts)
        self.core = WorkerCore("w", 1, self.experts, self.attention, self.tasks, limits)
        self.core.fence.move(WorkerState.READY)
        self.results: list[Result] = []

    def submit(self, call: Call, fence: Fence) -> None:
        self.core.submit(call, fence, self.results.append)

    def serve(self) -> None:
        task = self.tasks.start(self.core.serve())
        while self.tasks.run_ready():
            pass
        assert not task.is_done
        task.cancel()
        self.tasks.run_ready()

    def reasons(self) -> list[RefusalReason | None]:
        return [r.reason if isinstance(r, Refusal) else None for r in self.results]


def fence(step: int = 1, epoch: int = 0, router_id: str = "w", incarnation: int = 1) -> Fence:
    return Fence(
        placement_epoch=epoch,
        incarnation=1,
        step=step,
        timeout_s=0.0,
        router_id=router_id,
        router_incarnation=incarnation,
    )


def run_experts(expert: int, value: float = 1.0) -> RunExperts:
    return RunExperts(0, np.full((1, 2), value, np.float32), np.array([[expert, -1]], np.int32))


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


def test_calls_of_several_routers_to_experts_of_a_layer_are_computed_as_one() -> None:
    bench = Bench()
    for expert, router_id in enumerate(("a", "b")):
        bench.submit(run_experts(expert, 10.0 * (expert + 1)), fence(router_id=router_id))
    bench.serve()
    assert bench.core.num_merged_calls == 1
    rows = [r.rows_ND.tolist() for r in bench.results if isinstance(r, ExpertOutputs)]
    assert rows == [[[10.0, 10.0]], [[40.0, 40.0]]]


def test_a_call_that_fails_does_not_fail_those_it_was_merged_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    run = bench.experts.run

    def fail_at_13(call: RunExperts) -> np.ndarray:
        if (call.rows_TD == 13.0).any():
            raise FloatingPointError("13")
        return run(call)

    monkeypatch.setattr(bench.experts, "run", fail_at_13)
    for value in (12.0, 13.0, 14.0):
        bench.submit(run_experts(0, value), fence())
    bench.serve()
    # The one merged call was computed again in three, of which one failed for itself.
    assert [isinstance(result, ExpertOutputs) for result in bench.results] == [True, False, True]
    assert bench.reasons()[1] is RefusalReason.FAULT


def test_what_waits_while_its_placement_ages_is_refused_and_not_computed() -> None:
    bench = Bench()
    bench.submit(run_experts(1), fence())
    bench.core.fence.raise_epoch(1)
    bench.experts.held.discard(ExpertId(0, 1))
    bench.serve()
    assert bench.reasons() == [RefusalReason.STALE_EPOCH]


def test_a_step_that_was_given_up_cannot_write_into_a_later_one() -> None:
    bench = Bench()
    bench.submit(begin(7), fence(step=5))
    # It comes by a stream that the router left, behind the one it uses now.
    bench.submit(begin(6), fence(step=4))
    bench.serve()
    assert bench.reasons() == [None, RefusalReason.EXPIRED]
    assert bench.attention.num_batches == 1


def test_batches_of_earlier_steps_are_forgotten_when_a_later_one_begins() -> None:
    bench = Bench()
    for batch_id, step in ((1, 1), (2, 1), (3, 2)):
        bench.submit(begin(batch_id), fence(step=step))
    bench.serve()
    assert bench.attention.num_batches == 1


def test_a_later_life_of_a_router_counts_its_steps_from_the_beginning() -> None:
    bench = Bench()
    bench.submit(begin(9), fence(step=100, incarnation=1))
    bench.submit(begin(1), fence(step=1, incarnation=2))
    bench.submit(AbandonBatch(9), fence(step=100, incarnation=1))
    bench.serve()
    assert bench.reasons() == [None, None, None]


def test_a_full_queue_does_not_hold_up_a_call_of_the_same_process() -> None:
    bench = Bench(CoreLimits(max_waiting_calls=1))
    bench.submit(run_experts(0), fence(router_id="a"))
    bench.submit(run_experts(1), fence(router_id="b"))
    assert bench.reasons() == [RefusalReason.OVERLOADED]
    assert isinstance(bench.core.direct.compute_now(run_experts(1), fence()), ExpertOutputs)


def test_calls_to_experts_do_not_crowd_out_a_batch() -> None:
    bench = Bench(CoreLimits(max_waiting_calls=1))
    bench.submit(run_experts(0), fence(router_id="a"))
    bench.submit(begin(1), fence(router_id="b"))
    bench.submit(AbandonBatch(1), fence(router_id="b"))
    assert bench.reasons() == [RefusalReason.OVERLOADED]
    bench.serve()
    assert bench.reasons() == [RefusalReason.OVERLOADED, None, None]


def blocks() -> StoreBlocks:
    keys = np.zeros((1, 2, 2, 1, 2), np.float32)
    tokens = np.zeros((1, 2), np.int32)
    return StoreBlocks(
        first_layer=0, parent=b"", token_ids_CP=tokens, keys_CLPRK=keys, values_CLPRK=keys
    )


def test_copies_are_for_the_router_of_the_process_and_wait_for_no_call() -> None:
    bench = Bench()
    bench.submit(blocks(), fence())
    assert bench.reasons() == [RefusalReason.NOT_HELD]
    bench.core.attach_copies(lambda call, reply: reply(BlocksStored(len(call.token_ids_CP))))
    bench.submit(begin(1), fence())
    bench.submit(blocks(), fence(router_id="other"))
    assert bench.results[1:] == [BlocksStored(1)]
    bench.core.fence.raise_epoch(5)
    bench.submit(blocks(), fence(epoch=4))
    assert bench.reasons()[2:] == [RefusalReason.STALE_EPOCH]
    bench.serve()
