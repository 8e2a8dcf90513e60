"""An ingress: it keeps what was delivered and carries requests on elsewhere.

The life of a request here: it is sent to a router; tokens that come back are written down; when the
router dies, drains, refuses or is lost to the view, the request goes with all that was delivered to
another. Nobody but the journal knows what the client has.

When the ingress dies, its clients send their requests again to the next, under the same ids, and it
has them computed from the start: what a client has already must come once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from cluster.errors import ClusterError, DeadlineError, RetryLaterError
from cluster.view import EMPTY_VIEW, ClusterView
from model.sampling_params import SampledToken
from router.admission import RoutedRequest
from router.request import GenerateRequest
from router.sequence import PromptScores, TokenEvent
from tests.memory_cluster import Channel, MemoryCluster, Process
from tests.simulation.fake_model import Stream

RETRY_S = 0.02
RETRY_S_MAX = 1.0


@dataclass(slots=True)
class Journal:
    """A request, and everything that its client was told."""

    request_id: str
    request: GenerateRequest
    deadline_s: float
    delivered: dict[int, list[TokenEvent]] = field(default_factory=dict[int, list[TokenEvent]])
    scores: list[SampledToken] = field(default_factory=list[SampledToken])
    is_done: bool = False
    is_cancelled: bool = False
    error: Exception | None = None
    num_attempts: int = 0
    # Who has copies of its keys and values, as it was told.
    standby_id: str = ""

    def tell_scores(self, scores: PromptScores) -> None:
        assert scores.position == len(self.scores) + 1, "a score twice, or left out"
        self.scores += scores.tokens

    def tell(self, event: TokenEvent) -> None:
        events = self.delivered.setdefault(event.sample_index, [])
        assert not events or events[-1].finish_reason is None, "a token after the last"
        assert len(self.scores) == self.request.num_to_score, "a token before the scores"
        events.append(event)

    def streams(self) -> list[Stream]:
        return [stream_of(self.delivered.get(i, [])) for i in range(self.request.num_samples)]

    def routed(self, now_s: float) -> RoutedRequest:
        """The request as it is carried on."""
        return RoutedRequest(
            request_id=self.request_id,
            request=self.request,
            timeout_s=max(1e-3, self.deadline_s - now_s),
            delivered={
                index: tuple(event.token_id for event in events)
                for index, events in self.delivered.items()
                if events[-1].finish_reason is None
            },
            finished=frozenset(
                index
                for index, events in self.delivered.items()
                if events[-1].finish_reason is not None
            ),
            num_scored=len(self.scores),
        )


def stream_of(events: Sequence[TokenEvent]) -> Stream:
    tokens = tuple(
        SampledToken(
            token_id=event.token_id,
            logprob=event.logprob,
            top_logprobs=event.top_logprobs,
            is_valid=True,
        )
        for event in events
    )
    return Stream(
        tokens,
        "".join(event.text for event in events),
        events[-1].finish_reason if events else None,
    )


class RequestStream:
    """One attempt: a listener in the router's process, whose words come to the ingress in order."""

    def __init__(self, ingress: "Ingress", journal: Journal, router: Process) -> None:
        self.router = router
        self.journal = journal
        self.is_over = False
        self._ingress = ingress
        network = ingress.cluster.network
        self.there = Channel(ingress.process, router, network)
        self._back = Channel(router, ingress.process, network)

    def open(self, routed: RoutedRequest) -> None:
        self.there.send(lambda: self._submit(routed))

    def close(self) -> None:
        """The client is gone, or listens elsewhere."""
        self.is_over = True
        self.there.send(self._cancel)

    def break_off(self) -> None:
        """The ingress died; the router notices."""
        self.is_over = True
        network = self._ingress.cluster.network
        notice = Channel(self.router, self.router, network)
        network.tasks.call_later(network.detection_s(), lambda: notice.send(self._cancel))

    def scored(self, scores: PromptScores) -> None:
        self._back.send(lambda: self._if_not_over(lambda: self.journal.tell_scores(scores)))

    def tokens(self, events: Sequence[TokenEvent]) -> None:
        self._tell_standby()
        self._back.send(lambda: self._if_not_over(lambda: self._ingress.heard(self, events)))

    def ended(self, error: ClusterError | None) -> None:
        self._back.send(lambda: self._if_not_over(lambda: self._ingress.ended(self, error)))

    def moved(self) -> None:
        self._back.send(lambda: self._if_not_over(lambda: self._ingress.carry_on(self)))

    def _submit(self, routed: RoutedRequest) -> None:
        assert self.router.router is not None
        try:
            self.router.router.submit(routed, self)
            self._tell_standby()
        except ClusterError as error:
            self.ended(error)

    def _tell_standby(self) -> None:
        assert self.router.router is not None
        standby_id = self.router.router.standby_id
        if standby_id:
            self._back.send(lambda: self._if_not_over(lambda: self._take_standby(standby_id)))

    def _take_standby(self, standby_id: str) -> None:
        self.journal.standby_id = standby_id

    def _cancel(self) -> None:
        assert self.router.router is not None
        self.router.router.cancel_listener(self.journal.request_id, self)

    def _if_not_over(self, call: Callable[[], None]) -> None:
        if not self.is_over:
            call()


