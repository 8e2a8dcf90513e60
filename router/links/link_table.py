"""A router's connections to all workers: which are open, which broke, and what each has to answer.

`update` takes a new view. It closes connections to incarnations that ended, and opens connections
to new ones. A connection that breaks is opened again as long as the view has that incarnation of
the worker: a router cannot tell a broken stream from a dead process.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from milliways.runtime.tasks import Cancelled, Pending, Signal, Task, Tasks
from milliways.wire.calls import Call, Fence, Result
from milliways.wire.errors import ConfigError, PeerLostError
from milliways.wire.latency import LatencyEstimate
from milliways.wire.links import WorkerLink
from milliways.wire.placement import ExpertId
from milliways.wire.view import EMPTY_VIEW, ClusterView, Member

RECONNECT_AFTER_S = 0.05
RECONNECT_AFTER_S_MAX = 1.0
# The time limits of a worker that did not answer in time are multiplied, at most by this number.
# The factor halves in each half-life.
SLOWNESS_MAX = 64.0
SLOWNESS_HALF_LIFE_S = 300.0
# Each answer fades the earlier latencies: they count half after 69 answers.
LATENCY_FADING = 0.99

Connect = Callable[[Member], Pending[WorkerLink]]


@dataclass(slots=True)
class _Peer:
    """One incarnation of a worker, and what this router knows of it.

    Invariant: while it is in the table, `link` is open, or the task `opening` tries to open it.
    """

    member: Member
    link: WorkerLink | None = None
    opening: Task[None] | None = None
    # Rows of the calls that it has not answered.
    num_rows_out: int = 0
    # Why the last attempt to connect failed; empty if it did not.
    problem: str = ""
    # Doubles each time that it does not answer in time, so that a slow worker is not given up again
    # and again; `slow_since_s` is when that happened last.
    slowness: float = 1.0
    slow_since_s: float = 0.0
    latency: LatencyEstimate = field(default_factory=LatencyEstimate)
    # Whether another worker was asked instead of this one, which has answered nothing since.
    is_silent: bool = False


class LinkTable:
    """Owns the links of a router. `changed` fires at each new view, opened or lost connection.

    Invariant: until `close`, `_peers` has exactly one entry for each member of `view` that can
    compute, and it is for the incarnation that the view names. The epoch of `view` never goes back.
    After `close` no link is open and none is being opened.
    """

    def __init__(self, router_id: str, incarnation: int, connect: Connect, tasks: Tasks) -> None:
        self.router_id = router_id
        self.incarnation = incarnation
        self.view: ClusterView = EMPTY_VIEW
        self.changed = Signal()
        self._connect = connect
        self._tasks = tasks
        self._peers: dict[str, _Peer] = {}

    def update(self, view: ClusterView) -> None:
        """Takes a newer view; an older one changes nothing."""
        if view.placement_epoch < self.view.placement_epoch:
            return
        self.view = view
        for worker_id, peer in list(self._peers.items()):
            member = view.members.get(worker_id)
            if (
                member is not None
                and member.can_compute
                and member.incarnation == peer.member.incarnation
            ):
                peer.member = member
            else:
                self._close(worker_id)
        for worker_id, member in view.members.items():
            if member.can_compute and worker_id not in self._peers:
                self._open(_Peer(member))
        self.changed.notify()

    def close(self) -> None:
        """Closes all connections."""
        for worker_id in list(self._peers):
            self._close(worker_id)

    def is_open(self, worker_id: str) -> bool:
        """Whether a worker can be asked now."""
        peer = self._peers.get(worker_id)
        return peer is not None and peer.link is not None

    def transports(self) -> dict[str, str]:
        """The transport of the link to each worker, or the reason why there is no link.

        `+ring` follows if rows of compiled steps go to the worker without Python.
        """
        return {
            worker_id: f"{peer.link.transport}{'+ring' if peer.link.exchange_link else ''}"
            if peer.link
            else f"none: {peer.problem or 'opening'}"
            for worker_id, peer in sorted(self._peers.items())
        }

    def holders(self, expert_id: ExpertId) -> list[str]:
        """Workers that have an expert and can be asked now."""
        members = self.view.holders(expert_id)
        return [member.worker_id for member in members if self.is_open(member.worker_id)]

    def num_rows_out(self, worker_id: str) -> int:
        """Rows that a worker was asked for and has not answered."""
        return self._peers[worker_id].num_rows_out

    def slowness(self, worker_id: str) -> float:
        """The factor on a worker's time limits; 1 unless it recently failed to answer in time."""
        peer = self._peers.get(worker_id)
        if peer is None or peer.slowness == 1.0:
            return 1.0
        half_lives = (self._tasks.clock.now_s() - peer.slow_since_s) / SLOWNESS_HALF_LIFE_S
        return max(1.0, peer.slowness * 0.5**half_lives)

    def exchange_links(self) -> dict[str, int]:
        """The numbers of the links that have a ring, by worker; see `wire.exchange`."""
        return {
            worker_id: peer.link.exchange_link
            for worker_id, peer in self._peers.items()
            if peer.link is not None and peer.link.exchange_link
        }

    def shares_memory(self, worker_id: str) -> bool:
        """Whether the link to a worker is one of shared memory."""
        peer = self._peers.get(worker_id)
        return peer is not None and peer.link is not None and peer.link.transport == "shm"

    def note_latency(self, worker_id: str, longest_s: float, num_answers: int) -> None:
        """A worker answered so many calls that were not asked here, the slowest in `longest_s`."""
        peer = self._peers.get(worker_id)
        if peer is not None:
            fading = LATENCY_FADING**num_answers
            peer.latency.observe(longest_s, fading=fading, counts=True)
            peer.is_silent = False

    def follow(
        self,
        worker_id: str,
        exchange_link: int,
        pending: Pending[Result],
        *,
        num_rows: int,
        waited_s: float,
        late_after_s: float,
    ) -> None:
        """Treats a call like those of `ask` that was sent over the ring of a link `waited_s` ago.

        Without effect if the link is not open any more: it says nothing of a newer one.
        """
        peer = self._peers.get(worker_id)
        if peer is None or peer.link is None or peer.link.exchange_link != exchange_link:
            return
        link, asked_at_s = peer.link, self._tasks.clock.now_s() - waited_s
        peer.num_rows_out += num_rows
        pending.when_done(
            lambda: self._answered(peer, link, pending, num_rows, asked_at_s, late_after_s)
        )

    def incarnation_of(self, worker_id: str) -> tuple[str, int] | None:
        """The worker and incarnation that the open connection leads to; None if none is open."""
        peer = self._peers.get(worker_id)
        return (worker_id, peer.member.incarnation) if peer and peer.link else None

    def has_ended(self, worker_id: str, incarnation: int) -> bool:
        """Whether this incarnation of a worker has ended, according to the view."""
        member = self.view.members.get(worker_id)
        return (
            member is None
            or member.incarnation > incarnation
            or (member.incarnation == incarnation and not member.can_compute)
        )

    def latency_s(self, worker_id: str) -> float | None:
        """The longest recent answer time of a worker; None before its first answer."""
        peer = self._peers.get(worker_id)
        return peer.latency.longest_s if peer is not None else None

    def is_silent(self, worker_id: str) -> bool:
        """Whether another worker was asked instead of this one, which has not answered since."""
        return self._peers[worker_id].is_silent

    def mark_late(self, worker_id: str) -> None:
        """Others are asked instead of this worker. It is chosen last until it answers."""
        peer = self._peers.get(worker_id)
        if peer is not None:
            peer.is_silent = True

    def hedged_too_early(self, worker_id: str, late_after_s: float) -> None:
        """Others were asked after `late_after_s`, and yet this worker answered first."""
        peer = self._peers.get(worker_id)
        if peer is not None:
            peer.latency.raise_to(late_after_s)

    def is_local(self, worker_id: str) -> bool:
        """Whether a worker's core is in this process."""
        link = self._peers[worker_id].link
        return link is not None and link.is_local

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
        """Asks a worker; fails with PeerLostError if no connection is open, or if it breaks.

        An answer after `late_after_s` does not raise the worker's latency: a process that was
        frozen is no slower than before. `hedged_too_early` raises it if the wait was too short.

        An answer that is not timed changes nothing that is known of the worker.
        """
        peer = self._peers.get(worker_id)
        if peer is None or peer.link is None:
            lost: Pending[Result] = Pending()
            lost.fail(PeerLostError(worker_id, "no connection is open"))
            return lost
        fence = Fence(
            placement_epoch=self.view.placement_epoch,
            incarnation=peer.member.incarnation,
            step=step,
            timeout_s=timeout_s,
            router_id=self.router_id,
            router_incarnation=self.incarnation,
        )
        link, asked_at_s = peer.link, self._tasks.clock.now_s()
        peer.num_rows_out += num_rows
        pending = link.ask(call, fence)
        if is_timed:
            pending.when_done(
                lambda: self._answered(peer, link, pending, num_rows, asked_at_s, late_after_s)
            )
        else:
            pending.when_done(lambda: self._look_for_loss(peer, link, pending))
        return pending

    def give_up(self, worker_id: str) -> None:
        """Breaks the connection to a worker that does not answer, and opens a new one."""
        peer = self._peers.get(worker_id)
        if peer is not None and peer.link is not None:
            peer.slowness = min(2 * self.slowness(worker_id), SLOWNESS_MAX)
            peer.slow_since_s = self._tasks.clock.now_s()
            self._lost(peer)

    def abandon(self, worker_id: str, pending: Pending[Result], within_s: float) -> None:
        """No caller needs this answer. If it does not arrive `within_s`, gives the worker up."""

        def look() -> None:
            # If the connection broke meanwhile, all calls on it are done: they failed.
            if not pending.is_done:
                self.give_up(worker_id)

        timer = self._tasks.call_later(within_s, look)
        pending.when_done(timer.cancel)

    def _answered(
        self,
        peer: _Peer,
        link: WorkerLink,
        pending: Pending[Result],
        num_rows: int,
        asked_at_s: float,
        late_after_s: float,
    ) -> None:
        peer.num_rows_out -= num_rows
        if pending.error is None:
            took_s = self._tasks.clock.now_s() - asked_at_s
            peer.latency.observe(took_s, fading=LATENCY_FADING, counts=took_s <= late_after_s)
            peer.is_silent = False
        self._look_for_loss(peer, link, pending)

    def _look_for_loss(self, peer: _Peer, link: WorkerLink, pending: Pending[Result]) -> None:
        if isinstance(pending.error, PeerLostError) and peer.link is link:
            self._lost(peer)

    def _lost(self, peer: _Peer) -> None:
        worker_id = peer.member.worker_id
        if self._peers.get(worker_id) is peer:
            self._close(worker_id)
            # The incarnation is the same, so what is known of its speed stays valid.
            again = _Peer(
                peer.member,
                slowness=peer.slowness,
                slow_since_s=peer.slow_since_s,
                latency=peer.latency,
            )
            self._open(again)
            self.changed.notify()

    def _open(self, peer: _Peer) -> None:
        self._peers[peer.member.worker_id] = peer
        peer.opening = self._tasks.start(self._keep_trying(peer))

    async def _keep_trying(self, peer: _Peer) -> None:
        delay_s = RECONNECT_AFTER_S
        while True:
            opening = self._connect(peer.member)
            try:
                peer.link = await opening
                peer.problem = ""
                break
            except (PeerLostError, ConfigError) as error:
                peer.problem = str(error)
                await self._tasks.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_AFTER_S_MAX)
            except Cancelled:
                # The link may be open by now, or open later. Nothing else would close it.
                opening.when_done(partial(_close_unused, opening))
                raise
        self.changed.notify()

    def _close(self, worker_id: str) -> None:
        peer = self._peers.pop(worker_id)
        if peer.opening is not None:
            peer.opening.cancel()
        link, peer.link = peer.link, None
        if link is not None:
            link.close()


def _close_unused(opening: Pending[WorkerLink]) -> None:
    if opening.error is None:
        opening.result().close()
