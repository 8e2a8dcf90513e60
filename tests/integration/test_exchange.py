"""The exchange in compiled steps, message by message: what native threads do without Python.

Two nodes in this process, one with the router's end of a ring and one with the worker's.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.ops import native
from milliways.wire.errors import RefusalReason
from milliways.wire.exchange import BY_PYTHON, HERE, CallState, RingShape
from milliways.wire.shm import make_file
from milliways.wire.tensors import MalformedMessageError
from tests.exchange_pair import (
    EPOCH,
    FAR,
    INCARNATION,
    LAYER,
    MAX_ROWS,
    NEAR,
    PATIENCE_S,
    Pair,
    Run,
    the_call,
    until,
)


@pytest.fixture
def pair(golden_dir: Path) -> Iterator[Pair]:
    made = Pair(golden_dir / "tiny")
    yield made
    made.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 3, 32])
def test_exchange_gives_the_bits_that_jax_computes(
    golden_dir: Path, dtype: str, num_rows: int
) -> None:
    pair = Pair(golden_dir / "tiny", dtype)
    rows_TD, ids_TA = pair.rows(num_rows)
    outputs = pair.begin(rows_TD, ids_TA).outputs()
    assert outputs.tobytes() == pair.expected(rows_TD, ids_TA).tobytes()
    assert pair.router.node.missing() is None
    num_calls, _, rows = pair.worker.node.counts()
    assert num_calls == 1 and rows == np.isin(ids_TA, FAR).any(1).sum()
    longest_s, num_answers = pair.router.node.take_latency(pair.link)
    assert num_answers == 1 and longest_s > 0
    pair.close()


def test_rounding_is_that_of_bfloat16() -> None:
    """The exchange rounds outputs itself; every pattern near a tie, and infinities and NaNs."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = bits.view(np.float32)
    rounded = native.to_bfloat16(values)
    wanted = np.asarray(jax.lax.reduce_precision(values, 8, 7).astype(jnp.bfloat16))
    is_nan = np.isnan(values)
    assert np.array_equal(rounded.view(np.uint16)[~is_nan], wanted.view(np.uint16)[~is_nan])
    assert np.isnan(rounded[is_nan].astype(np.float32)).all()


