"""Messages of GenerateService, from streams that outlive the servers that they come from.

    async with GenerateClient(["10.0.0.1:50051", "10.0.0.2:50051"]) as client:
        async for response in client.generate(request, timeout_s=120):
            ...

The life of a request here:

1. It goes to one of the addresses. Every token that comes is noted, and handed on. So is every
   log-probability of the prompt, if the request asks for those.
2. When a connection breaks, or a server cannot serve now, the request goes to the next address,
   with its id and the tokens so far. While nothing comes, each wait is longer than the last.
3. The stream goes on after the last token, as if nothing had happened, until its usage came or its
   deadline passes.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc
from grpc import aio

from milliways.api.errors import StreamChangedError
from milliways.model.errors import InvalidRequestError
from milliways.v1 import generate_pb2
from milliways.wire.addresses import is_loopback
from milliways.wire.channels import open_channel
from milliways.wire.errors import OverloadedError, UnavailableError
from milliways.wire.status_codes import error_of
from milliways.wire.tls import TlsSettings

_FINGERPRINT_FIELD = "resume.system_fingerprint"
_METHOD = "/milliways.v1.GenerateService/Generate"
_FIRST_BACKOFF_S = 0.02
_LAST_BACKOFF_S = 1.0
# A call that ends like this ended by accident: the server, or something on the way, is gone.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)


class GenerateClient:
    """Streams completions from any of several servers. Use it within one event loop."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        tls: TlsSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Raises OSError if a certificate file cannot be read."""
        if not addresses:
            raise ValueError("addresses: at least one is needed")
        self._clock = clock
        self._is_closed = False
        self._channels = [
            # A proxy of the environment may be the way to a server elsewhere.
            open_channel(address, tls or TlsSettings(), through_proxies=not is_loopback(address))
            for address in addresses
        ]
        # At random, so that clients spread over the servers.
        self._turn = (rng or random.Random()).randrange(len(addresses))

    async def __aenter__(self) -> "GenerateClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections, and with them the streams still open."""
        self._is_closed = True
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    async def generate(
        self,
        request: generate_pb2.GenerateRequest,
        *,
        timeout_s: float = 600.0,
        when_broken: Callable[[Exception], None] | None = None,
        wait_if_full: bool = False,
    ) -> AsyncGenerator[generate_pb2.GenerateResponse]:
        """The responses of an undisturbed stream. Closing it cancels the request.

        `when_broken` is called with the reason, each time before the stream goes on over another
        connection. A server whose queue is full refuses a request that has not begun; with
        `wait_if_full` the client asks again, after as long as the server says.

        Raises:
            AioRpcError: the request was refused, or its deadline passed. The error is then the
                last one that happened.
            StreamChangedError: a server went on with other tokens.
        """
        progress = _Progress(request)
        deadline_s = self._clock() + timeout_s
        backoff_s = _FIRST_BACKOFF_S
        while True:
            call = self._call(progress.request(), deadline_s - self._clock())
            try:
                async for response in call:
                    backoff_s = _FIRST_BACKOFF_S
                    yield progress.take(response)
                if progress.has_usage:
                    return
                raise UnavailableError("the stream ended before its usage")
            except (aio.AioRpcError, UnavailableError) as error:
                if progress.has_usage:
                    # All came. It does not matter that the connection broke before the status.
                    return
                waits_if_full = wait_if_full or progress.has_begun
                wait_s = max(backoff_s, _retry_after_s(error, waits_if_full=waits_if_full))
                if self._is_closed or self._clock() + wait_s >= deadline_s:
                    raise
                if when_broken is not None:
                    when_broken(error)
            finally:
                call.cancel()
            self._turn = (self._turn + 1) % len(self._channels)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            await asyncio.sleep(wait_s)

    def _call(self, request: generate_pb2.GenerateRequest, timeout_s: float) -> Any:
        call = self._channels[self._turn].unary_stream(
            _METHOD,
            request_serializer=generate_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generate_pb2.GenerateResponse.FromString,
        )
        return call(request, timeout=timeout_s)


class _Progress:
    """What came of a request so far: enough to ask for the rest, and to check that it is the rest.

    Invariant: `_received` has the entries of `_request.resume.received`, by sample index.
    """

    def __init__(self, request: generate_pb2.GenerateRequest) -> None:
        self.has_usage = False
        self._request = generate_pb2.GenerateRequest()
        self._request.CopyFrom(request)
        self._started: generate_pb2.GenerationStarted | None = None
        self._received = {r.sample_index: r for r in self._request.resume.received}

    @property
    def has_begun(self) -> bool:
        return self._started is not None

    def request(self) -> generate_pb2.GenerateRequest:
        """The request for what has not come yet."""
        return self._request

    def take(self, response: generate_pb2.GenerateResponse) -> generate_pb2.GenerateResponse:
        """Notes a response; returns what the client sees of it.

        Raises:
            StreamChangedError: it does not continue those before.
        """
        if response.HasField("started"):
            self._begin(response)
        resume = self._request.resume
        for score in response.prompt_logprobs:
            if score.position != resume.num_prompt_logprobs + 1:
                last = resume.num_prompt_logprobs
                raise StreamChangedError(f"prompt token {score.position} came after {last}")
            resume.num_prompt_logprobs += 1
        for event in response.events:
            if event.sample_index not in self._received:
                received = resume.received.add(sample_index=event.sample_index)
                self._received[event.sample_index] = received
            received = self._received[event.sample_index]
            if event.index != received.num_tokens:
                raise StreamChangedError(f"token {event.index} came, not {received.num_tokens}")
            if len(received.token_ids) == received.num_tokens:
                received.token_ids.append(event.token_id)
                received.is_finished = bool(event.finish_reason)
            received.num_tokens += 1
        self.has_usage |= response.HasField("usage")
        return response

    def _begin(self, response: generate_pb2.GenerateResponse) -> None:
        started = response.started
        if self._started is None:
            self._started = generate_pb2.GenerationStarted()
            self._started.CopyFrom(started)
            self._request.resume.request_id = started.request_id
            self._request.resume.system_fingerprint = started.system_fingerprint
        elif (self._started.system_fingerprint, self._started.seed) != (
            started.system_fingerprint,
            started.seed,
        ):
            raise StreamChangedError("the server that goes on has another model, or other numbers")
        else:
            response.ClearField("started")


def named_error(error: aio.AioRpcError) -> Exception | None:
    """The error of ours that a server ended a call with; None if it named none."""
    metadata = {k: v for k, v in error.trailing_metadata() or () if isinstance(v, str)}
    return error_of(error.details() or "", metadata)


def _retry_after_s(error: aio.AioRpcError | UnavailableError, *, waits_if_full: bool) -> float:
    """How long to wait before the next attempt, at least. Raises an error that is final."""
    if isinstance(error, UnavailableError):
        return 0.0
    named = named_error(error)
    if isinstance(named, UnavailableError):
        # The next server may be able to.
        return 0.0
    if isinstance(named, OverloadedError) and waits_if_full:
        return named.retry_after_s
    if isinstance(named, InvalidRequestError) and named.field == _FINGERPRINT_FIELD:
        raise StreamChangedError(str(named)) from error
    if named is not None or error.code() not in _BROKEN:
        raise error
    return 0.0
