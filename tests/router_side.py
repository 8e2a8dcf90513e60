"""A router's side for tests of transports: its reactor, its calls, and the expected results."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from milliways.router.links.connect import Connector
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.wire.calls import Call, ExpertOutputs, Fence, Result, RunExperts
from milliways.wire.exchange import ExchangeNode
from milliways.wire.limits import LinkLimits
from milliways.wire.links import WorkerLink
from milliways.wire.view import Member
from tests.echo_worker import INCARNATION, expert_outputs

ROUTER_ID = "router-1"
FENCE = Fence(
    placement_epoch=5,
    incarnation=INCARNATION,
    step=9,
    timeout_s=30.0,
    router_id=ROUTER_ID,
    router_incarnation=2,
)
TIMEOUT_S = 20.0


@dataclass
class Router:
    """A router's reactor, used from a test's thread."""

    reactor: Reactor

    def connect(
        self,
        member: Member,
        wanted: str,
        limits: LinkLimits | None = None,
        host_id: str = "",
        node: ExchangeNode | None = None,
    ) -> WorkerLink:
        connector = Connector(
            self.reactor,
            router_id=ROUTER_ID,
            host_id=host_id,
            wanted=wanted,
            limits=limits,
            node=node,
        )
        return self.reactor.ask(lambda: connector.connect(member), TIMEOUT_S)

    def ask(self, link: WorkerLink, call: Call, fence: Fence = FENCE) -> Result:
        return self.reactor.ask(lambda: link.ask(call, fence), TIMEOUT_S)

    def ask_all(self, link: WorkerLink, calls: list[Call]) -> list[Result]:
        """Sends all calls at once; returns their results in order."""

        async def one(call: Call) -> Result:
            return await link.ask(call, FENCE)

        tasks = self.reactor.tasks
        return self.reactor.ask(
            lambda: tasks.start(tasks.gather(one(call) for call in calls)), TIMEOUT_S
        )

    def begin_ask(self, link: WorkerLink, call: Call) -> Pending[Result]:
        return self.reactor.call(lambda: link.ask(call, FENCE))

    def close(self, link: WorkerLink) -> None:
        self.reactor.call(link.close)


@contextmanager
def running_router() -> Iterator[Router]:
    """A router in a thread; asserts that no task is left at the end."""
    reactor = Reactor(SystemClock(), make_loop=AsyncioLoop, name="router")
    reactor.start()
    yield Router(reactor)
    reactor.close()
    assert reactor.tasks.num_alive == 0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {TIMEOUT_S:g} s"
        time.sleep(0.005)


def random_call(seed: int, num_rows: int, width: int = 64, dtype: type = np.float32) -> RunExperts:
    rng = np.random.default_rng(seed)
    rows_TD = rng.standard_normal((num_rows, width)).astype(np.float32).astype(dtype)
    ids_TA = rng.integers(-1, 8, (num_rows, 2), dtype=np.int32)
    return RunExperts(seed % 64, rows_TD, ids_TA)


def assert_outputs(result: Result, call: RunExperts) -> None:
    assert isinstance(result, ExpertOutputs)
    expected_ND = expert_outputs(call.rows_TD, call.expert_ids_TA)
    assert result.rows_ND.dtype == expected_ND.dtype
    assert result.rows_ND.tobytes() == expected_ND.tobytes()
