"""A connection to one router: opens its streams, listens to its load, notices its silence."""

import asyncio
import logging
import time
from collections.abc import Callable

import grpc
from grpc import aio

from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.silence import HedgeLimits, SilenceDetector
from milliways.v1 import router_pb2
from milliways.wire.channels import open_channel
from milliways.wire.load import Load
from milliways.wire.tls import TlsSettings

logger = logging.getLogger(__name__)

# Generated stubs have no types.
Route = aio.UnaryStreamMultiCallable[router_pb2.RouteRequest, router_pb2.RouteResponse]
WatchLoad = aio.UnaryStreamMultiCallable[router_pb2.WatchLoadRequest, router_pb2.WatchLoadResponse]
Ping = aio.UnaryUnaryMultiCallable[router_pb2.PingRequest, router_pb2.PingResponse]

_SERVICE = "/milliways.v1.RouterService"
_PING_TIMEOUT_S = 1.0
# After this time, a router that ended its reports is asked for them again.
_WATCH_AGAIN_S = 0.5
# Codes that say nothing about the router: the call did not reach it, or ended on our side.
_NO_ANSWERS = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


class RouterConnection:
    """A gRPC channel to one router, kept while the router is listed or has a stream.

    `on_load` is called with each report of what other ingresses have there; `ingress_id` is the
    name of this one.

    While a stream is open, or the router is silent, a task checks the `SilenceDetector` several
    times within its patience. Each check that finds the router silent calls all listeners.

    *Invariant:* while there is a listener, the checking task runs, until `close`.
    """

    def __init__(
        self,
        router: RouterInfo,
        tls: TlsSettings,
        limits: HedgeLimits,
        clock: Callable[[], float] = time.monotonic,
        *,
        ingress_id: str,
        on_load: Callable[[Load], None],
    ) -> None:
        self._channel = open_channel(router.address, tls)
        self.route: Route = self._channel.unary_stream(
            f"{_SERVICE}/Route",
            request_serializer=router_pb2.RouteRequest.SerializeToString,
            response_deserializer=router_pb2.RouteResponse.FromString,
        )
        self._ping: Ping = self._channel.unary_unary(
            f"{_SERVICE}/Ping",
            request_serializer=router_pb2.PingRequest.SerializeToString,
            response_deserializer=router_pb2.PingResponse.FromString,
        )
        self._watch_load: WatchLoad = self._channel.unary_stream(
            f"{_SERVICE}/WatchLoad",
            request_serializer=router_pb2.WatchLoadRequest.SerializeToString,
            response_deserializer=router_pb2.WatchLoadResponse.FromString,
        )
        self._silence = SilenceDetector(limits)
        self._clock = clock
        self._listeners: set[Callable[[], None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None
        # Whether the router has said how busy it is, or cannot be asked.
        self.has_answered = asyncio.Event()
        self._following = asyncio.create_task(self._follow_load(ingress_id, on_load))

    @property
    def is_silent(self) -> bool:
        """Whether the router was silent for longer than allowed, and has sent nothing since."""
        return self._silence.is_silent

    def begin(self, listener: Callable[[], None]) -> None:
        """Registers an open stream; `end` must follow."""
        self._listeners.add(listener)
        if self._watching is None or self._watching.done():
            self._silence.begin(self._clock())
            self._watching = asyncio.create_task(self._watch())

    def end(self, listener: Callable[[], None]) -> None:
        """Removes the listener of a stream that ended."""
        self._listeners.discard(listener)

    def received(self) -> None:
        """The router sent something."""
        self._silence.received(self._clock())

    def hedged_too_early(self) -> None:
        """A second router was asked too soon: the router of this connection was first after all."""
        self._silence.hedged_too_early()

    async def close(self) -> None:
        """Closes the channel, which ends its open streams."""
        optional = (self._watching, self._pinging, self._following)
        tasks = [task for task in optional if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close(None)

    async def _follow_load(self, ingress_id: str, on_load: Callable[[Load], None]) -> None:
        request = router_pb2.WatchLoadRequest(ingress_id=ingress_id)
        while True:
            try:
                async for report in self._watch_load(request):
                    on_load(Load(report.num_sequences, report.num_prompt_tokens))
                    self.has_answered.set()
            except aio.AioRpcError as error:
                # An older router has no such method. The last report fades meanwhile.
                logger.debug("no load of a router: %s", error.code())
            self.has_answered.set()
            await asyncio.sleep(_WATCH_AGAIN_S)

    async def _watch(self) -> None:
        silence = self._silence
        while self._listeners or silence.is_silent:
            asleep_s, since_s = silence.look_after_s, self._clock()
            await asyncio.sleep(asleep_s)
            now_s = self._clock()
            # If this process itself did not run, the router was not silent for that time.
            silence.slept(max(0.0, now_s - since_s - asleep_s), now_s)
            if silence.wants_ping(now_s) and (self._pinging is None or self._pinging.done()):
                self._pinging = asyncio.create_task(self._send_ping())
            silence.look(now_s)
            if silence.is_silent:
                for listener in list(self._listeners):
                    listener()

    async def _send_ping(self) -> None:
        try:
            await self._ping(router_pb2.PingRequest(), timeout=_PING_TIMEOUT_S)
        except aio.AioRpcError as error:
            if error.code() in _NO_ANSWERS:
                return
        except asyncio.CancelledError:
            # Either this task was cancelled, or the channel was closed.
            return
        self.received()
