"""Clients of a served model over gRPC: `AsyncClient`, and `Client`, which drives one in a thread.

    with Client("127.0.0.1:50051") as client:
        (result,) = client.generate(["Welcome to"], SamplingParams(temperature=0))

A request outlives the server that it went to: `resuming.py` asks the next address for the rest.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import grpc
from grpc import aio

from milliways.api.errors import CallRefusedError, ConfigError, DeadlineError, UnavailableError
from milliways.api.prompts import CheckedPrompt, Prompt, checked_prompt, checked_prompts, paired
from milliways.api.results import GenerationResult, Piece, Score, piece_of, result_of, score_of
from milliways.api.resuming import GenerateClient, named_error
from milliways.api.sampling import SamplingParams, check_whole
from milliways.model.sampling_params import MAX_LOGPROBS, SampledToken
from milliways.router.requests.messages import event_from_wire, score_from_wire
from milliways.v1 import generate_pb2
from milliways.wire.sampling import encode_params
from milliways.wire.tls import TlsSettings

Item = TypeVar("Item")
Result = TypeVar("Result")
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_IN_FLIGHT = 16
_CLOSE_TIMEOUT_S = 10.0


class AsyncClient:
    """Continues and scores prompts on a server. Use it within one event loop.

        async with AsyncClient("127.0.0.1:50051") as client:
            async for piece in client.stream("Welcome to"):
                print(piece.text, end="")

    A call goes to one of the addresses. If its connection breaks, if the server cannot serve now,
    or if its queue is full, the call goes on at the next address, until its time limit has passed.
    No token is lost or given twice.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        model: str = "",
        tls: TlsSettings | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
    ) -> None:
        """Connects when the first call is made.

        `addresses`: "host:port" of a server, or of several that serve the same model.
        `model`: the name of the model; empty: the one that is served there.
        `tls`: the certificates with which both sides prove who they are.
        `timeout_s`: the time limit of a call that gives none.
        `max_in_flight`: how many prompts of one call are at the server at once.

        Raises:
            ConfigError, InvalidRequestError: an option is out of range.
        """
        self._addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self._addresses:
            raise ConfigError("addresses", self._addresses, "at least one host:port")
        for address in self._addresses:
            if ":" not in address:
                raise ConfigError("addresses", address, "host:port")
        check_whole("max_in_flight", max_in_flight, 1, 2**31 - 1)
        self._model = model
        self._tls = tls
        self._timeout_s = _checked_timeout_s(timeout_s)
        self._max_in_flight = max_in_flight
        self._client: GenerateClient | None = None
        self._is_closed = False

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections, and with them the streams that are still open."""
        self._is_closed = True
        if self._client is not None:
            await self._client.close()

    async def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> list[GenerationResult]:
        """Continues prompts; one result for each, in their order.

        `params` hold for all prompts, or are a list with an entry for each.

        Raises:
            InvalidRequestError: a prompt or a parameter does not fit.
            ClusterError: the server refused, or could not serve in time; see `errors.py`.
        """
        deadline_s = self._deadline_s(timeout_s)

        async def result(ask: tuple[CheckedPrompt, SamplingParams]) -> GenerationResult:
            prompt, sampling = ask
            pieces: list[Piece] = []
            num_prompt_tokens = 0
            responses = self._responses(_message(prompt, sampling), deadline_s)
            async with aclosing(responses):
                async for response in responses:
                    pieces += _pieces(response, sampling)
                    num_prompt_tokens = response.usage.num_prompt_tokens or num_prompt_tokens
            return result_of(prompt, num_prompt_tokens, pieces, sampling.n)

        return await self._beside(result, paired(prompts, params))

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Piece]:
        """Continues one prompt, and yields each token as it comes. Closing it cancels the rest.

        Raises:
            InvalidRequestError, ClusterError: as `generate`.
        """
        sampling = params or SamplingParams()
        message = _message(checked_prompt(prompt), sampling)
        responses = self._responses(message, self._deadline_s(timeout_s))
        async with aclosing(responses):
            async for response in responses:
                for piece in _pieces(response, sampling):
                    yield piece

    async def score(
        self, texts: Iterable[Prompt], *, top: int = 0, timeout_s: float | None = None
    ) -> list[Score]:
        """The log-probability of each token of each text, but of its first one.

        `top`: how many most likely tokens come with each, at most 20.

        Raises:
            InvalidRequestError, ClusterError: as `generate`.
        """
        check_whole("top", top, 0, MAX_LOGPROBS)
        deadline_s = self._deadline_s(timeout_s)

        async def score(prompt: CheckedPrompt) -> Score:
            tokens: list[SampledToken] = []
            message = generate_pb2.GenerateRequest(max_tokens=0, prompt_logprobs=top)
            responses = self._responses(_with_prompt(message, prompt), deadline_s)
            async with aclosing(responses):
                async for response in responses:
                    # A prompt that could not be scored ends with a token that says so.
                    _pieces(response, SamplingParams())
                    tokens += map(score_from_wire, response.prompt_logprobs)
            return score_of(prompt, tokens)

        return await self._beside(score, checked_prompts(texts))

    async def _beside(
        self, call: Callable[[Item], Coroutine[Any, Any, Result]], items: Iterable[Item]
    ) -> list[Result]:
        """One call for each item, at most `max_in_flight` at once. One that fails ends all."""
        slots = asyncio.Semaphore(self._max_in_flight)

        async def run(item: Item) -> Result:
            async with slots:
                return await call(item)

        tasks = [asyncio.ensure_future(run(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _responses(
        self, message: generate_pb2.GenerateRequest, deadline_s: float
    ) -> AsyncGenerator[generate_pb2.GenerateResponse]:
        message.model = self._model
        timeout_s = deadline_s - time.monotonic()
        if timeout_s <= 0:
            raise DeadlineError("the call's time limit passed before the request began")
        stream = self._connected().generate(message, timeout_s=timeout_s, wait_if_full=True)
        try:
            async with aclosing(stream) as responses:
                async for response in responses:
                    yield response
        except aio.AioRpcError as error:
            raise _typed(error) from error

    def _connected(self) -> GenerateClient:
        """The connections belong to the event loop that runs now."""
        if self._is_closed:
            raise ValueError("this client is closed")
        if self._client is None:
            self._client = GenerateClient(self._addresses, tls=self._tls)
        return self._client

    def _deadline_s(self, timeout_s: float | None) -> float:
        given_s = self._timeout_s if timeout_s is None else _checked_timeout_s(timeout_s)
        return time.monotonic() + given_s


class Client:
    """`AsyncClient` for programs without an event loop. Several threads may use it.

        with Client("127.0.0.1:50051") as client:
            for piece in client.stream("Welcome to"):
                print(piece.text, end="")

    Invariants: `_client` is only used in `_loop`, which runs in a thread of its own. A call goes
    to `_loop` only under `_lock`, and none after `_is_closed` is set.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        model: str = "",
        tls: TlsSettings | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
    ) -> None:
        """As `AsyncClient`."""
        self._client = AsyncClient(
            addresses, model=model, tls=tls, timeout_s=timeout_s, max_in_flight=max_in_flight
        )
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="milliways-client", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections, and with them the streams that are still open."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            ended = asyncio.run_coroutine_threadsafe(self._end_calls(), self._loop)
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> list[GenerationResult]:
        """As `AsyncClient.generate`."""
        return self._wait(self._client.generate(prompts, params, timeout_s=timeout_s))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Generator[Piece]:
        """As `AsyncClient.stream`."""
        pieces = self._client.stream(prompt, params, timeout_s=timeout_s)
        try:
            while (piece := self._wait(_next(pieces))) is not None:
                yield piece
        finally:
            # A client that was closed has ended it.
            with suppress(ValueError):
                self._wait(pieces.aclose())

    def score(
        self, texts: Iterable[Prompt], *, top: int = 0, timeout_s: float | None = None
    ) -> list[Score]:
        """As `AsyncClient.score`."""
        return self._wait(self._client.score(texts, top=top, timeout_s=timeout_s))

    async def _end_calls(self) -> None:
        await self._client.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _wait(self, call: Coroutine[Any, Any, Result]) -> Result:
        with self._lock:
            if self._is_closed:
                call.close()
                raise ValueError("this client is closed")
            future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ValueError("this client was closed during the call") from None
        except BaseException:
            # Ctrl-C, for example: nobody waits for the rest.
            future.cancel()
            raise


