"""One round trip of the data plane: a client and a server for each contestant.

    uds   a floor: a blocking Unix socket that echoes bytes
    aio   a floor: a bare grpc.aio stream that echoes bytes, in its own asyncio loop
    grpc  our link over an Exchange stream; the core returns the rows as expert outputs
    shm   our link over shared memory; the core returns the rows likewise
    tcp   a floor: a blocking TCP socket that echoes bytes
    ring  an exchange inside a compiled step, over shared memory (`ring_hop`)
    carried  the same over TCP

`run_hop client CONTESTANT` starts its server and writes {"about": ...}. It then answers each line
{"tokens": 32, "calls": 10} with {"seconds": [...]} until its input ends.
"""

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import ml_dtypes
import numpy as np

from milliways.router.links.connect import Connector
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.malloc import keep_freed_blocks
from milliways.runtime.reactor import Reactor
from milliways.wire.calls import Call, ExpertOutputs, Fence, Result, RunExperts
from milliways.wire.limits import LinkLimits
from milliways.wire.links import WorkerLink
from milliways.wire.shm import local_host_id
from milliways.wire.view import Member, WorkerState
from milliways.workers.servers.intake import RouterSessions
from milliways.workers.servers.worker_server import WorkerServer

# A row of Grok-1, in bfloat16.
WIDTH = 6144
ROW_BYTES = 2 * WIDTH

_LENGTH = struct.Struct("<Q")
_ECHO = "/bench.Echo/Stream"
_TIMEOUT_S = 120.0
_FENCE = Fence(
    placement_epoch=1,
    incarnation=1,
    step=1,
    timeout_s=10.0,
    router_id="bench",
    router_incarnation=1,
)

# Takes the number of tokens and of calls; returns the seconds of each call.
Measure = Callable[[int, int], list[float]]


class EchoCore:
    """Returns the rows as they are: the same number of bytes each way, and no arithmetic."""

    def submit(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        assert isinstance(call, RunExperts)
        reply(ExpertOutputs(call.rows_TD))

    def router_gone(self, router_id: str) -> None:
        pass


def run_experts(num_tokens: int) -> RunExperts:
    """A call with a row for each token; one of a token's two experts is on this worker."""
    rows_TD = np.zeros((num_tokens, WIDTH), ml_dtypes.bfloat16)
    ids_TA = np.full((num_tokens, 2), -1, np.int32)
    ids_TA[:, 0] = 3
    return RunExperts(5, rows_TD, ids_TA)


def serve_links() -> None:
    """Serves both of our transports; prints the address."""
    reactor = Reactor(SystemClock(), make_loop=AsyncioLoop)
    sessions = RouterSessions(EchoCore())
    server = WorkerServer(reactor, sessions, worker_id="bench", incarnation=1)
    reactor.start()
    print(reactor.ask(lambda: server.start("127.0.0.1:0"), _TIMEOUT_S), flush=True)
    sys.stdin.read()


def link_client(wanted: str, address: str) -> Measure:
    """Makes calls one after another, in a task of a reactor, as a router does."""
    reactor = Reactor(SystemClock(), make_loop=AsyncioLoop)
    reactor.start()
    member = Member(worker_id="bench", incarnation=1, address=address, state=WorkerState.READY)
    limits = LinkLimits()
    connector = Connector(
        reactor, router_id="bench", host_id=local_host_id(), wanted=wanted, limits=limits
    )
    link = reactor.ask(lambda: connector.connect(member), _TIMEOUT_S)

    def measure(num_tokens: int, num_calls: int) -> list[float]:
        calls = _ask_in_turn(link, run_experts(num_tokens), num_calls)
        return reactor.ask(lambda: reactor.tasks.start(calls), _TIMEOUT_S)

    return measure


async def _ask_in_turn(link: WorkerLink, call: RunExperts, num_calls: int) -> list[float]:
    seconds: list[float] = []
    for _ in range(num_calls):
        begin_s = time.perf_counter()
        result = await link.ask(call, _FENCE)
        seconds.append(time.perf_counter() - begin_s)
        assert isinstance(result, ExpertOutputs) and result.rows_ND.nbytes == call.rows_TD.nbytes
    return seconds


def serve_uds() -> None:
    """Echoes whole messages over a blocking socket."""
    with TemporaryDirectory() as folder:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"{folder}/echo")
        listener.listen()
        print(f"{folder}/echo", flush=True)
        connection, _ = listener.accept()
        _echo(connection)


def serve_tcp() -> None:
    """Echoes whole messages over a blocking TCP socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _echo(connection)


def _echo(connection: socket.socket) -> None:
    room = memoryview(bytearray(64 << 20))
    with suppress(ConnectionError):
        while True:
            connection.sendall(_receive(connection, room))


def uds_client(address: str) -> Measure:
    """Sends and receives whole messages over a blocking socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    return _socket_client(connection)


