"""The hop inside a compiled step: two processes whose native threads exchange rows.

The client runs a program of `NUM_LAYERS` exchanges, once with experts of the server and once with
its own. The difference, divided by the layers, is a hop. The experts are as small as the kernels
allow, and all of their weights are zero.
"""

import statistics
import sys
import time
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

from milliways.model.ops import native
from milliways.router.links.connect import Connector
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.reactor import Reactor
from milliways.wire.exchange import HERE, ExchangeNode, ExchangeShape, ExpertStack
from milliways.wire.limits import LinkLimits
from milliways.wire.links import CallSink
from milliways.wire.shm import local_host_id
from milliways.wire.view import Member, WorkerState
from milliways.workers.servers.intake import RouterSessions
from milliways.workers.servers.worker_server import WorkerServer

NUM_LAYERS = 16
NEAR, FAR = 0, 1
_HIDDEN = 32
# float32 sums of int8 weights; see kernels.h.
_KIND = 0
_MAX_ROWS = 2048
_MAX_RING_BYTES = 1 << 30
_TIMEOUT_S = 120.0


class _Side:
    """A node with one expert in each layer. The arrays live as long as the node."""

    def __init__(self, width: int, expert_id: int) -> None:
        self.shape = ExchangeShape(
            num_layers=NUM_LAYERS, num_experts=2, num_selected=1, width=width, item_bytes=2
        )
        self.node = ExchangeNode(self.shape, _MAX_ROWS, _MAX_RING_BYTES)
        self._panels = np.zeros(width * _HIDDEN, np.int8)
        self._scales = np.ones(width, np.float32)
        panels, scales = self._panels.ctypes.data, self._scales.ctypes.data
        self.node.set_experts(
            [
                ExpertStack(
                    layer=layer,
                    expert_ids=(expert_id,),
                    kind=_KIND,
                    num_hidden=_HIDDEN,
                    panels=(panels, panels, panels),
                    scales=(scales, scales, scales),
                    num_groups=(1, 1, 1),
                )
                for layer in range(NUM_LAYERS)
            ]
        )
        self.node.set_fence(1, 1, True)


def serve_rings(width: int, core: CallSink) -> None:
    """Serves both kinds of rings; prints the address."""
    side = _Side(width, FAR)
    reactor = Reactor(SystemClock(), make_loop=AsyncioLoop)
    server = WorkerServer(
        reactor, RouterSessions(core), worker_id="bench", incarnation=1, node=side.node
    )
    reactor.start()
    print(reactor.ask(lambda: server.start("127.0.0.1:0"), _TIMEOUT_S), flush=True)
    sys.stdin.read()


def ring_client(wanted: str, address: str, width: int) -> Callable[[int, int], list[float]]:
    """Runs programs of exchanges over one kind of ring."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # pyright: ignore
    side = _Side(width, NEAR)
    node = side.node
    reactor = Reactor(SystemClock(), make_loop=AsyncioLoop)
    reactor.start()
    member = Member(worker_id="bench", incarnation=1, address=address, state=WorkerState.READY)
    connector = Connector(
        reactor,
        router_id="bench",
        host_id=local_host_id(),
        wanted=wanted,
        limits=LinkLimits(),
        node=node,
    )
    link = reactor.ask(lambda: connector.connect(member), _TIMEOUT_S)
    assert link.exchange_link, "the link has no ring"
    node.set_patience(link.exchange_link, _TIMEOUT_S)
    targets_LE = np.full((NUM_LAYERS, 2), HERE, np.int64)
    targets_LE[:, FAR] = link.exchange_link
    node.set_plan(1, targets_LE)

    @jax.jit  # pyright: ignore[reportUnknownMemberType]
    def exchanges(rows_TD: jax.Array, ids_TA: jax.Array, where_2: jax.Array) -> jax.Array:
        for layer in range(NUM_LAYERS):
            rows_TD = native.exchange(rows_TD, ids_TA, where_2, layer)[:, 0]
        return rows_TD

    batches = iter(range(1, sys.maxsize))

    def seconds_of(num_tokens: int, expert_id: int) -> float:
        rows_TD = np.zeros((num_tokens, width), ml_dtypes.bfloat16)
        ids_TA = np.full((num_tokens, 1), expert_id, np.int32)
        where_2 = np.array((node.number, 0), np.int32)
        node.begin(next(batches), is_cautious=False)
        begin_s = time.perf_counter()
        jax.block_until_ready(exchanges(rows_TD, ids_TA, where_2))  # pyright: ignore
        seconds = time.perf_counter() - begin_s
        node.end()
        return seconds

    def measure(num_tokens: int, num_calls: int) -> list[float]:
        times = [
            (seconds_of(num_tokens, FAR), seconds_of(num_tokens, NEAR)) for _ in range(num_calls)
        ]
        near_s = statistics.median(near for _, near in times)
        return [max(far - near_s, 0.0) / NUM_LAYERS for far, _ in times]

    return measure
