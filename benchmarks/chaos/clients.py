"""Clients of a cluster, over HTTP and gRPC. Their streams survive the death of an ingress.

When a connection breaks, the client records that in the answer. It then sends the request again,
and says how much of the answer it has, as `docs/resume.md` requires of clients. The report decides
whether the connection was allowed to break.
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
from milliways.benchmarks.chaos.requests import ChaosRequest, Surface
from milliways.wire.errors import StartupError

REQUEST_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 10.0
# The pause before a retry. It doubles each time that an attempt brought no token.
FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0
_DONE = b"data: [DONE]"
_ID = b"id: "
_DATA = b"data: "
# The answers of a proxy whose ingress is gone, and of an ingress that cannot serve now.
_TRY_AGAIN = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


class AnswerError(Exception):
    """A request did not get a complete answer; the message says why."""


class BrokenError(Exception):
    """A connection ended before the answer was complete. The stream can be resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where clients connect: `http` is a URL, `grpc` is host and port."""

    http: str
    grpc: str

    def model(self) -> str:
        """The name of the model that is served.

        Raises:
            StartupError: no Milliways server answers at `http`.
        """
        try:
            connection = _connect(self.http, REQUEST_TIMEOUT_S)
            try:
                connection.request("GET", "/v1/models")
                return json.loads(connection.getresponse().read())["data"][0]["id"]
            finally:
                connection.close()
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            raise StartupError(f"no Milliways server answers at {self.http}: {error}") from error


class Client(Protocol):
    """Sends requests, and records in the answer what arrives and when a connection broke."""

    def send(self, request: ChaosRequest, answer: Answer) -> None:
        """Sends a request; returns when the answer is complete.

        Raises:
            AnswerError: the answer stays incomplete.
        """
        ...


class HttpClient:
    """Reads server-sent events as they arrive; resumes with `Last-Event-ID`."""

    def __init__(self, url: str, model: str, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._url = url
        self._model = model
        self._timeout_s = timeout_s

    def send(self, request: ChaosRequest, answer: Answer) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        events = _Events(answer)
        backoff_s = FIRST_BACKOFF_S
        while True:
            num_before = len(answer.token_times_s)
            try:
                self._request_rest(request, events, deadline_s - time.monotonic())
                return
            except (OSError, http.client.HTTPException, BrokenError) as error:
                answer.note_break(time.monotonic(), error)
                if len(answer.token_times_s) > num_before:
                    backoff_s = FIRST_BACKOFF_S
                if time.monotonic() + backoff_s >= deadline_s:
                    raise AnswerError(f"{type(error).__name__}: {error}") from error
            time.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    def _request_rest(self, request: ChaosRequest, events: "_Events", timeout_s: float) -> None:
        connection = _connect(self._url, timeout_s)
        try:
            headers = {"content-type": "application/json", "x-milliways-event-ids": "1"}
            if events.last_id:
                headers["last-event-id"] = events.last_id
            body = json.dumps(request.http_body(self._model))
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                _refuse(response)
            events.read(response)
        finally:
            connection.close()


class _Events:
    """The events of one answer, over one or more connections.

    Invariant: `last_id` is the id of the last event that is in the answer.
    """

    def __init__(self, answer: Answer) -> None:
        self.last_id = ""
        self._answer = answer

    def read(self, lines: Iterable[bytes]) -> None:
        """Reads until the event that ends the answer.

        Raises:
            AnswerError: an event is an error.
            BrokenError: the connection ended before that event.
        """
        event_id = ""
        for line in lines:
            if not line.endswith(b"\n"):
                # The line is cut off: ignore it. It is sent again after a resume.
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
    """Uses a `GenerateClient`, which resumes broken streams, in the event loop of a thread."""

    def __init__(
        self,
        client: GenerateClient,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._client = client
        self._loop = loop
        self._timeout_s = timeout_s

    def send(self, request: ChaosRequest, answer: Answer) -> None:
        asyncio.run_coroutine_threadsafe(self._send(request, answer), self._loop).result()

    async def _send(self, request: ChaosRequest, answer: Answer) -> None:
        stream = self._client.generate(
            request.grpc_message(),
            timeout_s=self._timeout_s,
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
def open_clients(
    endpoint: Endpoint, timeout_s: float | None = None
) -> Generator[dict[Surface, Client]]:
    """One client for each protocol; several threads may use the same client.

    A request ends with an error after `timeout_s`, or after `REQUEST_TIMEOUT_S`.

    Raises:
        StartupError: no Milliways server answers.
    """
    timeout_s = timeout_s or REQUEST_TIMEOUT_S
    http_client = HttpClient(endpoint.http, endpoint.model(), timeout_s)
    with _loop() as loop:
        client = asyncio.run_coroutine_threadsafe(_make(endpoint), loop).result(CLOSE_TIMEOUT_S)
        try:
            yield {Surface.HTTP: http_client, Surface.GRPC: GrpcClient(client, loop, timeout_s)}
        finally:
            asyncio.run_coroutine_threadsafe(client.close(), loop).result(CLOSE_TIMEOUT_S)


async def _make(endpoint: Endpoint) -> GenerateClient:
    # A channel belongs to the event loop in which it is made.
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
    """Raises BrokenError if a retry may succeed, otherwise AnswerError."""
    text = f"HTTP {response.status}: {response.read(1000)!r}"
    is_ours = response.headers.get_content_type() == "application/json"
    # Ray Serve's proxy answers in plain text when a replica dies before its answer has begun.
    if response.status in _TRY_AGAIN or (response.status >= 500 and not is_ours):
        raise BrokenError(text)
    raise AnswerError(text)
