"""A source of tokens over many routers, which hides the failures of single routers.

From its start, the source has a connection to each router and hears how busy it is.

Steps of a request:

1. `RouterChoice` picks a router; `Route` opens a stream of tokens.
2. Each token, and each score of the prompt, is recorded in the `Journal` and yielded.
3. If the stream breaks, or the router drains, another router receives the request with its journal
   and continues after the last token. The router with copies of its KV blocks is preferred.
   `Retries` says how long to wait and when to give up.
4. If the router is silent for much longer than usual, a second router receives the request as well
   (a hedge). The first to send the next token continues alone: both would send the same tokens.
5. The last token ends the request. Closing the generator cancels the call, and the router frees the
   request's KV blocks.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from random import Random

import grpc
from grpc import aio

from milliways.cluster.ingress.request_id import new_request_id
from milliways.cluster.ingress.routing.race import (
    Attempt,
    Race,
    RouterSilentError,
    StreamBrokenError,
    StreamItem,
)
from milliways.cluster.ingress.routing.retries import Retries
from milliways.cluster.ingress.routing.router_choice import (
    RouterChoice,
    RouterDirectory,
    RouterInfo,
)
from milliways.cluster.ingress.routing.router_connection import RouterConnection
from milliways.cluster.ingress.routing.silence import HedgeLimits
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.journal import DeliveredSample, Journal, OutOfOrderError
from milliways.router.requests.messages import event_from_wire, route_request, score_from_wire
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import Event, PromptScores
from milliways.wire.errors import (
    ClusterError,
    DeadlineError,
    LeavingError,
    OverloadedError,
    UnavailableError,
)
from milliways.wire.status_codes import ACCEPTED_KEY, Verbatim, error_of
from milliways.wire.tls import TlsSettings

logger = logging.getLogger(__name__)

# How long other routers are preferred to one whose stream broke.
_SUSPECT_FOR_S = 2.0
# A probe succeeds at once if a token came within this time.
_TOKEN_PROVES_FOR_S = 1.0
_PROBE_TIMEOUT_S = 5.0
# Limit on the routers that compute one request at the same time.
_MAX_ATTEMPTS = 2


class RouterMovedError(Exception):
    """The router drains, and asked to move the request to another router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The state of one request."""

    journal: Journal
    retries: Retries
    request_id: str
    deadline_s: float
    streams: Race = field(default_factory=Race)


class RouterSource:
    """A `TokenSource` over the routers of a directory.

    *Invariant:* `_connections` holds a connection to each router that is listed or has a stream of
    ours. It is closed once the directory no longer lists the router and it has no stream.
    """

    def __init__(
        self,
        directory: RouterDirectory,
        *,
        tls: TlsSettings | None = None,
        hedging: HedgeLimits | None = None,
        on_hedge: Callable[[], None] = lambda: None,
        max_attempts_without_progress: int = 3,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self._directory = directory
        self._ingress_id = new_request_id()
        self._hedging = hedging or HedgeLimits()
        self._on_hedge = on_hedge
        self._tls = tls or TlsSettings()
        self._max_attempts_without_progress = max_attempts_without_progress
        self._clock = clock
        self._choice = RouterChoice(random or Random())
        # By worker and address: a worker that restarts at another address needs a new connection.
        self._connections: dict[tuple[str, str], RouterConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None
        self._token_at_s = float("-inf")
        self._is_closed = False

    def start(self) -> None:
        """Connects to the routers, in a running event loop; the first request does it as well."""
        if self._following is None:
            self._following = asyncio.create_task(self._follow_directory())

    async def first_loads(self) -> None:
        """Returns when each router that is listed has said how busy it is, or cannot be asked."""
        self.start()
        for router in self._directory.routers():
            await self._connect(router).has_answered.wait()

    async def generate(
        self,
        request: GenerationRequest,
        *,
        request_id: str,
        deadline_s: float,
        delivered: Sequence[DeliveredSample] = (),
        num_scored: int = 0,
    ) -> AsyncGenerator[Event]:
        """As `TokenSource.generate`."""
        retries = Retries(self._max_attempts_without_progress)
        stream = self._generate(
            _Run(
                journal=Journal(request, delivered, num_scored),
                retries=retries,
                request_id=request_id,
                deadline_s=deadline_s,
            )
        )
        async with aclosing(stream) as events:
            async for event in events:
                yield event

    async def _generate(self, run: _Run) -> AsyncGenerator[Event]:
        journal, retries = run.journal, run.retries
        async with aclosing(run.streams) as streams:
            while not journal.is_complete:
                if not streams.attempts:
                    self._begin(run, await self._choose(run))
                attempt, item = await streams.next()
                self._check_open()
                try:
                    for event in _new_events(item, journal):
                        await streams.keep_only(attempt)
                        retries.progressed()
                        left = journal.load(is_in_prefill=False)
                        self._choice.progressed(attempt.assignment, left)
                        self._token_at_s = attempt.since_s = self._clock()
                        yield event
                except RouterSilentError:
                    self._hedge(run)
                except RouterMovedError:
                    await streams.cancel(attempt)
                    retries.moved(attempt.router.worker_id)
                except (StreamBrokenError, OutOfOrderError) as error:
                    await streams.cancel(attempt)
                    self._record_break(attempt, retries, str(error), was_accepted=True)
                except aio.AioRpcError as error:
                    self._handle_error(run, attempt, error)

    async def probe(self) -> None:
        """As `TokenSource.probe`: a token came just now, or one can be generated."""
        if self._clock() - self._token_at_s < _TOKEN_PROVES_FOR_S:
            return
        request = GenerationRequest(
            prompt_ids=(0,), max_tokens=1, sampling=SamplingParams(temperature=0.0)
        )
        # Not patient: a probe asks whether the cluster is ready now.
        retries = Retries(self._max_attempts_without_progress, is_patient=False)
        deadline_s = self._clock() + _PROBE_TIMEOUT_S
        request_id = f"probe-{new_request_id()}"
        stream = self._generate(
            _Run(
                journal=Journal(request),
                retries=retries,
                request_id=request_id,
                deadline_s=deadline_s,
            )
        )
        try:
            async with aclosing(stream) as events:
                async for _ in events:
                    pass
        except (ClusterError, InvalidRequestError) as error:
            raise UnavailableError(str(error)) from error

    async def close(self) -> None:
        """Closes all channels; streams still open, and later ones, end with LeavingError."""
        self._is_closed = True
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        connections = list(self._connections.values())
        self._connections.clear()
        await asyncio.gather(*(connection.close() for connection in connections), *self._closing)

    def _check_open(self) -> None:
        if self._is_closed:
            raise LeavingError("this server stops; another one goes on with the request")

    async def _choose(self, run: _Run) -> RouterInfo:
        """Picks the router to try next; waits if there is none.

        Raises:
            OverloadedError: no router has room, and the request has no token yet.
            UnavailableError: no router was available before the deadline.
            LeavingError: the source was closed.
        """
        journal, retries, deadline_s = run.journal, run.retries, run.deadline_s
        while True:
            self._check_open()
            self.start()
            routers = self._directory.routers()
            self._close_unlisted(routers)
            untried = [router for router in routers if router.worker_id not in retries.avoided]
            now_s = self._clock()
            picked = self._choice.try_pick(
                untried,
                journal.request.prompt_ids,
                now_s,
                journal.standby_id,
                self._silent(untried),
            )
            if picked is not None and now_s < deadline_s:
                return picked
            # A request that has tokens waits for room instead, so that a death loses none of them.
            if retries.full is not None and not journal.has_begun:
                raise retries.full
            if now_s >= deadline_s or not retries.is_patient:
                raise UnavailableError(retries.reason)
            await self._wait_for_change(min(retries.next_round(), deadline_s - now_s))

    async def _follow_directory(self) -> None:
        while True:
            routers = self._directory.routers()
            self._close_unlisted(routers)
            for router in routers:
                self._connect(router)
            await self._directory.changed()

    async def _wait_for_change(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._directory.changed()
        except TimeoutError:
            pass

    def _begin(self, run: _Run, router: RouterInfo) -> None:
        """Sends the request to a router, with its journal."""
        worker_id, now_s = router.worker_id, self._clock()
        timeout_s = max(0.001, run.deadline_s - now_s)
        load = run.journal.load(is_in_prefill=True)
        assignment = self._choice.begin(worker_id, run.journal.request.prompt_ids, load)
        run.streams.begin(
            Attempt(router, self._connect(router), assignment, now_s),
            route_request(run.journal, run.request_id, timeout_s, self._ingress_id),
            timeout_s,
            on_end=lambda: self._choice.end(assignment),
        )

    def _hedge(self, run: _Run) -> None:
        """Sends the request to a second router as well, if there is one that is not silent."""
        asked = {attempt.router.worker_id for attempt in run.streams.attempts}
        if len(asked) >= _MAX_ATTEMPTS:
            return
        routers = self._directory.routers()
        excluded = asked | run.retries.avoided | self._silent(routers)
        others = [router for router in routers if router.worker_id not in excluded]
        journal = run.journal
        picked = self._choice.try_pick(
            others, journal.request.prompt_ids, self._clock(), journal.standby_id
        )
        if picked is not None:
            logger.info(
                "router %s is silent; sending its request to %s as well", *asked, picked.worker_id
            )
            self._on_hedge()
            self._begin(run, picked)

    def _handle_error(self, run: _Run, attempt: Attempt, error: aio.AioRpcError) -> None:
        """Records a failed call for a retry, or raises the error that the client must see."""
        retries, deadline_s = run.retries, run.deadline_s
        details = error.details() or ""
        named = error_of(details, _texts(error.trailing_metadata()))
        code = error.code()
        if named is None and code is grpc.StatusCode.INVALID_ARGUMENT:
            raise InvalidRequestError("request", Verbatim("refused by the router"), details)
        if isinstance(named, OverloadedError) or code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            full = named if isinstance(named, OverloadedError) else OverloadedError(details)
            is_last = not run.streams.attempts
            retries.was_full(attempt.router.worker_id, full, is_last=is_last)
        elif isinstance(named, UnavailableError):
            self._record_break(attempt, retries, str(named), was_accepted=False)
        elif named is not None:
            raise named
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED and self._clock() >= deadline_s - 0.05:
            raise DeadlineError("the request's deadline passed before its last token")
        else:
            # Any other code than UNAVAILABLE proves that the router received the request. With
            # UNAVAILABLE, only metadata at the start of the stream can prove it.
            was_accepted = ACCEPTED_KEY in _texts(error.initial_metadata())
            was_accepted |= code is not grpc.StatusCode.UNAVAILABLE
            reason = f"{code.name}: {details}"
            self._record_break(attempt, retries, reason, was_accepted=was_accepted)

    def _record_break(
        self, attempt: Attempt, retries: Retries, reason: str, *, was_accepted: bool
    ) -> None:
        worker_id = attempt.router.worker_id
        logger.warning("router %s broke a stream: %s", worker_id, reason)
        now_s = self._clock()
        self._choice.suspect(worker_id, now_s + _SUSPECT_FOR_S)
        lasted_s = now_s - attempt.since_s
        retries.broke(worker_id, reason, was_accepted=was_accepted, lasted_s=lasted_s)

    def _connect(self, router: RouterInfo) -> RouterConnection:
        key = (router.worker_id, router.address)
        if key not in self._connections:
            self._connections[key] = RouterConnection(
                router,
                self._tls,
                self._hedging,
                self._clock,
                ingress_id=self._ingress_id,
                on_load=lambda load: self._choice.report(router.worker_id, load, self._clock()),
            )
        return self._connections[key]

    def _silent(self, routers: Sequence[RouterInfo]) -> set[str]:
        """Worker ids of the routers that are silent."""
        connections = (
            (router.worker_id, self._connections.get((router.worker_id, router.address)))
            for router in routers
        )
        return {name for name, connection in connections if connection and connection.is_silent}

    def _close_unlisted(self, routers: Sequence[RouterInfo]) -> None:
        """Closes connections to routers no longer listed, each after its last stream has ended."""
        listed = {(router.worker_id, router.address) for router in routers}
        for key in set(self._connections) - listed:
            if self._choice.num_running(key[0]) == 0:
                self._choice.forget(key[0])
                # In a task of its own: the request that found it can be cancelled.
                closing = asyncio.create_task(self._connections.pop(key).close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)


def _new_events(item: StreamItem, journal: Journal) -> Iterator[Event]:
    """Events that the client has not received; recorded in the journal before each is yielded.

    Raises:
        Exception: the item itself, if it is an exception.
        OutOfOrderError: an event does not follow the journal.
        RouterMovedError: after the events, if the router drains and the request has not ended.
    """
    if isinstance(item, Exception):
        raise item
    response = item
    if response.standby_id:
        journal.standby_id = response.standby_id
    position = journal.num_scored + 1
    scores = [
        score_from_wire(message)
        for message in response.prompt_logprobs
        if journal.try_score(message.position, message.token_id)
    ]
    if scores:
        yield PromptScores(position=position, tokens=tuple(scores))
    for message in response.events:
        event = event_from_wire(message)
        is_new = journal.try_deliver(
            message.sample_index,
            message.index,
            message.token_id,
            is_finished=event.finish_reason is not None,
        )
        if is_new:
            yield event
    if response.has_moved and not journal.is_complete:
        raise RouterMovedError


def _texts(metadata: aio.Metadata | None) -> dict[str, str]:
    """The metadata's text values by key. We send no binary values."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
