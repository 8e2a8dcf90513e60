"""Every transport to a worker gives the same results, and fails calls when it breaks."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest

from milliways.model.sampling_params import SampleRow, SamplingParams
from milliways.router.links.connect import endpoints_of
from milliways.router.links.direct_link import DirectLink
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.reactor import Reactor
from milliways.v1 import worker_pb2 as pb
from milliways.wire.calls import (
    AbandonBatch,
    Abandoned,
    AdvanceBatch,
    BeginBatch,
    BlocksStored,
    Departure,
    Drawn,
    ExpertInput,
    Refusal,
    RunExperts,
    StoreBlocks,
    TokenRows,
)
from milliways.wire.errors import ConfigError, PeerLostError, RefusalReason
from milliways.wire.limits import LinkLimits
from milliways.wire.links import WorkerLink
from milliways.wire.transports import TRANSPORTS
from milliways.wire.view import Member
from milliways.workers.servers.reply_dropper import ReplyDropper
from tests.echo_worker import (
    FAULTY_LAYER,
    HELD_LAYER,
    LOGITS_LAYER,
    LOST_LAYER,
    WORKER_ID,
    EchoCore,
    drawn_token,
    member_at,
    serving,
)
from tests.router_side import (
    FENCE,
    ROUTER_ID,
    TIMEOUT_S,
    Router,
    assert_outputs,
    random_call,
    running_router,
    wait_until,
)

REPOSITORY = Path(__file__).resolve().parents[2]
REMOTE = tuple(transport.name for transport in TRANSPORTS)
# Those that also reach a worker in another process.
ACROSS_PROCESSES = REMOTE
ALL = ("direct", *REMOTE)


@pytest.fixture
def router() -> Iterator[Router]:
    with running_router() as router:
        yield router


@contextmanager
def linked(
    router: Router, wanted: str, limits: LinkLimits | None = None
) -> Iterator[tuple[WorkerLink, EchoCore]]:
    """A link to a worker in another thread, or to a core without any."""
    if wanted == "direct":
        core = EchoCore()
        yield DirectLink(WORKER_ID, core, ROUTER_ID), core
        return
    with serving(limits=limits) as (server, member):
        link = router.connect(member, wanted, limits, server.host_id)
        assert link.transport == wanted
        yield link, server.core
        router.close(link)


def tokens_of(num_rows: int) -> TokenRows:
    ids_T = np.arange(num_rows, dtype=np.int32)
    params = SamplingParams(temperature=0.3, presence_penalty=0.5)
    return TokenRows(
        token_ids_T=ids_T,
        positions_T=ids_T + 100,
        slots_T=ids_T % 2,
        block_tables_BM=np.zeros((2, 3), np.int32),
        logits_rows_W=ids_T[-1:],
        samples=(SampleRow(params=params, token_ids=(5, 6, 7), num_prompt_tokens=2),),
    )


@pytest.mark.parametrize("wanted", ALL)
def test_experts_answer_alike_over_every_transport(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, _):
        for seed, num_rows in enumerate((1, 32, 0, 256, 3)):
            for dtype in (np.float32, ml_dtypes.bfloat16):
                call = random_call(seed, num_rows, dtype=dtype)
                assert_outputs(router.ask(link, call), call)


@pytest.mark.parametrize("wanted", ALL)
def test_batch_takes_its_turns_over_every_transport(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, _):
        begun = router.ask(link, BeginBatch(3, 0, tokens_of(4), np.ones((4, 8), np.float32)))
        assert isinstance(begun, ExpertInput)
        np.testing.assert_array_equal(begun.rows_TD[:, 1], [100, 101, 102, 103])
        np.testing.assert_array_equal(begun.expert_ids_TA[:, 1], [1, 2, 1, 2])
        outputs_TAD = np.arange(16, dtype=np.float32).reshape(4, 2, 2)
        departed = router.ask(link, AdvanceBatch(3, 0, outputs_TAD))
        assert isinstance(departed, Departure)
        np.testing.assert_array_equal(departed.hidden_TD, outputs_TAD.sum(1))
        assert router.ask(link, AbandonBatch(3)) == Abandoned()
        refused = router.ask(link, AdvanceBatch(3, 1, outputs_TAD))
        assert refused == Refusal(RefusalReason.UNKNOWN_BATCH, "3")
        drawn = router.ask(link, BeginBatch(4, LOGITS_LAYER, tokens_of(1)))
        assert drawn == Drawn((drawn_token(3),))


@pytest.mark.parametrize("wanted", ALL)
def test_blocks_arrive_to_the_bit_over_every_transport(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, core):
        for num_blocks, dtype in ((1, np.float32), (3, ml_dtypes.bfloat16)):
            keys_CLPRK = np.random.default_rng(3).standard_normal((num_blocks, 2, 4, 2, 8))
            call = StoreBlocks(
                first_layer=1,
                parent=b"sixteen bytes of",
                token_ids_CP=np.arange(num_blocks * 4, dtype=np.int32).reshape(num_blocks, 4),
                keys_CLPRK=keys_CLPRK.astype(dtype),
                values_CLPRK=-keys_CLPRK.astype(dtype),
            )
            assert router.ask(link, call) == BlocksStored(num_blocks)
            (stored,) = core.stored
            core.stored.clear()
            assert (stored.first_layer, stored.parent) == (1, call.parent)
            for name in ("token_ids_CP", "keys_CLPRK", "values_CLPRK"):
                sent, came = getattr(call, name), getattr(stored, name)
                assert (came.dtype, came.shape) == (sent.dtype, sent.shape)
                assert came.tobytes() == sent.tobytes()


@pytest.mark.parametrize("wanted", REMOTE)
def test_results_stay_what_they_are_while_calls_go_on(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, _):
        calls = [random_call(seed, 16) for seed in range(20)]
        results = [router.ask(link, call) for call in calls]
        for call, result in zip(calls, results, strict=True):
            assert_outputs(result, call)


@pytest.mark.parametrize("wanted", REMOTE)
def test_many_small_calls_at_once_come_back_each_to_its_own(router: Router, wanted: str) -> None:
    limits = LinkLimits(max_calls_in_flight=8)
    with linked(router, wanted, limits) as (link, _):
        calls = [random_call(seed, seed % 5) for seed in range(500)]
        for call, result in zip(calls, router.ask_all(link, calls), strict=True):
            assert_outputs(result, call)


@pytest.mark.parametrize("wanted", REMOTE)
def test_big_calls_at_once_come_back(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, _):
        calls = [random_call(seed, 427, width=6144) for seed in range(3)]
        assert calls[0].rows_TD.nbytes > 10 << 20
        for call, result in zip(calls, router.ask_all(link, calls), strict=True):
            assert_outputs(result, call)


@pytest.mark.parametrize("wanted", REMOTE)
def test_results_may_come_in_another_order(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, _):
        held_call = replace(random_call(1, 2), layer=HELD_LAYER)
        held = router.begin_ask(link, held_call)
        call = random_call(2, 2)
        assert_outputs(router.ask(link, call), call)
        wait_until(lambda: held.is_done)
        assert_outputs(held.result(), held_call)


@pytest.mark.parametrize("wanted", ALL)
def test_fault_of_the_core_is_a_refusal(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, _):
        result = router.ask(link, replace(random_call(1, 2), layer=FAULTY_LAYER))
        assert isinstance(result, Refusal) and result.reason is RefusalReason.FAULT
        call = random_call(1, 2)
        assert_outputs(router.ask(link, call), call)


@pytest.mark.parametrize("wanted", REMOTE)
def test_call_that_does_not_fit_together_is_refused(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, _):
        rows_TD, ids_TA = np.zeros((3, 4), np.float32), np.zeros((2, 2), np.int32)
        result = router.ask(link, RunExperts(0, rows_TD, ids_TA))
        assert isinstance(result, Refusal) and result.reason is RefusalReason.MALFORMED
        foreign = replace(FENCE, router_id="router-2")
        router.ask(link, random_call(1, 2))
        result = router.ask(link, random_call(1, 2), foreign)
        assert isinstance(result, Refusal) and result.reason is RefusalReason.MALFORMED
        call = random_call(1, 2)
        assert_outputs(router.ask(link, call), call)


@pytest.mark.parametrize("wanted", ALL)
def test_closing_fails_what_is_out_and_tells_the_worker(router: Router, wanted: str) -> None:
    with linked(router, wanted) as (link, core):
        router.ask(link, random_call(1, 1))
        lost = router.begin_ask(link, replace(random_call(1, 2), layer=LOST_LAYER))
        router.close(link)
        assert isinstance(lost.error, PeerLostError) and lost.error.worker_id == WORKER_ID
        with pytest.raises(PeerLostError):
            router.ask(link, random_call(1, 1))
        wait_until(lambda: core.routers_gone == [ROUTER_ID])


@pytest.mark.parametrize("wanted", REMOTE)
def test_second_connection_of_a_router_outlives_the_first(router: Router, wanted: str) -> None:
    with serving() as (server, member):
        links = [router.connect(member, wanted, host_id=server.host_id) for _ in range(2)]
        for link in links:
            router.ask(link, random_call(1, 1))
        router.close(links[0])
        call = random_call(2, 3)
        assert_outputs(router.ask(links[1], call), call)
        assert server.core.routers_gone == []
        router.close(links[1])
        wait_until(lambda: server.core.routers_gone == [ROUTER_ID])


@contextmanager
def serving_child() -> Iterator[tuple[subprocess.Popen[str], Member, str]]:
    """A worker in a process of its own; what it says when it is ready."""
    paths = str(REPOSITORY)
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.echo_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )
    assert child.stdin and child.stdout
    try:
        address, host_id = child.stdout.readline().split()
        yield child, member_at(address), host_id
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


@pytest.mark.parametrize("wanted", ACROSS_PROCESSES)
def test_killed_worker_is_noticed_at_once(router: Router, wanted: str) -> None:
    with serving_child() as (child, member, host_id):
        link = router.connect(member, wanted, host_id=host_id)
        calls = [random_call(seed, 200) for seed in range(8)]
        for call, result in zip(calls, router.ask_all(link, calls), strict=True):
            assert_outputs(result, call)
        lost = router.begin_ask(link, replace(random_call(1, 2), layer=LOST_LAYER))
        killed_s = time.monotonic()
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: lost.is_done)
        # The keepalive alone would take longer: the break itself has to be seen.
        assert time.monotonic() - killed_s < 1.0
        assert isinstance(lost.error, PeerLostError)
        router.close(link)
        with pytest.raises(PeerLostError):
            router.connect(member, wanted, host_id=host_id)


@pytest.mark.parametrize("wanted", REMOTE)
def test_reply_that_is_to_be_lost_is_lost_and_no_other(router: Router, wanted: str) -> None:
    with serving() as (server, member):
        link = router.connect(member, wanted, host_id=server.host_id)
        dropper = ReplyDropper(server.sessions, 2)
        server.reactor.call(dropper.install)
        calls = [random_call(seed, 8) for seed in range(5)]
        lost = [router.begin_ask(link, call) for call in calls[:2]]
        for call, result in zip(calls[2:], router.ask_all(link, calls[2:]), strict=True):
            assert_outputs(result, call)
        assert not any(pending.is_done for pending in lost)
        assert server.reactor.call(dropper.remove) == 0
        assert server.sessions.sink is server.core
        router.close(link)
        for pending in lost:
            assert isinstance(pending.error, PeerLostError)


def test_another_incarnation_of_the_worker_is_not_taken_for_it(router: Router) -> None:
    with serving() as (_, member), pytest.raises(PeerLostError, match="incarnation 6 is gone"):
        router.connect(replace(member, incarnation=6), "grpc")


def test_memory_is_shared_on_one_host_only(router: Router) -> None:
    with serving() as (server, member):
        with pytest.raises(ConfigError, match="which echo offers"):
            router.connect(member, "shm", host_id="another")
        for host_id, expected in ((server.host_id, "shm"), ("another", "grpc"), ("", "grpc")):
            link = router.connect(member, "auto", host_id=host_id)
            assert link.transport == expected
            router.close(link)


@pytest.mark.parametrize("wanted", REMOTE)
def test_worker_set_to_a_transport_offers_no_other(router: Router, wanted: str) -> None:
    with serving(transport=wanted) as (server, member):
        link = router.connect(member, "auto", host_id=server.host_id)
        assert link.transport == wanted
        router.close(link)
        other = next(name for name in REMOTE if name != wanted)
        with pytest.raises(ConfigError, match=f"one of {wanted}, which echo offers"):
            router.connect(member, other, host_id=server.host_id)


def test_transport_that_cannot_be_opened_leaves_the_next_one(router: Router) -> None:
    with serving() as (server, member):
        server.reactor.call(server.shm.stop)
        link = router.connect(member, "auto", host_id=server.host_id)
        assert link.transport == "grpc"
        router.close(link)
        with pytest.raises(PeerLostError, match="refused"):
            router.connect(member, "shm", host_id=server.host_id)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (pb.TRANSPORT_UNSPECIFIED, pb.TRANSPORT_SHM),
        (pb.TRANSPORT_SHM, pb.TRANSPORT_SHM),
        (pb.TRANSPORT_GRPC, pb.TRANSPORT_GRPC),
    ],
)
def test_older_router_is_given_the_transport_that_it_wants(
    wanted: pb.Transport, expected: pb.Transport
) -> None:
    with serving() as (server, member), grpc.insecure_channel(member.address) as channel:
        hello = channel.unary_unary(
            "/milliways.v1.WorkerService/Hello",
            request_serializer=pb.HelloRequest.SerializeToString,
            response_deserializer=pb.HelloResponse.FromString,
        )
        request = pb.HelloRequest(router_id=ROUTER_ID, host_id=server.host_id, wanted=wanted)
        response = hello(request, timeout=TIMEOUT_S)
        socket_name = server.shm.socket_name if expected == pb.TRANSPORT_SHM else ""
        assert (response.transport, response.socket_name) == (expected, socket_name)


def test_older_worker_offers_grpc_and_perhaps_a_socket() -> None:
    grpc_only = pb.HelloResponse(worker_id=WORKER_ID, transport=pb.TRANSPORT_GRPC)
    assert endpoints_of(grpc_only) == {"grpc": ""}
    both = pb.HelloResponse(transport=pb.TRANSPORT_SHM, socket_name="socket")
    assert endpoints_of(both) == {"grpc": "", "shm": "socket"}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("wanted", REMOTE)
def test_nothing_is_left_open(wanted: str) -> None:
    def one_life() -> None:
        reactor = Reactor(SystemClock(), make_loop=AsyncioLoop, name="router")
        reactor.start()
        router = Router(reactor)
        with linked(router, wanted) as (link, _):
            router.ask(link, random_call(1, 5))
            router.begin_ask(link, replace(random_call(1, 2), layer=LOST_LAYER))
        reactor.close()

    # gRPC opens files of its own when it is first used, and keeps them.
    one_life()
    wait_until(lambda: threads_of_ours() == [])
    num_files = open_files()
    for _ in range(3):
        one_life()
    assert threads_of_ours() == []
    wait_until(lambda: open_files() <= num_files)


def threads_of_ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("router", "worker")]
