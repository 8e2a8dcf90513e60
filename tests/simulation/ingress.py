"""An ingress: it keeps what was delivered and carries requests on elsewhere.

The life of a request here: it is sent to a router; tokens that come back are written down; when the
router dies, drains, refuses or is lost to the view, the request goes with all that was delivered to
another. Where a router is taken for silent, another is asked as well: whoever has the next token
goes on alone. Nobody but the journal knows what the client has.

When the ingress dies, its clients send their requests again to the next, under the same ids, and it
has them computed from the start: what a client has already must come once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from milliways.model.sampling_params import SampledToken
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import PromptScores, TokenEvent
from milliways.wire.errors import ClusterError, DeadlineError, RetryLaterError
from milliways.wire.view import EMPTY_VIEW, ClusterView
from tests.memory_cluster import Channel, MemoryCluster, Process
from tests.simulation.fake_model import Stream

RETRY_S = 0.02
RETRY_S_MAX = 1.0


@dataclass(slots=True)
class Journal:
    """A request, and everything that its client was told."""

    request_id: str
    request: GenerationRequest
    deadline_s: float
    delivered: dict[int, list[TokenEvent]] = field(default_factory=dict[int, list[TokenEvent]])
    scores: list[SampledToken] = field(default_factory=list[SampledToken])
    is_done: bool = False
    is_cancelled: bool = False
    error: Exception | None = None
    num_attempts: int = 0
    # Who has copies of its keys and values, as it was told.
    standby_id: str = ""

    def tell_scores(self, scores: PromptScores) -> bool:
        """Whether any was new."""
        num_had = len(self.scores) + 1 - scores.position
        assert num_had >= 0, "a score left out"
        assert tuple(self.scores[scores.position - 1 :]) == scores.tokens[:num_had]
        self.scores += scores.tokens[num_had:]
        return len(scores.tokens) > num_had

    def tell(self, event: TokenEvent, index: int) -> bool:
        """Whether it was new: of two routers that race, both may have it."""
        events = self.delivered.setdefault(event.sample_index, [])
        if index < len(events):
            assert event == events[index], "a token unlike the one before"
            return False
        assert index == len(events), "a token left out"
        assert not events or events[-1].finish_reason is None, "a token after the last"
        assert len(self.scores) == self.request.num_to_score, "a token before the scores"
        events.append(event)
        return True

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
        # Tokens of each sample that it gave, or was told of when it began.
        self.num_given = {i: len(events) for i, events in journal.delivered.items()}
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
        self._back.send(lambda: self._if_not_over(lambda: self._ingress.scored(self, scores)))

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
        # Of each request the streams that run, the first to be asked first.
        self._streams: dict[str, list[RequestStream]] = {}
        # Requests that a second router was asked for, and those whose second one was first.
        self.num_raced = 0
        self.num_overtaken = 0
        self._random = random

    @property
    def is_done(self) -> bool:
        return all(journal.is_done for journal in self.journals)

    def submit(self, request: GenerationRequest, timeout_s: float) -> Journal:
        deadline_s = self.cluster.clock.now_s() + timeout_s
        journal = Journal(f"r{len(self.journals)}", request, deadline_s)
        self.journals.append(journal)
        self._send(journal)
        return journal

    def die(self) -> None:
        """Its clients have what they have."""
        self.cluster.kill(self.process)
        for stream in self._all_streams():
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
            self._keep_only(None, journal)

    def take_view(self, view: ClusterView) -> None:
        """Leaves routers that are lost to the view, although their streams still stand."""
        if view.placement_epoch < self.view.placement_epoch:
            return
        self.view = view
        for stream in self._all_streams():
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
        for stream in [s for s in self._all_streams() if s.router is process]:
            after_s = self.cluster.network.detection_s()
            self.process.tasks.call_later(after_s, lambda s=stream: self.carry_on(s))

    def take_for_silent(self, router: Process) -> None:
        """Asks another router as well for all that one has, whether it lives or not."""
        for stream in self._all_streams():
            others = [process for process in self._routers() if process is not router]
            is_alone = len(self._streams[stream.journal.request_id]) == 1
            if stream.router is router and is_alone and others:
                self.num_raced += 1
                self._open(stream.journal, self._random.choice(others))

    def scored(self, stream: RequestStream, scores: PromptScores) -> None:
        if stream.journal.tell_scores(scores):
            self._keep_only(stream, stream.journal)

    def heard(self, stream: RequestStream, events: Sequence[TokenEvent]) -> None:
        for event in events:
            index = stream.num_given.get(event.sample_index, 0)
            stream.num_given[event.sample_index] = index + 1
            if stream.journal.tell(event, index):
                self._keep_only(stream, stream.journal)

    def ended(self, stream: RequestStream, error: ClusterError | None) -> None:
        if isinstance(error, RetryLaterError):
            self.carry_on(stream)
            return
        stream.is_over = True
        self._streams[stream.journal.request_id].remove(stream)
        self._keep_only(None, stream.journal)
        stream.journal.error, stream.journal.is_done = error, True

    def carry_on(self, stream: RequestStream) -> None:
        """Goes on at another router, or at the same, later; where another runs, with that."""
        if stream.is_over:
            return
        stream.close()
        self._streams[stream.journal.request_id].remove(stream)
        if not self._streams[stream.journal.request_id]:
            self._send_later(stream.journal)

    def _all_streams(self) -> list[RequestStream]:
        return [stream for streams in self._streams.values() for stream in streams]

    def _keep_only(self, winner: RequestStream | None, journal: Journal) -> None:
        """Closes all others of a request."""
        streams = self._streams.get(journal.request_id, [])
        self.num_overtaken += winner is not None and streams.index(winner) > 0
        for stream in list(streams):
            if stream is not winner:
                stream.close()
                streams.remove(stream)

    def _open(self, journal: Journal, router: Process) -> None:
        stream = RequestStream(self, journal, router)
        self._streams.setdefault(journal.request_id, []).append(stream)
        stream.open(journal.routed(self.cluster.clock.now_s()))

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
        self._open(journal, self._random.choice(best or routers))

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
