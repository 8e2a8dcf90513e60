"""What is no message costs its sender the connection, and nobody else anything."""

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which

import grpc
import pytest

from milliways.router.links.connect import Connector
from milliways.runtime.tasks import Pending
from milliways.wire.calls import Refusal, Result
from milliways.wire.errors import PeerLostError, RefusalReason
from milliways.wire.frames import (
    PROTOCOL_VERSION,
    CallFrame,
    FrameKind,
    HelloFrame,
    SegmentFrame,
    WelcomeFrame,
)
from milliways.wire.limits import LinkLimits
from milliways.wire.shm import make_segment
from milliways.wire.tls import TlsSettings
from tests.echo_worker import INCARNATION, LOST_LAYER, WORKER_ID, EchoServer, member_at, serving
from tests.router_side import (
    ROUTER_ID,
    TIMEOUT_S,
    Router,
    assert_outputs,
    random_call,
    running_router,
    wait_until,
)

HELLO = HelloFrame(PROTOCOL_VERSION, ROUTER_ID).pack()
NO_CALL = CallFrame(0, 0, 0, 0, 0, b"")


@pytest.fixture
def router() -> Iterator[Router]:
    with running_router() as router:
        yield router


def frame(kind: int, body: bytes) -> bytes:
    return struct.pack("<IB", len(body), kind) + body


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    received = b""
    try:
        while data := connection.recv(4096):
            received += data
    except ConnectionError:
        pass
    return received


