"""A client of GenerateService whose streams outlive the servers that they come from.

    async with GenerateClient(["10.0.0.1:50051", "10.0.0.2:50051"]) as client:
        async for response in client.generate(request, timeout_s=120):
            ...

The life of a request here:

1. It goes to one of the addresses; every token that comes is noted, and handed on. So is every
   log-probability of the prompt, where it asks for those.
2. A connection that breaks, or a server that cannot serve now, sends it to the next address, with
   its request id and the tokens so far. Who has none of them waits a little longer each time.
3. The stream goes on behind the last token, as if nothing had happened, until its usage came or its
   deadline passes.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc
from grpc import aio

from milliways.v1 import generate_pb2
from milliways.wire.channels import open_channel
from milliways.wire.errors import OverloadedError, UnavailableError
from milliways.wire.status_codes import error_of
from milliways.wire.tls import TlsSettings

_METHOD = "/milliways.v1.GenerateService/Generate"
_FIRST_BACKOFF_S = 0.02
_LAST_BACKOFF_S = 1.0
# Ends of a call that nobody meant: the server, or something on the way, is gone.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)


class StreamChangedError(Exception):
    """What goes on is not the stream that broke off: the server has another model, say."""


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
        self._channels = [open_channel(address, tls or TlsSettings()) for address in addresses]
        # Anywhere, so that clients spread over the servers.
        self._turn = (rng or random.Random()).randrange(len(addresses))

    async def __aenter__(self) -> "GenerateClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections, and with them the streams still open."""
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    async def generate(
        self,
        request: generate_pb2.GenerateRequest,
        *,
        timeout_s: float = 600.0,
        when_broken: Callable[[Exception], None] | None = None,
    ) -> AsyncGenerator[generate_pb2.GenerateResponse]:
        """The responses of a stream that nothing disturbed. Closing it cancels the request.

        `when_broken` hears why, each time before the stream goes on over another connection.

        Raises:
            AioRpcError: the request was refused, or its deadline passed; then with what had
                happened last.
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
                    # All came; that the connection broke before the call's status is no loss.
                    return
                wait_s = max(backoff_s, _retry_after_s(error, progress))
                if self._clock() + wait_s >= deadline_s:
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
    """What came of a request so far: enough to ask for the rest, and to see that it is the rest."""

    def __init__(self, request: generate_pb2.GenerateRequest) -> None:
        self.has_usage = False
        self._request = generate_pb2.GenerateRequest()
        self._request.CopyFrom(request)
        self._started: generate_pb2.GenerationStarted | None = None
        self._had = {had.sample_index: had for had in self._request.resume.received}

    @property
    def has_begun(self) -> bool:
        return self._started is not None

    def request(self) -> generate_pb2.GenerateRequest:
        """The request, from where it stands."""
        return self._request

    def take(self, response: generate_pb2.GenerateResponse) -> generate_pb2.GenerateResponse:
        """Notes a response; what the client is to see of it.

        Raises:
            StreamChangedError: it does not follow on those before.
        """
        if response.HasField("started"):
            self._begin(response)
        resume = self._request.resume
        for score in response.prompt_logprobs:
            if score.position != resume.num_prompt_logprobs + 1:
                had = resume.num_prompt_logprobs
                raise StreamChangedError(f"prompt token {score.position} came after {had}")
            resume.num_prompt_logprobs += 1
        for event in response.events:
            if event.sample_index not in self._had:
                had = resume.received.add(sample_index=event.sample_index)
                self._had[event.sample_index] = had
            had = self._had[event.sample_index]
            if event.index != had.num_tokens:
                raise StreamChangedError(f"token {event.index} came, not {had.num_tokens}")
            if len(had.token_ids) == had.num_tokens:
                had.token_ids.append(event.token_id)
                had.is_finished = bool(event.finish_reason)
            had.num_tokens += 1
        self.has_usage |= response.HasField("usage")
        return response

    def _begin(self, response: generate_pb2.GenerateResponse) -> None:
        started = response.started
        if self._started is None:
            self._started = generate_pb2.GenerationStarted()
            self._started.CopyFrom(started)
            self._request.resume.request_id = started.request_id
        elif (self._started.system_fingerprint, self._started.seed) != (
            started.system_fingerprint,
            started.seed,
        ):
            raise StreamChangedError("the server that goes on has another model, or other numbers")
        else:
            response.ClearField("started")


def _retry_after_s(error: aio.AioRpcError | UnavailableError, progress: _Progress) -> float:
    """How long to wait before the next attempt, at least. Raises an error that is final."""
    if isinstance(error, UnavailableError):
        return 0.0
    metadata = {k: v for k, v in error.trailing_metadata() or () if isinstance(v, str)}
    named = error_of(error.details() or "", metadata)
    if isinstance(named, UnavailableError):
        # The next server may well be able to.
        return 0.0
    if isinstance(named, OverloadedError) and progress.has_begun:
        return named.retry_after_s
    if named is not None or error.code() not in _BROKEN:
        raise error
    return 0.0
