"""Rings that a TCP connection carries: the same results as over shared memory, and what breaks."""

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from milliways.router.links import carried_ring, grpc_link
from milliways.router.links.carried_ring import CarriedRing, connect_ring
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.reactor import Reactor
from milliways.v1 import worker_pb2 as pb
from milliways.wire.carried import REQUEST_BYTES, RingOffer, RingRequest
from milliways.wire.errors import RefusalReason
from milliways.wire.exchange import CallState, ExchangeNode, ExchangeShape, RingShape
from milliways.wire.tensors import MalformedMessageError
from milliways.workers.servers import carried_rings
from milliways.workers.servers.carried_rings import CarriedRings
from milliways.workers.servers.grpc_server import GrpcServer
from milliways.workers.servers.intake import RouterSessions
from milliways.workers.servers.transport import ServedWorker
from tests.echo_worker import EchoCore, serving
from tests.exchange_pair import EPOCH, INCARNATION, PATIENCE_S, Pair, the_call, until
from tests.router_side import (
    TIMEOUT_S,
    assert_outputs,
    random_call,
    running_router,
    wait_until,
)

# The head of a message: SlotMessage in carrier.h.
HEAD = struct.Struct("<Q6I2Q2IQ")
MANY_ROWS = 3000


class CarriedPair(Pair):
    """A router and a worker whose ring a connection carries."""

    def connect(self) -> int:
        self.router_socket, self.worker_socket = tcp_pair()
        self.router_hung_up, write_fd = os.pipe()
        # The copies stay here, so that a test can break or misuse the connection.
        fd = os.dup(self.router_socket.fileno())
        return self.router.node.open_carried_link(fd, write_fd, INCARNATION)

    def serve(self) -> None:
        self.worker_hung_up, write_fd = os.pipe()
        fd = os.dup(self.worker_socket.fileno())
        shape = self.router.node.ring_shape
        self.ring = self.worker.node.attach_carried(fd, write_fd, shape)

    def close(self) -> None:
        super().close()
        self.router_socket.close()
        self.worker_socket.close()
        os.close(self.router_hung_up)
        if self.ring:
            os.close(self.worker_hung_up)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def has_hung_up(fd: int) -> bool:
    """Whether the other end of a pipe was closed, or will be soon."""
    ready, _, _ = select.select([fd], [], [], TIMEOUT_S)
    return bool(ready) and os.read(fd, 1) == b""


def reads_end(connection: socket.socket) -> bool:
    """Whether the other side ends a connection, now or soon."""
    connection.settimeout(TIMEOUT_S)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


@pytest.fixture
def pair(golden_dir: Path) -> Iterator[CarriedPair]:
    made = CarriedPair(golden_dir / "tiny")
    yield made
    made.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 32, MANY_ROWS])
def test_carried_ring_gives_the_bits_that_jax_computes(
    golden_dir: Path, dtype: str, num_rows: int
) -> None:
    pair = CarriedPair(golden_dir / "tiny", dtype, max_rows=MANY_ROWS)
    for seed in range(3):
        rows_TD, ids_TA = pair.rows(num_rows, seed)
        got = pair.begin(rows_TD, ids_TA).outputs()
        assert got.tobytes() == pair.expected(rows_TD, ids_TA).tobytes()
    assert pair.worker.node.counts()[0] == 3
    pair.close()


def test_refusal_comes_back_with_its_reason(pair: CarriedPair) -> None:
    pair.worker.node.set_fence(EPOCH + 1, INCARNATION, True)
    run = pair.begin(*pair.rows(3))
    missing = run.missing()
    call = pair.router.node.call(missing.number, 0, missing.is_missing_N.size)
    assert call is not None
    assert call.state is CallState.REFUSED
    assert (call.status, call.placement_epoch) == (RefusalReason.STALE_EPOCH.value, EPOCH + 1)
    pair.give_up(run)


def test_slots_are_used_again_and_again(pair: CarriedPair) -> None:
    rows_TD, ids_TA = pair.rows(2)
    expected = pair.expected(rows_TD, ids_TA).tobytes()
    for _ in range(200):
        assert pair.begin(rows_TD, ids_TA).outputs().tobytes() == expected


