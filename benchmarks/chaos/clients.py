"""Clients of a cluster, over HTTP and gRPC, whose streams outlive the ingress that they come from.

A connection that breaks is noted in the answer, and the same request goes out again with how much
of it came: what `docs/resume.md` asks of clients. Whether it may break is the report's to judge.
"""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import urlsplit

from grpc import aio

from milliways.api.resuming import GenerateClient, StreamChangedError
from milliways.benchmarks.chaos.answers import Answer
from milliways.benchmarks.chaos.asks import Ask, Surface
from milliways.wire.errors import StartupError

REQUEST_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 10.0
# From one attempt to the next, each time that nothing came twice as long.
FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0
_DONE = b"data: [DONE]"
_ID = b"id: "
_DATA = b"data: "
# What is said by who stands before an ingress that is gone, or by one that cannot serve now.
_TRY_AGAIN = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


class AnswerError(Exception):
    """A request was not answered to its end; says why."""


class BrokenError(Exception):
    """A connection ended before the answer did; it can be gone on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where clients connect; `http` is a URL, `grpc` host and port."""

    http: str
    grpc: str

    def model(self) -> str:
        """The name of the model that is served.

        Raises:
            StartupError: nobody answers.
        """
        try:
            connection = _connect(self.http, REQUEST_TIMEOUT_S)
            try:
                connection.request("GET", "/v1/models")
                return json.loads(connection.getresponse().read())["data"][0]["id"]
            finally:
                connection.close()
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            raise StartupError(f"no endpoint of ours answers at {self.http}: {error}") from error


class Client(Protocol):
    """Asks, and writes into the answer what comes, and when a connection broke."""

    def ask(self, ask: Ask, answer: Answer) -> None:
        """Returns at the end of the answer.

        Raises:
            AnswerError: it has none.
        """
        ...


class HttpClient:
    """Reads server-sent events as they come; goes on by `Last-Event-ID`."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model

    def ask(self, ask: Ask, answer: Answer) -> None:
        deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
        events = _Events(answer)
        backoff_s = FIRST_BACKOFF_S
        while True:
            num_before = len(answer.token_times_s)
            try:
                self._ask_for_rest(ask, events, deadline_s - time.monotonic())
                return
            except (OSError, http.client.HTTPException, BrokenError) as error:
                answer.note_break(time.monotonic(), error)
                if len(answer.token_times_s) > num_before:
                    backoff_s = FIRST_BACKOFF_S
                if time.monotonic() + backoff_s >= deadline_s:
                    raise AnswerError(f"{type(error).__name__}: {error}") from error
            time.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    def _ask_for_rest(self, ask: Ask, events: "_Events", timeout_s: float) -> None:
        connection = _connect(self._url, timeout_s)
        try:
            headers = {"content-type": "application/json"}
            if events.last_id:
                headers["last-event-id"] = events.last_id
            body = json.dumps(ask.http_body(self._model))
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                _refuse(response)
            events.read(response)
        finally:
            connection.close()


class _Events:
    """The events of one answer, over as many connections as it takes."""

    def __init__(self, answer: Answer) -> None:
        self.last_id = ""
        self._answer = answer

    def read(self, lines: Iterable[bytes]) -> None:
        """Reads to the last event.

        Raises:
            AnswerError: one of them is an error.
            BrokenError: the last is missing.
        """
        event_id = ""
        for line in lines:
            if not line.endswith(b"\n"):
                # Cut off: it counts as if it had not come.
                break
            if line.startswith(_DONE):
                return
            if line.startswith(_ID):
                event_id = line.removeprefix(_ID).decode().strip()
            elif line.startswith(_DATA):
                chunk = json.loads(line.removeprefix(_DATA))
                if "error" in chunk:
                    raise AnswerError(str(chunk["error"].get("message", chunk["error"])))
                self._answer.add_chunk(chunk, time.monotonic())
                self.last_id = event_id or self.last_id
        raise BrokenError("the stream ended without its last event")


class GrpcClient:
    """Asks by a `GenerateClient`, which goes on by itself, in the loop of another thread."""

    def __init__(self, client: GenerateClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop

    def ask(self, ask: Ask, answer: Answer) -> None:
        asyncio.run_coroutine_threadsafe(self._ask(ask, answer), self._loop).result()

    async def _ask(self, ask: Ask, answer: Answer) -> None:
        stream = self._client.generate(
            ask.grpc_message(),
            timeout_s=REQUEST_TIMEOUT_S,
            when_broken=lambda error: answer.note_break(time.monotonic(), error),
        )
        try:
            async with aclosing(stream) as responses:
                async for response in responses:
                    now_s = time.monotonic()
                    answer.add_scores(response.prompt_logprobs)
                    for event in response.events:
                        answer.add_event(event, now_s)
        except aio.AioRpcError as error:
            raise AnswerError(f"{error.code().name}: {error.details()}") from error
        except StreamChangedError as error:
            raise AnswerError(str(error)) from error


@contextmanager
def open_clients(endpoint: Endpoint) -> Generator[dict[Surface, Client]]:
    """One for each way in; several threads may use it.

    Raises:
        StartupError: nobody answers.
    """
    http_client = HttpClient(endpoint.http, endpoint.model())
    with _loop() as loop:
        client = asyncio.run_coroutine_threadsafe(_make(endpoint), loop).result(CLOSE_TIMEOUT_S)
        try:
            yield {Surface.HTTP: http_client, Surface.GRPC: GrpcClient(client, loop)}
        finally:
            asyncio.run_coroutine_threadsafe(client.close(), loop).result(CLOSE_TIMEOUT_S)


async def _make(endpoint: Endpoint) -> GenerateClient:
    # A channel belongs to the loop that it is made in.
    return GenerateClient([endpoint.grpc])


@contextmanager
def _loop() -> Generator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="grpc-clients", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_TIMEOUT_S)
        if not thread.is_alive():
            loop.close()


def _connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=timeout_s)


def _refuse(response: Any) -> None:
    """Raises BrokenError where it may go better the next time, else AnswerError."""
    text = f"HTTP {response.status}: {response.read(1000)!r}"
    is_ours = response.headers.get_content_type() == "application/json"
    # Serve's proxy answers in plain text when a replica dies before it has begun to answer.
    if response.status in _TRY_AGAIN or (response.status >= 500 and not is_ours):
        raise BrokenError(text)
    raise AnswerError(text)
