"""Links that open a ring: whatever happens to them, nothing of it is left."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from milliways.router.links import shm_link
from milliways.router.links.connect import Connector
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.reactor import Reactor
from milliways.wire.exchange import ExchangeNode, ExchangeShape
from milliways.wire.links import WorkerLink
from milliways.wire.shm import local_host_id
from milliways.workers.servers import shm_server
from milliways.workers.servers.intake import RouterSessions
from milliways.workers.servers.worker_server import WorkerServer
from tests.echo_worker import INCARNATION, WORKER_ID, EchoCore, member_at
from tests.router_side import ROUTER_ID, assert_outputs, random_call, wait_until
from tests.router_side import Router as RouterSide

SHAPE = ExchangeShape(num_layers=2, num_experts=4, num_selected=2, width=64, item_bytes=4)
TIMEOUT_S = 20.0


@dataclass
class Sides:
    """A router and a worker that exchange rows natively."""

    router: RouterSide
    node: ExchangeNode
    served: ExchangeNode
    address: str

    def connect(self, wanted: str = "auto") -> WorkerLink:
        connector = Connector(
            self.router.reactor,
            router_id=ROUTER_ID,
            host_id=local_host_id(),
            wanted=wanted,
            node=self.node,
        )
        member = member_at(self.address)
        return self.router.reactor.ask(lambda: connector.connect(member), TIMEOUT_S)

    def assert_serves(self, link: WorkerLink) -> None:
        call = random_call(1, 4)
        assert_outputs(self.router.ask(link, call), call)


@contextmanager
def both_sides() -> Iterator[Sides]:
    worker = Reactor(SystemClock(), make_loop=AsyncioLoop, name="worker")
    routing = Reactor(SystemClock(), make_loop=AsyncioLoop, name="router")
    node, served = ExchangeNode(SHAPE, 8, 1 << 20), ExchangeNode(SHAPE, 8, 1 << 20)
    server = WorkerServer(
        worker,
        RouterSessions(EchoCore()),
        worker_id=WORKER_ID,
        incarnation=INCARNATION,
        node=served,
    )
    worker.start()
    routing.start()
    try:
        address = worker.ask(lambda: server.start("127.0.0.1:0"), TIMEOUT_S)
        yield Sides(RouterSide(routing), node, served, address)
    finally:
        worker.ask(server.stop, TIMEOUT_S)
        routing.close()
        worker.close()
        node.close()
        served.close()


@pytest.fixture
def sides() -> Iterator[Sides]:
    with both_sides() as made:
        yield made


def left_over() -> tuple[int, int]:
    """Open files, and mappings of shared memory."""
    mapped = Path("/proc/self/maps").read_text().count("/memfd:milliways")
    return len(os.listdir("/proc/self/fd")), mapped


def test_rings_of_links_that_end_leave_nothing() -> None:
    def one_life() -> None:
        with both_sides() as sides:
            for _ in range(3):
                link = sides.connect("shm")
                assert link.exchange_link and sides.served.num_rings == 1
                sides.assert_serves(link)
                sides.router.close(link)
                wait_until(lambda: sides.served.num_rings == 0)

    one_life()
    before = left_over()
    for _ in range(3):
        one_life()
    wait_until(lambda: left_over() <= before)


@pytest.mark.parametrize("what", ["make_file", "dup"])
def test_ring_that_cannot_be_made_leaves_the_next_transport(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Too many open files end neither the router nor its connection to the worker."""

    def fail(*args: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(*((shm_link, what) if what == "make_file" else (os, what)), fail)
        link = sides.connect()
    assert link.transport == "grpc" and link.exchange_link > 0
    sides.assert_serves(link)


def test_ring_that_cannot_be_served_leaves_the_next_transport(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(shm_server, "check_file", fail)
        link = sides.connect()
    assert link.transport == "grpc" and link.exchange_link > 0
    sides.assert_serves(link)
    # The ring that TCP carries.
    wait_until(lambda: sides.served.num_rings == 1)