@pytest.mark.parametrize("side", ["router", "worker"])
def test_loss_of_the_connection_is_seen_at_once_on_both_sides(golden_dir: Path, side: str) -> None:
    pair = CarriedPair(golden_dir / "tiny")
    pair.worker.node.drop_answers(1)
    rows_TD, ids_TA = pair.rows(3)
    run = pair.begin(rows_TD, ids_TA)
    until(lambda: True if pair.worker.node.num_to_drop == 0 else None)
    ours = pair.router_socket if side == "router" else pair.worker_socket
    ours.shutdown(socket.SHUT_RDWR)
    missing = run.missing()
    the_call(pair, missing, CallState.LOST)
    assert has_hung_up(pair.router_hung_up)
    assert has_hung_up(pair.worker_hung_up)
    pair.complete(missing, pair.expected(rows_TD, ids_TA))
    assert run.outputs().tobytes() == pair.expected(rows_TD, ids_TA).tobytes()
    pair.close()


def test_worker_that_reads_nothing_holds_nobody_up(golden_dir: Path) -> None:
    pair = CarriedPair(golden_dir / "tiny", serves=False, max_rows=MANY_ROWS)
    # Less than a message fits into the buffers of the kernel.
    pair.router_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pair.router.node.set_patience(pair.link, 0.05)
    rows_TD, ids_TA = pair.rows(MANY_ROWS)
    run = pair.begin(rows_TD, ids_TA)
    missing = run.missing()
    the_call(pair, missing, CallState.OPEN)
    pair.complete(missing, pair.expected(rows_TD, ids_TA))
    run.outputs()
    # It reads at last: the rest of the message is sent, and the slot becomes free again.
    pair.serve()
    pair.router.node.set_patience(pair.link, PATIENCE_S)
    until(lambda: True if pair.worker.node.counts()[0] else None)
    assert (
        pair.begin(rows_TD, ids_TA).outputs().tobytes() == pair.expected(rows_TD, ids_TA).tobytes()
    )
    pair.close()


def request_head(pair: Pair, **changed: int) -> bytes:
    """The head of a call of one row, with some of its fields changed."""
    shape = pair.router.node.shape
    num_bytes = 64 + shape.width * shape.item_bytes
    fields = {
        "num_bytes": num_bytes,
        "slot": 0,
        "layer": 1,
        "num_rows": 1,
        "num_selected": shape.num_selected,
        "width": shape.width,
        "item_bytes": shape.item_bytes,
        "epoch": EPOCH,
        "incarnation": INCARNATION,
        "status": 0,
        "num_outputs": 0,
        "placement_epoch": 0,
    }
    return HEAD.pack(*(fields | changed).values())


@pytest.mark.parametrize(
    "changed",
    [
        {"slot": 8},
        {"slot": 1 << 31},
        {"num_rows": 0},
        {"num_rows": 2},
        {"num_rows": (1 << 32) - 1, "num_bytes": (1 << 63) - 1},
        {"num_bytes": 0},
        {"num_bytes": (1 << 64) - 1},
    ],
)
def test_worker_hangs_up_on_what_no_router_sends(
    pair: CarriedPair, changed: dict[str, int]
) -> None:
    pair.router_socket.sendall(request_head(pair, **changed))
    assert has_hung_up(pair.worker_hung_up)
    assert reads_end(pair.router_socket)


def test_worker_refuses_rows_of_another_shape(pair: CarriedPair) -> None:
    # The length is right, so the server sees them, and answers.
    head = request_head(pair, layer=1 << 20)
    pair.router_socket.sendall(head + bytes(HEAD.unpack(head)[0]))
    # The router did not ask, so it hangs up.
    assert has_hung_up(pair.router_hung_up)


def test_asking_twice_in_one_slot_ends_the_connection(golden_dir: Path) -> None:
    pair = CarriedPair(golden_dir / "tiny")
    pair.worker.node.drop_answers(1)
    head = request_head(pair)
    call = head + bytes(HEAD.unpack(head)[0])
    pair.router_socket.sendall(call + call)
    assert has_hung_up(pair.worker_hung_up)
    pair.close()


@pytest.mark.parametrize(
    "answer",
    [
        HEAD.pack(0, 8, *[0] * 10),
        HEAD.pack(0, 1, *[0] * 10),
        HEAD.pack(64, 0, *[0] * 8, 1, 0),
        HEAD.pack((1 << 64) - 1, 0, *[0] * 8, (1 << 32) - 1, 0),
        b"\xff" * 64,
    ],
)
def test_router_hangs_up_on_what_no_worker_sends(golden_dir: Path, answer: bytes) -> None:
    pair = CarriedPair(golden_dir / "tiny")
    pair.worker.node.drop_answers(1)
    rows_TD, ids_TA = pair.rows(3)
    run = pair.begin(rows_TD, ids_TA)
    until(lambda: True if pair.worker.node.num_to_drop == 0 else None)
    # Slot 0 was asked, slot 1 was not.
    pair.worker_socket.sendall(answer)
    missing = run.missing()
    the_call(pair, missing, CallState.LOST)
    pair.give_up(run)
    pair.close()