BAD_FRAMES = {
    "noise": b"\xff" * 64,
    "no greeting": frame(FrameKind.CALL, NO_CALL.pack()),
    "another protocol": frame(FrameKind.HELLO, HelloFrame(77, ROUTER_ID).pack()),
    "name that is no text": frame(FrameKind.HELLO, HELLO[:4] + b"\xff\xfe"),
    "short greeting": frame(FrameKind.HELLO, b"x"),
    "endless frame": frame(FrameKind.HELLO, HELLO) + struct.pack("<IB", 2**32 - 1, 4),
    "unknown kind": frame(FrameKind.HELLO, HELLO) + frame(99, b""),
    "answer": frame(FrameKind.HELLO, HELLO) + frame(FrameKind.RESULT, bytes(8)),
    "segment without a file": frame(FrameKind.HELLO, HELLO)
    + frame(FrameKind.SEGMENT, SegmentFrame(0, 4096).pack()),
    "call of no segment": frame(FrameKind.HELLO, HELLO) + frame(FrameKind.CALL, NO_CALL.pack()),
    "header that is none": frame(FrameKind.HELLO, HELLO)
    + frame(FrameKind.CALL_INLINE, b"\x1a\x7f"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frame_closes_its_connection_only(router: Router, name: str) -> None:
    with serving() as (server, member):
        link = router.connect(member, "shm", host_id=server.host_id)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(f"\0{server.shm.socket_name}")
            connection.sendall(BAD_FRAMES[name])
            received = rest_of(connection)
        welcome = WelcomeFrame(PROTOCOL_VERSION, INCARNATION, False, WORKER_ID).pack()
        assert received in (b"", frame(FrameKind.WELCOME, welcome))
        call = random_call(1, 4)
        assert_outputs(router.ask(link, call), call)
        assert server.core.routers_gone == []
        router.close(link)


def test_call_outside_its_segment_closes_the_connection() -> None:
    with (
        serving() as (server, _),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
    ):
        connection.settimeout(TIMEOUT_S)
        connection.connect(f"\0{server.shm.socket_name}")
        connection.sendall(frame(FrameKind.HELLO, HELLO))
        _, file = make_segment(4096)
        segment = frame(FrameKind.SEGMENT, SegmentFrame(0, 4096).pack())
        socket.send_fds(connection, [segment], [file])
        os.close(file)
        call = CallFrame(0, 4096, 64, 0, 64, b"")
        connection.sendall(frame(FrameKind.CALL, call.pack()))
        rest_of(connection)
        wait_until(lambda: server.core.routers_gone == [ROUTER_ID])


def test_frames_arrive_whole_however_they_are_cut(router: Router) -> None:
    with serving() as (server, _):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(f"\0{server.shm.socket_name}")
            # A call without id or fence of a batch that is not there: refused, but read.
            hello = frame(FrameKind.HELLO, HELLO)
            for byte in hello + 3 * frame(FrameKind.CALL_INLINE, b"\x32\x00"):
                connection.sendall(bytes([byte]))
            connection.shutdown(socket.SHUT_WR)
            received = rest_of(connection)
        assert received.count(b"a call of ") == 3


def test_message_that_is_none_breaks_its_stream_only(router: Router) -> None:
    with serving() as (server, member):
        link = router.connect(member, "grpc")
        with grpc.insecure_channel(member.address) as channel:
            exchange = channel.stream_stream("/milliways.v1.WorkerService/Exchange")
            for noise in (b"\xff", b"\x1a\x7f", b"\x7a\xff\xff\xff\xff\x0f"):
                with pytest.raises(grpc.RpcError) as caught:
                    next(exchange(iter([noise]), timeout=TIMEOUT_S))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        call = random_call(1, 4)
        assert_outputs(router.ask(link, call), call)
        assert server.core.routers_gone == []
        router.close(link)


def test_memory_that_runs_out_only_costs_time(router: Router) -> None:
    limits = LinkLimits(first_segment_bytes=4096, max_shared_bytes=16384)
    with serving(limits=limits) as (server, member):
        link = router.connect(member, "shm", limits, server.host_id)
        kept = []
        for seed in range(12):
            call = random_call(seed, 8)
            result = router.ask(link, call)
            kept.append((result, call))
        for result, call in kept:
            assert_outputs(result, call)
        router.close(link)
        for result, call in kept:
            assert_outputs(result, call)


def make_certificates(folder: Path) -> TlsSettings:
    """An authority of its own, and one certificate that both sides show."""
    openssl = which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2"]
    command += ["-subj", "/CN=milliways", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    return TlsSettings(ca_file=str(cert), cert_file=str(cert), key_file=str(key))


def test_tls_is_mutual(router: Router, tmp_path: Path) -> None:
    tls = make_certificates(tmp_path)
    with serving(tls=tls) as (_, member):

        def connector(tls: TlsSettings | None) -> Connector:
            return Connector(router.reactor, router_id=ROUTER_ID, wanted="grpc", tls=tls)

        link = router.reactor.ask(lambda: connector(tls).connect(member), TIMEOUT_S)
        call = random_call(1, 4)
        assert_outputs(router.ask(link, call), call)
        router.close(link)
        with pytest.raises(PeerLostError):
            router.reactor.ask(lambda: connector(None).connect(member), TIMEOUT_S)


def test_server_that_stops_takes_its_links_with_it(router: Router) -> None:
    server = EchoServer()
    member = member_at(server.start())
    links = [router.connect(member, wanted, host_id=server.host_id) for wanted in ("grpc", "shm")]
    server.close()
    for link in links:
        wait_until(lambda link=link: router.begin_ask(link, random_call(1, 1)).is_done)
        with pytest.raises(PeerLostError):
            router.ask(link, random_call(1, 1))


def test_router_that_just_ends_leaves_nothing_behind() -> None:
    losts: list[Pending[Result]] = []
    with serving() as (server, member):
        with running_router() as router:
            for wanted in ("grpc", "shm"):
                link = router.connect(member, wanted, host_id=server.host_id)
                router.ask(link, random_call(1, 1))
                lost = router.begin_ask(link, replace(random_call(1, 2), layer=LOST_LAYER))
                losts.append(lost)
        assert all(isinstance(lost.error, PeerLostError) for lost in losts)
        wait_until(lambda: server.core.routers_gone == [ROUTER_ID])


def test_more_calls_than_a_worker_takes_are_refused_by_it(router: Router) -> None:
    with serving(limits=LinkLimits(max_calls_in_flight=1)) as (server, member):
        link = router.connect(member, "shm", host_id=server.host_id)
        router.begin_ask(link, replace(random_call(1, 2), layer=LOST_LAYER))
        result = router.ask(link, random_call(1, 2))
        assert isinstance(result, Refusal) and result.reason is RefusalReason.OVERLOADED
        router.close(link)
