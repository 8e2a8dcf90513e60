"""A router's connections to all workers: which are open, which are lost, what each has to answer.

`update` takes a new view. It closes connections to incarnations that ended, and opens connections
to new ones. A connection that breaks is opened again while the view still has that incarnation of
the worker: from here a broken stream and a dead process look the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from milliways.runtime.tasks import Cancelled, Pending, Signal, Task, Tasks
from milliways.wire.calls import Call, Fence, Result
from milliways.wire.errors import ConfigError, PeerLostError
from milliways.wire.links import WorkerLink
from milliways.wire.placement import ExpertId
from milliways.wire.view import EMPTY_VIEW, ClusterView, Member

RECONNECT_AFTER_S = 0.05
RECONNECT_AFTER_S_MAX = 1.0
# How far silence may stretch the time that a worker is given, and how long that is remembered.
SLOWNESS_MAX = 64.0
# What an answer takes off the memory of slower ones: half of it in 69 answers.
LATENCY_FADING = 0.99
SLOWNESS_HALF_LIFE_S = 300.0

Connect = Callable[[Member], Pending[WorkerLink]]


@dataclass(slots=True)
class _Connection:
    member: Member
    link: WorkerLink | None = None
    opening: Task[None] | None = None
    num_rows_out: int = 0
    problem: str = ""
    # Who is slow but alive must not be given up for ever: each time it was, it gets twice the time.
    slowness: float = 1.0
    slow_since_s: float = 0.0
    # The longest that it took of late; fades with every answer.
    latency_s: float | None = None
    # Others were asked in its place, and it has not answered anything since.
    is_silent: bool = False


class LinkTable:
    """Owns the links of a router; `changed` fires at each new view, opened or lost connection."""

    def __init__(self, router_id: str, incarnation: int, connect: Connect, tasks: Tasks) -> None:
        self.router_id = router_id
        self.incarnation = incarnation
        self.view: ClusterView = EMPTY_VIEW
        self.changed = Signal()
        self._connect = connect
        self._tasks = tasks
        self._connections: dict[str, _Connection] = {}

    def update(self, view: ClusterView) -> None:
        """Takes a newer view; an older one changes nothing."""
        if view.placement_epoch < self.view.placement_epoch:
            return
        self.view = view
        for worker_id, connection in list(self._connections.items()):
            member = view.members.get(worker_id)
            if (
                member is not None
                and member.can_compute
                and member.incarnation == connection.member.incarnation
            ):
                connection.member = member
            else:
                self._close(worker_id)
        for worker_id, member in view.members.items():
            if member.can_compute and worker_id not in self._connections:
                self._open(_Connection(member))
        self.changed.notify()

    def close(self) -> None:
        """Lets go of all connections."""
        for worker_id in list(self._connections):
            self._close(worker_id)

    def is_open(self, worker_id: str) -> bool:
        """Whether a worker can be asked now."""
        connection = self._connections.get(worker_id)
        return connection is not None and connection.link is not None

    def transports(self) -> dict[str, str]:
        """What carries the bytes to each worker, or why nothing does."""
        return {
            worker_id: connection.link.transport
            if connection.link
            else f"none: {connection.problem or 'opening'}"
            for worker_id, connection in sorted(self._connections.items())
        }

    def holders(self, expert_id: ExpertId) -> list[str]:
        """Workers that have an expert and can be asked now."""
        members = self.view.holders(expert_id)
        return [member.worker_id for member in members if self.is_open(member.worker_id)]

    def num_rows_out(self, worker_id: str) -> int:
        """Rows that a worker was asked for and has not answered."""
        return self._connections[worker_id].num_rows_out

    def slowness(self, worker_id: str) -> float:
        """How many times as long as others a worker may take."""
        connection = self._connections.get(worker_id)
        if connection is None or connection.slowness == 1.0:
            return 1.0
        half_lives = (self._tasks.clock.now_s() - connection.slow_since_s) / SLOWNESS_HALF_LIFE_S
        return max(1.0, connection.slowness * 0.5**half_lives)

    def incarnation_of(self, worker_id: str) -> tuple[str, int] | None:
        """The worker and incarnation that the open connection leads to; None if none is open."""
        connection = self._connections.get(worker_id)
        return (
            (worker_id, connection.member.incarnation) if connection and connection.link else None
        )

    def has_ended(self, worker_id: str, incarnation: int) -> bool:
        """Whether the view says that this incarnation_of of a worker is over."""
        member = self.view.members.get(worker_id)
        return (
            member is None
            or member.incarnation > incarnation
            or (member.incarnation == incarnation and not member.can_compute)
        )

    def latency_s(self, worker_id: str) -> float | None:
        """About the longest that a worker took to answer of late; None before it ever did."""
        connection = self._connections.get(worker_id)
        return connection.latency_s if connection is not None else None

    def is_silent(self, worker_id: str) -> bool:
        """Whether it was late and has not answered anything since."""
        return self._connections[worker_id].is_silent

    def mark_late(self, worker_id: str) -> None:
        """Others are asked in its place: it comes last until it answers."""
        connection = self._connections.get(worker_id)
        if connection is not None:
            connection.is_silent = True

    def hedged_too_early(self, worker_id: str, late_after_s: float) -> None:
        """It was late, and yet there before the others that were asked in its place."""
        connection = self._connections.get(worker_id)
        if connection is not None:
            connection.latency_s = max(connection.latency_s or 0.0, late_after_s)

    def is_local(self, worker_id: str) -> bool:
        """Whether a worker's core is in this process."""
        connection = self._connections[worker_id]
        return connection.link is not None and connection.link.transport == "direct"

    def ask(
        self,
        worker_id: str,
        call: Call,
        *,
        step: int,
        timeout_s: float,
        num_rows: int = 0,
        late_after_s: float = math.inf,
        is_timed: bool = True,
    ) -> Pending[Result]:
        """Asks a worker; fails with PeerLostError where there is no connection, or it breaks.

        An answer after `late_after_s` says nothing of how long others will take: a worker that was
        frozen is no slower than before. `hedged_too_early` has a worker waited for longer.

        What is not timed says nothing of how long others may take: nobody waits for it.
        """
        connection = self._connections.get(worker_id)
        if connection is None or connection.link is None:
            lost: Pending[Result] = Pending()
            lost.fail(PeerLostError(worker_id, "no connection there is open"))
            return lost
        fence = Fence(
            placement_epoch=self.view.placement_epoch,
            incarnation=connection.member.incarnation,
            step=step,
            timeout_s=timeout_s,
            router_id=self.router_id,
            router_incarnation=self.incarnation,
        )
        link, asked_at_s = connection.link, self._tasks.clock.now_s()
        connection.num_rows_out += num_rows
        pending = link.ask(call, fence)
        if is_timed:
            pending.when_done(
                lambda: self._answered(
                    connection, link, pending, num_rows, asked_at_s, late_after_s
                )
            )
        else:
            pending.when_done(lambda: self._look_for_loss(connection, link, pending))
        return pending

    def give_up(self, worker_id: str) -> None:
        """Breaks the connection to a worker that does not answer, and tries for a new one."""
        connection = self._connections.get(worker_id)
        if connection is not None and connection.link is not None:
            connection.slowness = min(2 * self.slowness(worker_id), SLOWNESS_MAX)
            connection.slow_since_s = self._tasks.clock.now_s()
            self._lost(connection)

    def abandon(self, worker_id: str, pending: Pending[Result], within_s: float) -> None:
        """Nobody waits for this answer any more; if it never comes, the connection is no good."""

        def look() -> None:
            # A connection that broke meanwhile has failed all that was out on it.
            if not pending.is_done:
                self.give_up(worker_id)

        timer = self._tasks.call_later(within_s, look)
        pending.when_done(timer.cancel)

    def _answered(
        self,
        connection: _Connection,
        link: WorkerLink,
        pending: Pending[Result],
        num_rows: int,
        asked_at_s: float,
        late_after_s: float,
    ) -> None:
        connection.num_rows_out -= num_rows
        if pending.error is None:
            took_s = self._tasks.clock.now_s() - asked_at_s
            if connection.latency_s is not None:
                connection.latency_s *= LATENCY_FADING
            if took_s <= late_after_s:
                connection.latency_s = max(took_s, connection.latency_s or 0.0)
            connection.is_silent = False
        self._look_for_loss(connection, link, pending)

    def _look_for_loss(
        self, connection: _Connection, link: WorkerLink, pending: Pending[Result]
    ) -> None:
        if isinstance(pending.error, PeerLostError) and connection.link is link:
            self._lost(connection)

    def _lost(self, connection: _Connection) -> None:
        worker_id = connection.member.worker_id
        if self._connections.get(worker_id) is connection:
            self._close(worker_id)
            again = _Connection(
                connection.member,
                slowness=connection.slowness,
                slow_since_s=connection.slow_since_s,
                # The same incarnation_of of the same worker: as quick as it was.
                latency_s=connection.latency_s,
            )
            self._open(again)
            self.changed.notify()

    def _open(self, connection: _Connection) -> None:
        self._connections[connection.member.worker_id] = connection
        connection.opening = self._tasks.start(self._keep_trying(connection))

    async def _keep_trying(self, connection: _Connection) -> None:
        delay_s = RECONNECT_AFTER_S
        while True:
            opening = self._connect(connection.member)
            try:
                connection.link = await opening
                connection.problem = ""
                break
            except (PeerLostError, ConfigError) as error:
                connection.problem = str(error)
                await self._tasks.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_AFTER_S_MAX)
            except Cancelled:
                # It may be open by now, or yet become so: then nobody else would close it.
                opening.when_done(partial(_close_unused, opening))
                raise
        self.changed.notify()

    def _close(self, worker_id: str) -> None:
        connection = self._connections.pop(worker_id)
        if connection.opening is not None:
            connection.opening.cancel()
        link, connection.link = connection.link, None
        if link is not None:
            link.close()


def _close_unused(opening: Pending[WorkerLink]) -> None:
    if opening.error is None:
        opening.result().close()