REFUSALS: dict[str, tuple[Callable[[Pair], None], RefusalReason]] = {
    "older placement": (lambda p: p.plan(HERE, p.link, EPOCH - 1), RefusalReason.STALE_EPOCH),
    "other incarnation": (
        lambda p: p.worker.node.set_fence(EPOCH, INCARNATION + 1, True),
        RefusalReason.STALE_INCARNATION,
    ),
    "not ready": (
        lambda p: p.worker.node.set_fence(EPOCH, INCARNATION, False),
        RefusalReason.NOT_HELD,
    ),
    "experts gone": (lambda p: p.worker.shard.keep_only(()), RefusalReason.NOT_HELD),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_worker_refuses_is_left_to_python(pair: Pair, name: str) -> None:
    change, reason = REFUSALS[name]
    rows_TD, ids_TA = pair.rows(4)
    expected = pair.expected(rows_TD, ids_TA)
    change(pair)
    run = pair.begin(rows_TD, ids_TA)
    missing = run.missing()
    assert (missing.layer, missing.batch) == (LAYER, run.batch)
    assert missing.rows_TB.tobytes() == rows_TD.tobytes()
    assert np.array_equal(missing.is_missing_N, np.isin(ids_TA, FAR).reshape(-1))
    call = pair.router.node.call(missing.number, 0, ids_TA.size)
    assert call is not None and call.state is CallState.REFUSED
    assert (call.link, RefusalReason(call.status)) == (pair.link, reason)
    assert np.array_equal(call.places, np.flatnonzero(missing.is_missing_N))
    pair.complete(missing, expected)
    assert run.outputs().tobytes() == expected.tobytes()


def test_own_experts_that_are_gone_are_left_to_python(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(4)
    expected = pair.expected(rows_TD, ids_TA)
    pair.router.shard.keep_only(())
    run = pair.begin(rows_TD, ids_TA)
    missing = run.missing()
    assert np.array_equal(missing.is_missing_N, np.isin(ids_TA, NEAR).reshape(-1))
    pair.complete(missing, expected)
    assert run.outputs().tobytes() == expected.tobytes()


def test_cautious_batch_and_experts_without_a_plan_are_left_to_python(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(3)
    run = pair.begin(rows_TD, ids_TA, is_cautious=True)
    missing = run.missing()
    assert missing.num_calls == 0
    assert np.array_equal(missing.is_missing_N, (ids_TA >= 0).reshape(-1))
    pair.give_up(run)
    pair.plan(HERE, BY_PYTHON)
    run = pair.begin(rows_TD, ids_TA)
    missing = run.missing()
    assert missing.num_calls == 0
    assert np.array_equal(missing.is_missing_N, np.isin(ids_TA, FAR).reshape(-1))
    pair.give_up(run)


def test_layer_goes_on_without_a_late_answer(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(4)
    expected = pair.expected(rows_TD, ids_TA)
    pair.router.node.set_patience(pair.link, 0.0)
    pair.worker.node.drop_answers(1)
    run = pair.begin(rows_TD, ids_TA)
    missing = run.missing()
    call = pair.router.node.call(missing.number, 0, ids_TA.size)
    assert call is not None and call.state is CallState.OPEN
    # Python has the places filled elsewhere, and the layer goes on without the answer.
    pair.complete(missing, expected)
    assert run.outputs().tobytes() == expected.tobytes()
    assert pair.router.node.is_unanswered(call)
    assert pair.router.node.take_latency(pair.link) == (0.0, 0)
    # The slot of the call stays taken; others serve.
    pair.router.node.set_patience(pair.link, PATIENCE_S)
    assert pair.begin(rows_TD, ids_TA).outputs().tobytes() == expected.tobytes()
    assert pair.router.node.is_unanswered(call)


def test_answer_that_comes_while_python_fills_is_reported(golden_dir: Path) -> None:
    pair = Pair(golden_dir / "tiny", serves=False)
    pair.router.node.set_patience(pair.link, 0.0)
    rows_TD, ids_TA = pair.rows(4)
    run = pair.begin(rows_TD, ids_TA)
    missing = run.missing()
    the_call(pair, missing, CallState.OPEN)
    pair.serve()
    the_call(pair, missing, CallState.ANSWERED)
    call = pair.router.node.call(missing.number, 0, ids_TA.size)
    expected = pair.expected(rows_TD, ids_TA)
    assert call is not None and call.rows_NB is not None
    assert call.rows_NB.tobytes() == expected.reshape(-1, pair.width)[call.places].tobytes()
    pair.router.node.resume(missing.number)
    assert run.outputs().tobytes() == expected.tobytes()
    pair.close()


def test_idle_worker_sleeps_although_a_ring_has_a_wrong_count(pair: Pair) -> None:
    """A router may be killed between a call and its count."""
    os.pwrite(pair.ring_fd, np.array([77], np.uint32).tobytes(), 0)
    rows_TD, ids_TA = pair.rows(2)
    expected = pair.expected(rows_TD, ids_TA)
    assert pair.begin(rows_TD, ids_TA).outputs().tobytes() == expected.tobytes()
    time.sleep(0.2)
    before_s = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before_s < 0.5


def test_rings_without_a_free_slot_leave_rows_to_python(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(4)
    num_slots = pair.router.node.ring_shape.num_slots
    pair.router.node.set_patience(pair.link, 0.0)
    pair.worker.node.drop_answers(num_slots)
    for _ in range(num_slots):
        run = pair.begin(rows_TD, ids_TA)
        assert run.missing().num_calls == 1
        pair.give_up(run)
    run = pair.begin(rows_TD, ids_TA)
    assert run.missing().num_calls == 0
    pair.give_up(run)


def test_loss_of_a_worker_is_seen_at_once(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(4)
    pair.worker.node.drop_answers(1)
    run = pair.begin(rows_TD, ids_TA)
    until(lambda: None if pair.worker.node.num_to_drop else True)
    assert run.is_running and pair.router.node.missing() is None
    pair.router.node.close_link(pair.link)
    missing = run.missing()
    the_call(pair, missing, CallState.LOST)
    pair.give_up(run)
    # The plan still names the link: its places are left to Python.
    run = pair.begin(rows_TD, ids_TA)
    assert run.missing().num_calls == 0
    pair.give_up(run)


def test_loss_while_python_fills_is_reported(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(4)
    pair.router.node.set_patience(pair.link, 0.0)
    pair.worker.node.drop_answers(1)
    run = pair.begin(rows_TD, ids_TA)
    missing = run.missing()
    the_call(pair, missing, CallState.OPEN)
    pair.router.node.close_link(pair.link)
    the_call(pair, missing, CallState.LOST)
    assert run.is_running
    pair.give_up(run)


def test_batch_that_was_given_up_ends_with_zeros(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(4)
    pair.worker.node.drop_answers(1)
    run = pair.begin(rows_TD, ids_TA)
    until(lambda: None if pair.worker.node.num_to_drop else True)
    pair.give_up(run)
    # Later layers of the same batch, and what was filled too late.
    late = Run(pair, run.batch, rows_TD, ids_TA)
    assert not late.outputs().any()
    pair.router.node.fill(1, np.array([0]), rows_TD[:1])
    pair.router.node.resume(1)
    expected = pair.expected(rows_TD, ids_TA)
    assert pair.begin(rows_TD, ids_TA).outputs().tobytes() == expected.tobytes()


def test_rows_that_do_not_fit_into_a_slot_are_left_to_python(pair: Pair) -> None:
    rows_TD, _ = pair.rows(MAX_ROWS + 8)
    ids_TA = np.full((len(rows_TD), pair.num_selected), -1, np.int32)
    ids_TA[:, 0] = FAR[0]
    run = pair.begin(rows_TD, ids_TA)
    assert run.missing().num_calls == 0
    pair.give_up(run)


def test_several_routers_are_served(golden_dir: Path, pair: Pair) -> None:
    """A second router shares the worker; both get their own rows."""
    other = Pair(golden_dir / "tiny")
    shape = other.router.node.ring_shape
    ring_fd = make_file(shape.num_bytes)
    pair.worker.node.attach(ring_fd, other.router.node.bell_fd, shape)
    link = other.router.node.open_link(ring_fd, pair.worker.node.bell_fd, INCARNATION)
    os.close(ring_fd)
    other.router.node.set_patience(link, PATIENCE_S)
    other.plan(HERE, link)
    for seed in range(20):
        wanted = [p.rows(3, seed=seed + i) for i, p in enumerate((pair, other))]
        runs = [p.begin(*rows) for p, rows in zip((pair, other), wanted, strict=True)]
        for p, run, rows in zip((pair, other), runs, wanted, strict=True):
            assert run.outputs().tobytes() == p.expected(*rows).tobytes()
    assert pair.worker.node.counts()[0] == 40
    other.close()


def test_detached_ring_is_not_touched(pair: Pair) -> None:
    rows_TD, ids_TA = pair.rows(4)
    pair.worker.node.detach(pair.ring)
    run = pair.begin(rows_TD, ids_TA)
    time.sleep(0.1)
    assert run.is_running and pair.worker.node.counts()[0] == 0
    pair.give_up(run)


@pytest.mark.parametrize("num_slots", [0, 65, 1 << 40])
def test_ring_of_an_impossible_shape_is_refused(pair: Pair, num_slots: int) -> None:
    shape = RingShape(num_slots=num_slots, request_bytes=64, response_bytes=64)
    with pytest.raises(MalformedMessageError):
        _ = shape.num_bytes
    ring_fd = make_file(1 << 16)
    with pytest.raises(MalformedMessageError):
        pair.worker.node.attach(ring_fd, pair.router.node.bell_fd, shape)
    os.close(ring_fd)


def test_ring_shorter_than_its_shape_is_refused(pair: Pair) -> None:
    ring_fd = make_file(4096)
    with pytest.raises(MalformedMessageError):
        pair.worker.node.attach(ring_fd, pair.router.node.bell_fd, pair.router.node.ring_shape)
    os.close(ring_fd)


def test_noise_in_a_ring_is_refused_and_harms_nobody(pair: Pair) -> None:
    """A router writes anything: the worker refuses it, and goes on serving."""
    shape = pair.router.node.ring_shape
    ring_fd = make_file(shape.num_bytes)
    bell_fd = make_file(4096)
    ring = pair.worker.node.attach(ring_fd, bell_fd, shape)
    slot_bytes = (shape.num_bytes - 4096) // shape.num_slots
    rng = np.random.default_rng(0)
    answers = 0
    for number in range(1, 200):
        slot = 4096 + int(rng.integers(shape.num_slots)) * slot_bytes
        header = rng.integers(0, 256, 64, np.uint8)
        header[:4] = np.array([1], np.uint32).view(np.uint8)
        if number % 2:
            # A sound header with ids that are not experts of this worker.
            model = pair.worker.node.shape
            fields = [1, LAYER, 1, model.num_selected, model.width, model.item_bytes]
            header[:24] = np.array(fields, np.uint32).view(np.uint8)
            header[24:40] = np.array([EPOCH, INCARNATION], np.uint64).view(np.uint8)
            ids = rng.integers(-(1 << 31), 1 << 31, model.num_selected).astype(np.int32)
            os.pwrite(ring_fd, ids.tobytes(), slot + 256)
        os.pwrite(ring_fd, header[4:].tobytes(), slot + 4)
        os.pwrite(ring_fd, header[:4].tobytes(), slot)
        os.pwrite(ring_fd, np.array([number], np.uint32).tobytes(), 0)
        # The worker's own router rings, so that it looks.
        rows_TD, ids_TA = pair.rows(2, seed=number)
        outputs = pair.begin(rows_TD, ids_TA).outputs()
        assert outputs.tobytes() == pair.expected(rows_TD, ids_TA).tobytes()
        state = np.frombuffer(os.pread(ring_fd, 4, slot), np.uint32)[0]
        answers += int(state == 2)
    assert answers
    pair.worker.node.detach(ring)
    os.close(ring_fd)
    os.close(bell_fd)