def tcp_client(address: str) -> Measure:
    """The same over a blocking TCP socket."""
    connection = socket.create_connection(("127.0.0.1", int(address)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _socket_client(connection)


def _socket_client(connection: socket.socket) -> Measure:
    room = memoryview(bytearray(64 << 20))

    def measure(num_tokens: int, num_calls: int) -> list[float]:
        message = _LENGTH.pack(num_tokens * ROW_BYTES) + bytes(num_tokens * ROW_BYTES)
        seconds: list[float] = []
        for _ in range(num_calls):
            begin_s = time.perf_counter()
            connection.sendall(message)
            received = _receive(connection, room)
            seconds.append(time.perf_counter() - begin_s)
            assert len(received) == len(message)
        return seconds

    return measure


def _receive(connection: socket.socket, room: memoryview) -> memoryview:
    num_received = 0
    num_bytes = _LENGTH.size
    while num_received < num_bytes:
        num_new = connection.recv_into(room[num_received:])
        if not num_new:
            raise ConnectionError("closed")
        num_received += num_new
        if num_received >= _LENGTH.size:
            num_bytes = _LENGTH.size + _LENGTH.unpack_from(room)[0]
    return room[:num_bytes]


def serve_aio() -> None:
    """Echoes the messages of a stream."""

    async def echo(requests: Any, context: Any) -> None:
        # `read` is faster than iterating over the stream; the client uses it too.
        while (data := await context.read()) is not grpc.aio.EOF:  # pyright: ignore
            await context.write(data)

    async def serve() -> None:
        server = grpc.aio.server(options=LinkLimits().grpc_options())
        handler = grpc.stream_stream_rpc_method_handler(echo)  # pyright: ignore
        service = grpc.method_handlers_generic_handler("bench.Echo", {"Stream": handler})
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"127.0.0.1:{port}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(0)

    asyncio.run(serve())


def aio_client(address: str) -> Measure:
    """Writes and reads the messages of a stream, in an asyncio loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def open_stream() -> Any:
        channel = grpc.aio.insecure_channel(address, options=LinkLimits().grpc_options())
        return channel, channel.stream_stream(_ECHO)()  # pyright: ignore

    _, stream = asyncio.run_coroutine_threadsafe(open_stream(), loop).result(_TIMEOUT_S)

    async def echo(num_tokens: int, num_calls: int) -> list[float]:
        message = bytes(num_tokens * ROW_BYTES)
        seconds: list[float] = []
        for _ in range(num_calls):
            begin_s = time.perf_counter()
            await stream.write(message)
            received = await stream.read()
            seconds.append(time.perf_counter() - begin_s)
            assert len(received) == len(message)
        return seconds

    def measure(num_tokens: int, num_calls: int) -> list[float]:
        running = asyncio.run_coroutine_threadsafe(echo(num_tokens, num_calls), loop)
        return running.result(_TIMEOUT_S)

    return measure


# JAX is imported for these only.
def serve_rings() -> None:
    from milliways.benchmarks.speed.programs import ring_hop

    ring_hop.serve_rings(WIDTH, EchoCore())


def ring_client(wanted: str, address: str) -> Measure:
    from milliways.benchmarks.speed.programs import ring_hop

    return ring_hop.ring_client(wanted, address, WIDTH)


SERVERS: dict[str, Callable[[], None]] = {
    "uds": serve_uds,
    "aio": serve_aio,
    "grpc": serve_links,
    "shm": serve_links,
    "tcp": serve_tcp,
    "ring": serve_rings,
    "carried": serve_rings,
}
CLIENTS: dict[str, Callable[[str], Measure]] = {
    "uds": uds_client,
    "aio": aio_client,
    "grpc": lambda address: link_client("grpc", address),
    "shm": lambda address: link_client("shm", address),
    "tcp": tcp_client,
    "ring": lambda address: ring_client("shm", address),
    "carried": lambda address: ring_client("grpc", address),
}


def run_client(contestant: str) -> None:
    """Answers requests until the input ends."""
    command = [sys.executable, "-m", __spec__.name, "server", contestant]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    try:
        measure = CLIENTS[contestant](server.stdout.readline().strip())
        print(json.dumps({"about": contestant}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            seconds = measure(request["tokens"], request["calls"])
            print(json.dumps({"seconds": seconds}), flush=True)
    finally:
        server.kill()
        server.wait()
        sys.stdout.flush()
        # gRPC is slow to close what is still open, and nothing needs it any more.
        os._exit(0)


if __name__ == "__main__":
    role, name = sys.argv[1:]
    # For all contestants: this is a setting of the process, not a part of what is compared.
    keep_freed_blocks()
    run_client(name) if role == "client" else SERVERS[name]()
