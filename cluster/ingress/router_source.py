"""Tokens from routers: whichever lives, as if it were one that never dies.

The life of a request here:

1. `RouterChoice` picks a router; `Route` opens a stream of tokens.
2. Every token, and every score of the prompt, is written into the `Journal` and handed on.
3. A stream that breaks, or a router that drains, sends the request with its journal to another one,
   which goes on behind the last token; to the one with copies of its KV blocks, if there is one.
   `Retries` says when to wait and when to give up.
4. The last token ends it; closing the generator cancels the call, which frees its blocks.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc
from grpc import aio
from milliways.v1 import router_pb2

from cluster.config import TlsSettings
from cluster.errors import (
    ClusterError,
    DeadlineError,
    OverloadedError,
    UnavailableError,
)
from cluster.ingress.channels import open_channel
from cluster.ingress.codec import event_from_wire, route_request, score_from_wire
from cluster.ingress.journal import DeliveredSample, Journal, OutOfOrderError
from cluster.ingress.request_id import new_request_id
from cluster.ingress.retries import Retries
from cluster.ingress.router_choice import RouterChoice, RouterDirectory, RouterInfo
from cluster.status_codes import ACCEPTED_KEY, Verbatim, error_of
from model.errors import InvalidRequestError
from model.sampling_params import SamplingParams
from router.request import GenerateRequest
from router.sequence import Event, PromptScores

logger = logging.getLogger(__name__)

# How long others are asked before a router whose stream broke.
_SUSPECT_FOR_S = 2.0
# A token that came so short a time ago answers a probe.
_TOKEN_PROVES_FOR_S = 1.0
_PROBE_TIMEOUT_S = 5.0


# Generated stubs have no types.
Route = aio.UnaryStreamMultiCallable[router_pb2.RouteRequest, router_pb2.RouteResponse]


class StreamBrokenError(Exception):
    """A stream ended before the request did; another router can carry it on."""


class RouterMovedError(Exception):
    """The router drains, and said so."""


@dataclass(slots=True)
class Connection:
    """A channel to one router, open as long as it is listed or has a stream."""

    channel: aio.Channel
    route: Route


class RouterSource:
    """A `TokenSource` over the routers of a directory."""

    def __init__(
        self,
        directory: RouterDirectory,
        *,
        tls: TlsSettings | None = None,
        max_attempts_without_progress: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._tls = tls or TlsSettings()
        self._max_attempts_without_progress = max_attempts_without_progress
        self._clock = clock
        self._choice = RouterChoice()
        # By worker and address: a worker that comes back elsewhere is another connection.
        self._connections: dict[tuple[str, str], Connection] = {}
        self._token_at_s = float("-inf")
        self._is_closed = False

    async def generate(
        self,
        request: GenerateRequest,
        *,
        request_id: str,
        deadline_s: float,
        delivered: Sequence[DeliveredSample] = (),
        num_scored: int = 0,
    ) -> AsyncGenerator[Event]:
        """As `TokenSource.generate`."""
        retries = Retries(self._max_attempts_without_progress)
        journal = Journal(request, delivered, num_scored)
        stream = self._generate(journal, retries, request_id, deadline_s)
        async with aclosing(stream) as events:
            async for event in events:
                yield event

    async def _generate(
        self, journal: Journal, retries: Retries, request_id: str, deadline_s: float
    ) -> AsyncGenerator[Event]:
        while not journal.is_complete:
            router = await self._choose(journal, retries, deadline_s)
            since_s = self._clock()
            stream = self._attempt(router, journal, request_id, deadline_s)
            try:
                async with aclosing(stream) as events:
                    async for event in events:
                        retries.progressed()
                        self._token_at_s = since_s = self._clock()
                        yield event
            except RouterMovedError:
                retries.moved(router.worker_id)
            except (StreamBrokenError, OutOfOrderError) as error:
                self._broke(router, retries, str(error), since_s, was_accepted=True)
            except aio.AioRpcError as error:
                self._judge(router, retries, error, since_s, deadline_s)

    async def probe(self) -> None:
        """As `TokenSource.probe`: a token that just came, or one made for it."""
        if self._clock() - self._token_at_s < _TOKEN_PROVES_FOR_S:
            return
        request = GenerateRequest(
            prompt_ids=(0,), max_tokens=1, sampling=SamplingParams(temperature=0.0)
        )
        # Impatient: who asks whether it is ready now does not want to wait until it is.
        retries = Retries(self._max_attempts_without_progress, is_patient=False)
        deadline_s = self._clock() + _PROBE_TIMEOUT_S
        request_id = f"probe-{new_request_id()}"
        stream = self._generate(Journal(request), retries, request_id, deadline_s)
        try:
            async with aclosing(stream) as events:
                async for _ in events:
                    pass
        except (ClusterError, InvalidRequestError) as error:
            raise UnavailableError(str(error)) from error

    async def close(self) -> None:
        """Closes all channels; streams still open end with UnavailableError."""
        self._is_closed = True
        connections = list(self._connections.values())
        self._connections.clear()
        await asyncio.gather(*(connection.channel.close(None) for connection in connections))

    async def _choose(self, journal: Journal, retries: Retries, deadline_s: float) -> RouterInfo:
        """The router to try next; waits for one if there is none.

        Raises:
            OverloadedError: none has room, and the request has not begun.
            UnavailableError: none came until the deadline.
        """
        while True:
            if self._is_closed:
                raise UnavailableError("the ingress is stopping")
            routers = self._directory.routers()
            await self._close_unlisted(routers)
            untried = [router for router in routers if router.worker_id not in retries.avoided]
            now_s = self._clock()
            picked = self._choice.try_pick(
                untried, journal.request.prompt_ids, now_s, journal.standby_id
            )
            if picked is not None and now_s < deadline_s:
                return picked
            # A stream that has begun waits for room instead: no death costs a token.
            if retries.full is not None and not journal.has_begun:
                raise retries.full
            if now_s >= deadline_s or not retries.is_patient:
                raise UnavailableError(retries.reason)
            await self._wait_for_change(min(retries.next_round(), deadline_s - now_s))

    async def _wait_for_change(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._directory.changed()
        except TimeoutError:
            pass

    async def _attempt(
        self, router: RouterInfo, journal: Journal, request_id: str, deadline_s: float
    ) -> AsyncGenerator[Event]:
        """What one router gives, as far as its client has not had it.

        Raises:
            AioRpcError, StreamBrokenError, OutOfOrderError: the router did not finish.
            RouterMovedError: it drains.
        """
        timeout_s = max(0.001, deadline_s - self._clock())
        message = route_request(journal, request_id, timeout_s)
        call = self._connect(router).route(message, timeout=timeout_s)
        self._choice.begin(router.worker_id, journal.request.prompt_ids)
        try:
            async for response in call:
                if response.standby_id:
                    journal.standby_id = response.standby_id
                for event in _new_events(response, journal):
                    yield event
                if journal.is_complete:
                    return
                if response.has_moved:
                    raise RouterMovedError
            raise StreamBrokenError("the stream ended before the request")
        except asyncio.CancelledError:
            # Of this task, or of the call under it because its channel was closed?
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise StreamBrokenError("the channel was closed") from None
        finally:
            call.cancel()
            self._choice.end(router.worker_id)

    def _judge(
        self,
        router: RouterInfo,
        retries: Retries,
        error: aio.AioRpcError,
        since_s: float,
        deadline_s: float,
    ) -> None:
        """Goes on after a call that failed, or raises what the client has to know.

        `since_s` is when the router was asked, or gave its last token.
        """
        details = error.details() or ""
        named = error_of(details, _texts(error.trailing_metadata()))
        code = error.code()
        if named is None and code is grpc.StatusCode.INVALID_ARGUMENT:
            raise InvalidRequestError("request", Verbatim("refused by the router"), details)
        if isinstance(named, OverloadedError) or code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            full = named if isinstance(named, OverloadedError) else OverloadedError(details)
            retries.was_full(router.worker_id, full)
        elif isinstance(named, UnavailableError):
            self._broke(router, retries, str(named), since_s, was_accepted=False)
        elif named is not None:
            raise named
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED and self._clock() >= deadline_s - 0.05:
            raise DeadlineError("the request's deadline passed before its last token")
        else:
            was_accepted = ACCEPTED_KEY in _texts(error.initial_metadata())
            # Whoever answers at all is there: only what cannot be reached never had the request.
            was_accepted |= code is not grpc.StatusCode.UNAVAILABLE
            reason = f"{code.name}: {details}"
            self._broke(router, retries, reason, since_s, was_accepted=was_accepted)

    def _broke(
        self,
        router: RouterInfo,
        retries: Retries,
        reason: str,
        since_s: float,
        *,
        was_accepted: bool,
    ) -> None:
        logger.warning("router %s: a stream broke: %s", router.worker_id, reason)
        now_s = self._clock()
        self._choice.suspect(router.worker_id, now_s + _SUSPECT_FOR_S)
        lasted_s = now_s - since_s
        retries.broke(router.worker_id, reason, was_accepted=was_accepted, lasted_s=lasted_s)

    def _connect(self, router: RouterInfo) -> Connection:
        key = (router.worker_id, router.address)
        if key not in self._connections:
            channel = open_channel(router.address, self._tls)
            route: Route = channel.unary_stream(
                "/milliways.v1.RouterService/Route",
                request_serializer=router_pb2.RouteRequest.SerializeToString,
                response_deserializer=router_pb2.RouteResponse.FromString,
            )
            self._connections[key] = Connection(channel, route)
        return self._connections[key]

    async def _close_unlisted(self, routers: Sequence[RouterInfo]) -> None:
        """Drops routers that are gone; one that drains keeps its channel until its last stream."""
        listed = {(router.worker_id, router.address) for router in routers}
        for key in set(self._connections) - listed:
            if self._choice.num_running(key[0]) == 0:
                self._choice.forget(key[0])
                await self._connections.pop(key).channel.close(None)


def _new_events(response: router_pb2.RouteResponse, journal: Journal) -> Iterator[Event]:
    """Events that the client has not had, each written into the journal before it is given."""
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


def _texts(metadata: aio.Metadata | None) -> dict[str, str]:
    """Metadata by key; values that are bytes are none of ours."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
