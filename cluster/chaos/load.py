"""Clients: threads that ask over HTTP and gRPC, one request after another; every answer is kept."""

import http.client
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
from milliways.v1 import generate_pb2, generate_pb2_grpc

from cluster.chaos.answers import Answer, Heard
from cluster.chaos.asks import Ask, Surface
from cluster.errors import StartupError

REQUEST_TIMEOUT_S = 120.0
_DONE = b"data: [DONE]"


class AnswerError(Exception):
    """A request was not answered to its end; says why."""


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
            connection = _connect(self.http)
            try:
                connection.request("GET", "/v1/models")
                return json.loads(connection.getresponse().read())["data"][0]["id"]
            finally:
                connection.close()
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            raise StartupError(f"no endpoint of ours answers at {self.http}: {error}") from error


class Client(Protocol):
    """Asks, and writes into the answer what comes."""

    def ask(self, ask: Ask, answer: Answer) -> None:
        """Returns at the end of the answer.

        Raises:
            AnswerError: it has none.
        """
        ...


class HttpClient:
    """Reads server-sent events as they come."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model

    def ask(self, ask: Ask, answer: Answer) -> None:
        connection = _connect(self._url)
        try:
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps(ask.http_body(self._model)),
                {"content-type": "application/json"},
            )
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise AnswerError(f"HTTP {response.status}: {response.read(1000)!r}")
            for chunk in _chunks(response):
                answer.add_chunk(chunk, time.monotonic())
        except (OSError, http.client.HTTPException) as error:
            raise AnswerError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()


class GrpcClient:
    """Reads a stream of responses as they come."""

    def __init__(self, channel: grpc.Channel) -> None:
        # Generated stubs have no types.
        self._stub: Any = generate_pb2_grpc.GenerateServiceStub(channel)

    def ask(self, ask: Ask, answer: Answer) -> None:
        call: Iterable[generate_pb2.GenerateResponse] = self._stub.Generate(
            ask.grpc_message(), timeout=REQUEST_TIMEOUT_S
        )
        try:
            for response in call:
                now_s = time.monotonic()
                answer.add_scores(response.prompt_logprobs)
                for event in response.events:
                    answer.add_event(event, now_s)
        except grpc.RpcError as error:
            known: Any = error
            raise AnswerError(f"{known.code().name}: {known.details()}") from error


class Load:
    """Some clients, who ask the same requests over and over until they are stopped."""

    def __init__(self, asks: Sequence[Ask], clients: dict[Surface, Client], at_a_time: int) -> None:
        self._asks = asks
        self._clients = clients
        self._at_a_time = at_a_time
        self._lock = threading.Lock()
        self._heard: list[Heard] = []
        self._wanted: Mapping[int, Answer] | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    @property
    def num_heard(self) -> int:
        """Requests that ended."""
        return len(self._heard)

    def run_once(self) -> list[Heard]:
        """Every request once, in the order of the requests."""
        self._begin(iter(range(len(self._asks))))
        return sorted(self.stop(at_once=False), key=lambda heard: heard.ask_index)

    def start(self, wanted: Mapping[int, Answer] | None = None) -> None:
        """Asks over and over; answers are compared as they come where it is said with what."""
        self._wanted = wanted
        count = len(self._asks)
        self._begin(number % count for number in _naturals())

    def stop(self, *, at_once: bool = True) -> list[Heard]:
        """Waits until what was begun has ended; all that was heard."""
        if at_once:
            self._stopped.set()
        for thread in self._threads:
            thread.join()
        heard, self._heard = self._heard, []
        return heard

    def _begin(self, indices: Iterator[int]) -> None:
        self._stopped.clear()
        self._threads = [
            threading.Thread(target=self._work, args=(indices,), name=f"client-{i}", daemon=True)
            for i in range(self._at_a_time)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, indices: Iterator[int]) -> None:
        while not self._stopped.is_set():
            with self._lock:
                index = next(indices, None)
            if index is None:
                return
            heard = self._ask(index)
            if self._wanted is not None:
                # An hour of tokens would be more than anybody has room for.
                heard = heard.judged(self._wanted)
            with self._lock:
                self._heard.append(heard)

    def _ask(self, index: int) -> Heard:
        ask = self._asks[index]
        answer = Answer.of(ask)
        started_s, error = time.monotonic(), ""
        try:
            self._clients[ask.surface].ask(ask, answer)
            if not answer.is_complete:
                error = "the stream ended before the answer"
        except (AnswerError, ValueError, KeyError, IndexError) as problem:
            error = str(problem) or type(problem).__name__
        return Heard(
            ask_index=index,
            started_s=started_s,
            ended_s=time.monotonic(),
            answer=answer,
            error=error,
        )


def make_clients(endpoint: Endpoint, channel: grpc.Channel) -> dict[Surface, Client]:
    """One for each way in; several threads may use it."""
    return {
        Surface.HTTP: HttpClient(endpoint.http, endpoint.model()),
        Surface.GRPC: GrpcClient(channel),
    }


def open_channel(endpoint: Endpoint) -> grpc.Channel:
    """To be closed by whoever opens it."""
    return grpc.insecure_channel(endpoint.grpc)


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=REQUEST_TIMEOUT_S)


def _chunks(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events of a stream.

    Raises:
        AnswerError: one of them is an error, or the last is missing.
    """
    for line in lines:
        if line.startswith(_DONE):
            return
        if line.startswith(b"data: "):
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise AnswerError(str(chunk["error"].get("message", chunk["error"])))
            yield chunk
    raise AnswerError("the stream ended without its last event")


def _naturals() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1