async def _next(pieces: AsyncGenerator[Piece]) -> Piece | None:
    return await anext(pieces, None)


def _message(prompt: CheckedPrompt, params: SamplingParams) -> generate_pb2.GenerateRequest:
    message = generate_pb2.GenerateRequest(
        max_tokens=params.max_tokens,
        sampling=encode_params(params.draw_params()),
        num_samples=params.n,
        stop=params.stop,
        ignore_eos=params.ignore_eos,
    )
    return _with_prompt(message, prompt)


def _with_prompt(
    message: generate_pb2.GenerateRequest, prompt: CheckedPrompt
) -> generate_pb2.GenerateRequest:
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.tokens.token_ids.extend(prompt)
    return message


def _pieces(response: generate_pb2.GenerateResponse, params: SamplingParams) -> list[Piece]:
    return [piece_of(event_from_wire(event), params) for event in response.events]


def _typed(error: aio.AioRpcError) -> Exception:
    """The error that a call ended with, without gRPC's types."""
    named = named_error(error)
    if named is not None:
        return named
    message = error.details() or ""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(message)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return UnavailableError(message)
    return CallRefusedError(error.code().name, message)


def _checked_timeout_s(timeout_s: float) -> float:
    if not 0 < timeout_s < float("inf"):
        raise ConfigError("timeout_s", timeout_s, "a number of seconds above 0")
    return timeout_s
