"""A simulated ingress: it records what was delivered, and retries requests on other routers.

Steps of a request: it is sent to a router, and the tokens that come back are recorded in a journal.
If the router dies, drains, refuses, or is LOST in the view, another router receives the request and
the journal. If a router is considered silent, a second router receives the request as well. The
first to send the next token continues alone.

When the ingress dies, its clients send their requests again with the same ids to the next ingress,
which has them computed from the start. The same tokens must come again.
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
    """A request, and everything that was delivered to its client."""

    request_id: str
    request: GenerationRequest
    deadline_s: float
    delivered: dict[int, list[TokenEvent]] = field(default_factory=dict[int, list[TokenEvent]])
    scores: list[SampledToken] = field(default_factory=list[SampledToken])
    is_done: bool = False
    is_cancelled: bool = False
    error: Exception | None = None
    num_attempts: int = 0
    # The router that holds copies of its KV blocks, as last reported.
    standby_id: str = ""

    def try_score(self, scores: PromptScores) -> bool:
        """Records scores; returns whether any was new."""
        num_known = len(self.scores) + 1 - scores.position
        assert num_known >= 0, "a score left out"
        assert tuple(self.scores[scores.position - 1 :]) == scores.tokens[:num_known]
        self.scores += scores.tokens[num_known:]
        return len(scores.tokens) > num_known

    def try_deliver(self, event: TokenEvent, index: int) -> bool:
        """Records a token; returns whether it was new. Two routers may both send it."""
        events = self.delivered.setdefault(event.sample_index, [])
        if index < len(events):
            assert event == events[index], "a repeated token that differs"
            return False
        assert index == len(events), "a token left out"
        assert not events or events[-1].finish_reason is None, "a token after the last"
        assert len(self.scores) == self.request.num_to_score, "a token before the scores"
        events.append(event)
        return True

    def streams(self) -> list[Stream]:
        return [stream_of(self.delivered.get(i, [])) for i in range(self.request.num_samples)]

    def routed(self, now_s: float) -> RoutedRequest:
        """The request with its journal, for the next router."""
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
    """One attempt: a listener in the router's process that sends everything to the ingress."""

    def __init__(self, ingress: "Ingress", journal: Journal, router: Process) -> None:
        self.router = router
        self.journal = journal
        self.is_over = False
        # For each sample, the tokens delivered before this attempt and the tokens it sent.
        self.num_sent = {i: len(events) for i, events in journal.delivered.items()}
        self._ingress = ingress
        network = ingress.cluster.network
        self.there = Channel(ingress.process, router, network)
        self._back = Channel(router, ingress.process, network)

    def open(self, routed: RoutedRequest) -> None:
        self.there.send(lambda: self._submit(routed))

    def close(self) -> None:
        """The client has left, or another router continues."""
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
        self._send_standby()
        self._back.send(lambda: self._if_not_over(lambda: self._ingress.received(self, events)))

    def ended(self, error: ClusterError | None) -> None:
        self._back.send(lambda: self._if_not_over(lambda: self._ingress.ended(self, error)))

    def moved(self) -> None:
        self._back.send(lambda: self._if_not_over(lambda: self._ingress.retry(self)))

    def _submit(self, routed: RoutedRequest) -> None:
        assert self.router.router is not None
        try:
            self.router.router.submit(routed, self)
            self._send_standby()
        except ClusterError as error:
            self.ended(error)

    def _send_standby(self) -> None:
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
    """Owns the journals.

    *Invariant:* each request that is not done has a stream, or a timer that will send it.
    """

    def __init__(self, cluster: MemoryCluster, random: Random) -> None:
        self.cluster = cluster
        self.process = cluster.start_process("ingress")
        self.journals: list[Journal] = []
        # Journals of earlier incarnations: what their clients received.
        self.broken: list[Journal] = []
        self.view: ClusterView = cluster.view
        # For each request its open streams, oldest first.
        self._streams: dict[str, list[RequestStream]] = {}
        # Hedges, and hedges whose second router sent the next token first.
        self.num_hedges = 0
        self.num_hedges_won = 0
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
        """Kills the ingress; its clients keep what they received."""
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
        """Starts the next ingress. Its clients send again; it does not know the view yet."""
        self.process = self.cluster.start_process(self.process.name)
        for journal in self.journals:
            self._send(journal)

    def cancel(self, journal: Journal) -> None:
        """The client leaves."""
        if not journal.is_done:
            journal.is_cancelled = journal.is_done = True
            self._keep_only(None, journal)

    def take_view(self, view: ClusterView) -> None:
        """Retries the requests of routers no longer listed, though their streams may stand."""
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
                self.retry(stream)

    def died(self, process: Process) -> None:
        """The streams of a dead process break."""
        for stream in [s for s in self._all_streams() if s.router is process]:
            after_s = self.cluster.network.detection_s()
            self.process.tasks.call_later(after_s, lambda s=stream: self.retry(s))

    def hedge(self, router: Process) -> None:
        """Treats a router as silent: sends all its requests to another router as well."""
        for stream in self._all_streams():
            others = [process for process in self._routers() if process is not router]
            is_alone = len(self._streams[stream.journal.request_id]) == 1
            if stream.router is router and is_alone and others:
                self.num_hedges += 1
                self._open(stream.journal, self._random.choice(others))

    def scored(self, stream: RequestStream, scores: PromptScores) -> None:
        if stream.journal.try_score(scores):
            self._keep_only(stream, stream.journal)

    def received(self, stream: RequestStream, events: Sequence[TokenEvent]) -> None:
        for event in events:
            index = stream.num_sent.get(event.sample_index, 0)
            stream.num_sent[event.sample_index] = index + 1
            if stream.journal.try_deliver(event, index):
                self._keep_only(stream, stream.journal)

    def ended(self, stream: RequestStream, error: ClusterError | None) -> None:
        if isinstance(error, RetryLaterError):
            self.retry(stream)
            return
        stream.is_over = True
        self._streams[stream.journal.request_id].remove(stream)
        self._keep_only(None, stream.journal)
        stream.journal.error, stream.journal.is_done = error, True

    def retry(self, stream: RequestStream) -> None:
        """Gives up a stream, and sends its request again later, unless another stream runs."""
        if stream.is_over:
            return
        stream.close()
        self._streams[stream.journal.request_id].remove(stream)
        if not self._streams[stream.journal.request_id]:
            self._send_later(stream.journal)

    def _all_streams(self) -> list[RequestStream]:
        return [stream for streams in self._streams.values() for stream in streams]

    def _keep_only(self, winner: RequestStream | None, journal: Journal) -> None:
        """Closes all other streams of a request."""
        streams = self._streams.get(journal.request_id, [])
        self.num_hedges_won += winner is not None and streams.index(winner) > 0
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
        """The routers of the view whose processes live."""
        listed = {(m.worker_id, m.incarnation) for m in self.view.routers()}
        names = {worker_id for worker_id, _ in listed}
        has_own_process = not self.cluster.settings.has_direct_links
        found: list[Process] = []
        for process in self.cluster.processes:
            if process.router is not None and process.is_alive:
                links = process.router.links
                key = (links.router_id, links.incarnation)
                if key in listed or (has_own_process and links.router_id in names):
                    found.append(process)
        return found