def test_one_bad_router_does_not_disturb_another(golden_dir: Path, pair: CarriedPair) -> None:
    other = CarriedPair(golden_dir / "tiny", serves=False)
    near, far = tcp_pair()
    read_fd, write_fd = os.pipe()
    shape = other.router.node.ring_shape
    ring = pair.worker.node.attach_carried(os.dup(far.fileno()), write_fd, shape)
    near.sendall(b"\xff" * 4096)
    assert has_hung_up(read_fd)
    rows_TD, ids_TA = pair.rows(3)
    expected = pair.expected(rows_TD, ids_TA).tobytes()
    assert pair.begin(rows_TD, ids_TA).outputs().tobytes() == expected
    pair.worker.node.detach(ring)
    os.close(read_fd)
    near.close()
    far.close()
    other.close()


def test_closing_either_end_leaves_no_descriptor(golden_dir: Path) -> None:
    def one_life() -> None:
        pair = CarriedPair(golden_dir / "tiny")
        pair.begin(*pair.rows(2)).outputs()
        pair.worker.node.detach(pair.ring)
        pair.router.node.close_link(pair.link)
        assert has_hung_up(pair.router_hung_up)
        assert has_hung_up(pair.worker_hung_up)
        pair.close()

    one_life()
    num_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        one_life()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= num_files)


# The greeting, in Python.

SHAPE = ExchangeShape(num_layers=2, num_experts=4, num_selected=2, width=16, item_bytes=4)


class Greeting:
    """A worker that listens for carried rings, and a router's node, in one reactor's thread."""

    def __init__(self, *, is_encrypted: bool = False) -> None:
        self.reactor = Reactor(SystemClock(), make_loop=AsyncioLoop, name="greeting")
        self.reactor.start()
        self.router, self.worker = ExchangeNode(SHAPE, 8, 1 << 20), ExchangeNode(SHAPE, 8, 1 << 20)
        served = ServedWorker(
            reactor=self.reactor,
            sessions=RouterSessions(EchoCore()),
            worker_id="w",
            incarnation=1,
            node=self.worker,
            is_encrypted=is_encrypted,
        )
        self.server = GrpcServer(served)
        self.rings = CarriedRings(served, self.worker)
        self.reactor.call(lambda: self.rings.start("127.0.0.1"))
        self.num_lost = 0

    def offer(self) -> RingOffer:
        offer = self.reactor.call(self.rings.offer)
        assert offer is not None
        return offer

    def connect(self, offer: RingOffer) -> CarriedRing:
        def ask():
            address = "127.0.0.1:1"
            return self.reactor.run_in_loop(connect_ring(address, offer, self.router))

        connection = self.reactor.ask(ask, TIMEOUT_S)
        return self.reactor.call(
            lambda: CarriedRing(self.reactor, self.router, connection, 1, self._on_lost)
        )

    def _on_lost(self) -> None:
        self.num_lost += 1

    def close(self) -> None:
        self.reactor.close()
        self.router.close()
        self.worker.close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(carried_ring, "_CONNECT_TIMEOUT_S", TIMEOUT_S)


@pytest.fixture
def greeting() -> Iterator[Greeting]:
    made = Greeting()
    yield made
    made.close()


def test_ticket_opens_one_ring(greeting: Greeting) -> None:
    offer = greeting.offer()
    assert RingOffer.from_text(offer.to_text()) == offer
    ring = greeting.connect(offer)
    wait_until(lambda: greeting.worker.num_rings == 1)
    with pytest.raises(OSError, match="answered b''"):
        greeting.connect(offer)
    greeting.reactor.call(ring.close)
    wait_until(lambda: greeting.worker.num_rings == 0)
    assert greeting.num_lost == 0


def test_worker_that_stops_is_lost(greeting: Greeting) -> None:
    ring = greeting.connect(greeting.offer())
    wait_until(lambda: greeting.worker.num_rings == 1)
    greeting.reactor.call(greeting.rings.stop)
    wait_until(lambda: greeting.num_lost == 1)
    greeting.reactor.call(ring.close)
    assert greeting.worker.num_rings == 0


