"""A connection to one router: its streams of tokens, and an ear for its silence."""

import asyncio
import time
from collections.abc import Callable

import grpc
from grpc import aio

from milliways.cluster.ingress.router_choice import RouterInfo
from milliways.cluster.ingress.silence import HedgeLimits, SilenceDetector
from milliways.v1 import router_pb2
from milliways.wire.channels import open_channel
from milliways.wire.tls import TlsSettings

# Generated stubs have no types.
Route = aio.UnaryStreamMultiCallable[router_pb2.RouteRequest, router_pb2.RouteResponse]
Ping = aio.UnaryUnaryMultiCallable[router_pb2.PingRequest, router_pb2.PingResponse]

_SERVICE = "/milliways.v1.RouterService"
_PING_TIMEOUT_S = 1.0
# What says nothing of the router: the call did not reach it, or was given up here.
_NO_ANSWERS = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


class RouterConnection:
    """Open as long as the router is listed or has a stream.

    While streams are open, or the router is silent, the `SilenceDetector` is checked several times
    within its patience. Listeners are called at each check that finds the router silent.
    """

    def __init__(
        self,
        router: RouterInfo,
        tls: TlsSettings,
        limits: HedgeLimits,
        clock: Callable[[], float] = time.monotonic,
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
        self._signs = SilenceDetector(limits)
        self._clock = clock
        self._listeners: set[Callable[[], None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None

    @property
    def is_silent(self) -> bool:
        """Whether it outlasted our patience, and has given no sign since."""
        return self._signs.is_silent

    def begin(self, listener: Callable[[], None]) -> None:
        """A stream is opened; `end` has to follow."""
        self._listeners.add(listener)
        if self._watching is None or self._watching.done():
            self._signs.begin(self._clock())
            self._watching = asyncio.create_task(self._watch())

    def end(self, listener: Callable[[], None]) -> None:
        """A stream is over."""
        self._listeners.discard(listener)

    def heard(self) -> None:
        """The router gave a sign of life."""
        self._signs.received(self._clock())

    def hedged_too_early(self) -> None:
        """It was called silent, and had the next token before anybody else."""
        self._signs.hedged_too_early()

    async def close(self) -> None:
        """Ends the streams that are still open."""
        tasks = [task for task in (self._watching, self._pinging) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close(None)

    async def _watch(self) -> None:
        signs = self._signs
        while self._listeners or signs.is_silent:
            asleep_s, since_s = signs.look_after_s, self._clock()
            await asyncio.sleep(asleep_s)
            now_s = self._clock()
            # Where this process had no processor, the router is not to blame.
            signs.slept(max(0.0, now_s - since_s - asleep_s), now_s)
            if signs.wants_ping(now_s) and (self._pinging is None or self._pinging.done()):
                self._pinging = asyncio.create_task(self._ask())
            signs.look(now_s)
            if signs.is_silent:
                for listener in list(self._listeners):
                    listener()

    async def _ask(self) -> None:
        try:
            await self._ping(router_pb2.PingRequest(), timeout=_PING_TIMEOUT_S)
        except aio.AioRpcError as error:
            if error.code() in _NO_ANSWERS:
                return
        except asyncio.CancelledError:
            # Of this task, or because the channel was closed: no matter which.
            return
        self.heard()