class Ingress:
    """Owns the journals."""

    def __init__(self, cluster: MemoryCluster, random: Random) -> None:
        self.cluster = cluster
        self.process = cluster.start_process("ingress")
        self.journals: list[Journal] = []
        # Of earlier lives: as far as their clients got.
        self.broken: list[Journal] = []
        self.view: ClusterView = cluster.view
        self._streams: dict[str, RequestStream] = {}
        self._random = random

    @property
    def is_done(self) -> bool:
        return all(journal.is_done for journal in self.journals)

    def submit(self, request: GenerateRequest, timeout_s: float) -> Journal:
        deadline_s = self.cluster.clock.now_s() + timeout_s
        journal = Journal(f"r{len(self.journals)}", request, deadline_s)
        self.journals.append(journal)
        self._send(journal)
        return journal

    def die(self) -> None:
        """Its clients have what they have."""
        self.cluster.kill(self.process)
        for stream in self._streams.values():
            stream.break_off()
        self._streams.clear()
        self.view = EMPTY_VIEW
        for i, journal in enumerate(self.journals):
            if not journal.is_done:
                journal.is_cancelled = journal.is_done = True
                self.broken.append(journal)
                self.journals[i] = Journal(journal.request_id, journal.request, journal.deadline_s)

    def start_again(self) -> None:
        """Its clients find it, and it has still to hear of the view."""
        self.process = self.cluster.start_process(self.process.name)
        for journal in self.journals:
            self._send(journal)

    def cancel(self, journal: Journal) -> None:
        """The client goes away."""
        if not journal.is_done:
            journal.is_cancelled = journal.is_done = True
            stream = self._streams.pop(journal.request_id, None)
            if stream is not None:
                stream.close()

    def take_view(self, view: ClusterView) -> None:
        """Leaves routers that are lost to the view, although their streams still stand."""
        if view.placement_epoch < self.view.placement_epoch:
            return
        self.view = view
        for stream in list(self._streams.values()):
            router = stream.router.router
            assert router is not None
            member = view.members.get(router.links.router_id)
            is_later = (
                self.cluster.settings.has_direct_links
                and member is not None
                and member.incarnation > router.links.incarnation
            )
            if member is None or not member.can_compute or is_later:
                self.carry_on(stream)

    def died(self, process: Process) -> None:
        """Streams to a process break."""
        for stream in [s for s in self._streams.values() if s.router is process]:
            after_s = self.cluster.network.detection_s()
            self.process.tasks.call_later(after_s, lambda s=stream: self.carry_on(s))

    def heard(self, stream: RequestStream, events: Sequence[TokenEvent]) -> None:
        for event in events:
            stream.journal.tell(event)

    def ended(self, stream: RequestStream, error: ClusterError | None) -> None:
        if isinstance(error, RetryLaterError):
            self.carry_on(stream)
            return
        stream.is_over = True
        del self._streams[stream.journal.request_id]
        stream.journal.error, stream.journal.is_done = error, True

    def carry_on(self, stream: RequestStream) -> None:
        """Goes on at another router, or at the same, later."""
        if stream.is_over:
            return
        stream.close()
        del self._streams[stream.journal.request_id]
        self._send_later(stream.journal)

    def _send_later(self, journal: Journal) -> None:
        delay_s = min(RETRY_S * (journal.num_attempts - 1), RETRY_S_MAX)
        self.process.tasks.call_later(delay_s, lambda: self._send(journal))

    def _send(self, journal: Journal) -> None:
        if journal.is_done or not self.process.is_alive:
            return
        now_s = self.cluster.clock.now_s()
        if now_s >= journal.deadline_s:
            journal.error, journal.is_done = DeadlineError("not done in time"), True
            return
        journal.num_attempts += 1
        routers = self._routers()
        if not routers:
            self.process.tasks.call_later(RETRY_S, lambda: self._send(journal))
            return
        best = [p for p in routers if p.router and p.router.links.router_id == journal.standby_id]
        stream = RequestStream(self, journal, self._random.choice(best or routers))
        self._streams[journal.request_id] = stream
        stream.open(journal.routed(now_s))

    def _routers(self) -> list[Process]:
        """Those of the view whose process can be reached."""
        lives = {(m.worker_id, m.incarnation) for m in self.view.routers()}
        names = {worker_id for worker_id, _ in lives}
        has_own_process = not self.cluster.settings.has_direct_links
        found: list[Process] = []
        for process in self.cluster.processes:
            if process.router is not None and process.is_alive:
                links = process.router.links
                life = (links.router_id, links.incarnation)
                if life in lives or (has_own_process and links.router_id in names):
                    found.append(process)
        return found