def test_link_opens_a_ring_beside_its_stream_and_loses_both(greeting: Greeting) -> None:
    with running_router() as router, serving(node=greeting.worker) as (_, member):
        link = router.connect(member, "grpc", node=greeting.router)
        assert link.exchange_link > 0
        wait_until(lambda: greeting.worker.num_rings == 1)
        call = random_call(1, 3)
        assert_outputs(router.ask(link, call), call)
        router.close(link)
        wait_until(lambda: greeting.worker.num_rings == 0)


def test_ring_that_cannot_be_opened_is_tried_again(
    greeting: Greeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers: list[RingOffer] = []

    async def fails_twice(address: str, offer: RingOffer, node: ExchangeNode) -> socket.socket:
        offers.append(offer)
        if len(offers) <= 2:
            raise TimeoutError("the network is busy")
        return await connect_ring(address, offer, node)

    monkeypatch.setattr(grpc_link, "connect_ring", fails_twice)
    monkeypatch.setattr(grpc_link, "_TRY_AGAIN_AFTER_S", 0.01)
    with running_router() as router, serving(node=greeting.worker) as (_, member):
        link = router.connect(member, "grpc", node=greeting.router)
        # Calls go by the stream meanwhile.
        call = random_call(1, 3)
        assert_outputs(router.ask(link, call), call)
        wait_until(lambda: link.exchange_link > 0 and greeting.worker.num_rings == 1)
        assert len({offer.ticket for offer in offers}) == 3
        router.close(link)


def test_ring_without_a_free_descriptor_leaves_the_stream(
    greeting: Greeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_file(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    with running_router() as router, serving(node=greeting.worker) as (_, member):
        with monkeypatch.context() as patch:
            patch.setattr("os.pipe2", no_file)
            link = router.connect(member, "grpc", node=greeting.router)
            assert link.exchange_link == 0
            call = random_call(1, 3)
            assert_outputs(router.ask(link, call), call)
        wait_until(lambda: link.exchange_link > 0)
        router.close(link)


def test_link_that_closes_stops_trying_for_a_ring(
    greeting: Greeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(address: str, offer: RingOffer, node: ExchangeNode) -> socket.socket:
        raise ConnectionRefusedError

    monkeypatch.setattr(grpc_link, "connect_ring", fails)
    # `running_router` asserts that no task is left.
    with running_router() as router, serving(node=greeting.worker) as (_, member):
        link = router.connect(member, "grpc", node=greeting.router)
        assert link.exchange_link == 0
        router.close(link)


@pytest.mark.parametrize(
    "data",
    [
        bytes(REQUEST_BYTES),
        RingRequest(bytes(16), RingShape(num_slots=8, request_bytes=64, response_bytes=64)).pack(),
        b"GET / HTTP/1.1\r\nhost: somewhere\r\nuser-agent: nobody\r\n\r\n",
    ],
)
def test_strangers_are_hung_up_on(greeting: Greeting, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", greeting.offer().port)) as stranger:
        stranger.sendall(data)
        assert reads_end(stranger)
    assert greeting.worker.num_rings == 0
    greeting.reactor.call(greeting.connect(greeting.offer()).close)


def test_silent_stranger_does_not_stay(greeting: Greeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried_rings, "_GREETING_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", greeting.offer().port)) as stranger:
        stranger.sendall(b"\x01")
        assert reads_end(stranger)


@pytest.mark.parametrize("num_slots", [0, 1 << 20, 1 << 62])
def test_ring_of_an_impossible_size_is_refused(greeting: Greeting, num_slots: int) -> None:
    offer = greeting.offer()
    shape = RingShape(num_slots=num_slots, request_bytes=64, response_bytes=64)
    with socket.create_connection(("127.0.0.1", offer.port)) as router:
        router.sendall(RingRequest(offer.ticket, shape).pack())
        assert reads_end(router)
    assert greeting.worker.num_rings == 0


@pytest.mark.parametrize("text", ["", "1", "1/", "0/" + "00" * 16, "70000/" + "00" * 16, "x/y"])
def test_malformed_offer_is_refused(text: str) -> None:
    with pytest.raises(MalformedMessageError):
        RingOffer.from_text(text)


def test_nothing_is_offered_where_connections_are_encrypted() -> None:
    for is_encrypted in (False, True):
        greeting = Greeting(is_encrypted=is_encrypted)
        greeting.reactor.call(lambda g=greeting: g.server.start("127.0.0.1"))
        text = greeting.reactor.call(lambda g=greeting: g.server.endpoint_for(pb.HelloRequest()))
        assert (text == "") is is_encrypted
        greeting.close()
