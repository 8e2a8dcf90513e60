"""A router's gRPC server: requests of the ingress in, tokens out, in the router's own thread."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc

from milliways.model.errors import InvalidRequestError
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.messages import event_to_wire, rules_from_wire, scores_to_wire
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import PromptScores, TokenEvent
from milliways.router.router import Router
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.v1 import router_pb2
from milliways.wire.channels import add_port
from milliways.wire.errors import ClusterError
from milliways.wire.load import Load
from milliways.wire.sampling import decode_params
from milliways.wire.status_codes import ACCEPTED_KEY, Verbatim, status_of
from milliways.wire.tls import TlsSettings

_SERVICE = "milliways.v1.RouterService"
# More than a prompt of the longest context takes as 5-byte varints.
MAX_REQUEST_BYTES = 16 << 20
# Ingresses hear of a change at once, but not more often than this: each report costs the thread
# that computes about 0.1 ms.
REPORT_EVERY_S = 0.02
# Without a change, a report is repeated after this time: an ingress trusts only recent ones.
REPEAT_S = 1.0


class RouterServer:
    """Serves `RouterService`. Used in the thread of the router's reactor, which hosts a loop."""

    def __init__(
        self,
        reactor: Reactor,
        router: Router,
        *,
        request_timeout_s: float,
        tls: TlsSettings | None = None,
    ) -> None:
        self._reactor = reactor
        self._router = router
        self.request_timeout_s = request_timeout_s
        self._tls = tls or TlsSettings()
        self._loads = LoadReports(router.loads)
        self._server: Any = None

    def start(self, address: str) -> Pending[str]:
        """Listens at `host:port`, port 0 for any; the result is the address with its port."""
        return self._reactor.run_in_loop(self._start(address))

    def stop(self, grace_s: float = 0.0) -> Pending[None]:
        """Accepts no more requests; breaks the streams after `grace_s`."""
        return self._reactor.run_in_loop(self._stop(grace_s))

    async def _start(self, address: str) -> str:
        options = [
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        self._server = grpc.aio.server(options=options)
        route = grpc.unary_stream_rpc_method_handler(
            self._route,
            request_deserializer=router_pb2.RouteRequest.FromString,
            response_serializer=router_pb2.RouteResponse.SerializeToString,
        )
        ping = grpc.unary_unary_rpc_method_handler(
            _ping,
            request_deserializer=router_pb2.PingRequest.FromString,
            response_serializer=router_pb2.PingResponse.SerializeToString,
        )
        watch_load = grpc.unary_stream_rpc_method_handler(
            self._watch_load,
            request_deserializer=router_pb2.WatchLoadRequest.FromString,
            response_serializer=router_pb2.WatchLoadResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(
            _SERVICE, {"Route": route, "Ping": ping, "WatchLoad": watch_load}
        )
        self._server.add_generic_rpc_handlers((handler,))
        port = add_port(self._server, address, self._tls)
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def _stop(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _route(
        self, message: router_pb2.RouteRequest, context: Any
    ) -> AsyncIterator[router_pb2.RouteResponse]:
        stream = _Stream(lambda: self._router.standby_id, self._loads.note)
        routed: RoutedRequest | None = None
        try:
            routed = routed_request(message, self.request_timeout_s)
            stream.num_delivered = {i: len(tokens) for i, tokens in routed.delivered.items()}
            self._router.submit(routed, stream)
            self._loads.note()
            stream.begin()
        except (ClusterError, InvalidRequestError) as error:
            await _abort(context, error)
        assert routed is not None
        try:
            await context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
            async for response in stream.responses():
                yield response
            if stream.error is not None:
                await _abort(context, stream.error)
        finally:
            # Also if the client is gone: then its blocks are free before the next step.
            self._router.cancel_listener(routed.request_id, stream)
            self._loads.note()

    async def _watch_load(
        self, message: router_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[router_pb2.WatchLoadResponse]:
        async for load in self._loads.of_others(message.ingress_id):
            yield router_pb2.WatchLoadResponse(
                num_sequences=load.num_sequences, num_prompt_tokens=load.num_prompt_tokens
            )


async def _ping(message: router_pb2.PingRequest, context: Any) -> router_pb2.PingResponse:
    return router_pb2.PingResponse()


class LoadReports:
    """Tells ingresses how busy the router is with the requests of others.

    `loads` returns the router's load by ingress. Call `note` when it may have changed.
    """

    def __init__(
        self,
        loads: Callable[[], dict[str, Load]],
        *,
        every_s: float = REPORT_EVERY_S,
        repeat_s: float = REPEAT_S,
    ) -> None:
        self._loads = loads
        self._every_s = every_s
        self._repeat_s = repeat_s
        # One for each ingress that listens.
        self._noted: set[asyncio.Event] = set()
        # The loads are computed once for all ingresses.
        self._known: dict[str, Load] = {}
        self._known_until_s = float("-inf")

    def note(self) -> None:
        """The load may have changed."""
        for noted in self._noted:
            noted.set()

    async def of_others(self, ingress_id: str) -> AsyncGenerator[Load]:
        """The load without that of one ingress: now, when it changes, and from time to time."""
        noted = asyncio.Event()
        self._noted.add(noted)
        try:
            while True:
                load = self._without(ingress_id)
                yield load
                repeat_at_s = time.monotonic() + self._repeat_s
                await asyncio.sleep(self._every_s)
                while self._without(ingress_id) == load and time.monotonic() < repeat_at_s:
                    noted.clear()
                    await _wait(noted, repeat_at_s - time.monotonic())
                    # Until then, the loads that were computed last count as known.
                    await asyncio.sleep(self._known_until_s - time.monotonic())
        finally:
            self._noted.discard(noted)

    def _without(self, ingress_id: str) -> Load:
        now_s = time.monotonic()
        if now_s >= self._known_until_s:
            self._known = self._loads()
            self._known_until_s = now_s + self._every_s
        others = (load for name, load in self._known.items() if name != ingress_id)
        return sum(others, Load())


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Waits for an event, at most this long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


class _Stream:
    """A listener that queues responses for one call, at most one for each token of the request.

    Invariant: `_has_response` is set while `_queue` holds a response or the request has ended.
    """

    def __init__(self, standby_id: Callable[[], str], on_progress: Callable[[], None]) -> None:
        self.error: ClusterError | None = None
        self.num_delivered: dict[int, int] = {}
        self._queue: list[router_pb2.RouteResponse] = []
        self._has_ended = False
        self._has_response = asyncio.Event()
        self._standby_id = standby_id
        self._on_progress = on_progress
        self._sent_standby_id = ""

    def begin(self) -> None:
        """Names the standby, if there is one: the router may die before the first token."""
        response = router_pb2.RouteResponse(standby_id=self._new_standby_id())
        if response.standby_id:
            self._put(response)

    def scored(self, scores: PromptScores) -> None:
        response = router_pb2.RouteResponse(
            standby_id=self._new_standby_id(), prompt_logprobs=scores_to_wire(scores)
        )
        self._put(response)

    def tokens(self, events: list[TokenEvent]) -> None:
        response = router_pb2.RouteResponse(standby_id=self._new_standby_id())
        for event in events:
            index = self.num_delivered.get(event.sample_index, 0)
            self.num_delivered[event.sample_index] = index + 1
            response.events.append(event_to_wire(event, index))
        self._put(response)
        self._on_progress()

    def ended(self, error: ClusterError | None) -> None:
        self.error, self._has_ended = error, True
        self._has_response.set()

    def moved(self) -> None:
        self._has_ended = True
        self._put(router_pb2.RouteResponse(has_moved=True))

    async def responses(self) -> AsyncIterator[router_pb2.RouteResponse]:
        """All responses, until the request ends."""
        while True:
            responses, self._queue = self._queue, []
            for response in responses:
                yield response
            if self._has_ended and not self._queue:
                return
            if not self._queue:
                self._has_response.clear()
                await self._has_response.wait()

    def _new_standby_id(self) -> str:
        """The standby, if it has changed since it was last sent; empty otherwise."""
        standby_id = self._standby_id()
        if standby_id == self._sent_standby_id:
            return ""
        self._sent_standby_id = standby_id
        return standby_id

    def _put(self, response: router_pb2.RouteResponse) -> None:
        self._queue.append(response)
        self._has_response.set()


def routed_request(message: router_pb2.RouteRequest, longest_s: float) -> RoutedRequest:
    """A request from its message.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
    """
    if not message.sampling.HasField("seed"):
        # The ingress chooses it: if each router did, the next one would draw other tokens.
        raise InvalidRequestError("sampling.seed", Verbatim("(absent)"), "given")
    request = GenerationRequest(
        prompt_ids=tuple(message.prompt_token_ids),
        max_tokens=message.max_tokens,
        sampling=decode_params(message.sampling),
        num_samples=message.num_samples or 1,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        rules=rules_from_wire(message.rules),
    )
    for delivered in message.delivered:
        if delivered.sample_index >= request.num_samples:
            limit = f"below num_samples = {request.num_samples}"
            raise InvalidRequestError("delivered.sample_index", delivered.sample_index, limit)
    timeout_s = message.timeout_ms / 1000 if message.timeout_ms else longest_s
    return RoutedRequest(
        request_id=message.request_id,
        request=request,
        timeout_s=min(timeout_s, longest_s),
        delivered={d.sample_index: tuple(d.token_ids) for d in message.delivered},
        finished=frozenset(d.sample_index for d in message.delivered if d.is_finished),
        num_scored=message.num_delivered_prompt_logprobs,
        ingress_id=message.ingress_id,
    )


async def _abort(context: Any, error: Exception) -> None:
    status = status_of(error)
    code = grpc.StatusCode[status.code]
    await context.abort(code, status.message, status.trailing_metadata)
