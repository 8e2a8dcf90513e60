"""Clients whose connection broke resume elsewhere: no token comes twice, none is missing."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.served_model import ServedModel
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import Event, TokenEvent
from milliways.wire.errors import LeavingError, UnavailableError
from tests.http_apps import CHAT, COMPLETIONS, body, chat_body, run
from tests.ingresses import demo_model, local_source, make_ingress, served
from tests.sources import CountingSource, LocalSource, counted_events

ID = "019f00000000aaaaaaaaaaaaaaaaaaaa"
SseEvent = tuple[str, str]


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


@pytest.fixture(scope="module")
def engine_source() -> Iterator[LocalSource]:
    with local_source() as source:
        yield source


def partly_hidden(request: GenerationRequest) -> list[TokenEvent]:
    """Events in which every second token shows no text."""
    events = counted_events(request)
    return [replace(e, text="" if e.token_id % 2 else e.text) for e in events]


def reordered(request: GenerationRequest) -> list[TokenEvent]:
    """The events of `partly_hidden`, sample by sample, the last sample first."""
    return sorted(partly_hidden(request), key=lambda event: -event.sample_index)


def sse_events(text: str) -> list[SseEvent]:
    """The id and data of each event of a stream."""
    events: list[SseEvent] = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((fields.get("id", ""), fields["data"]))
    return events


async def streamed(
    client: httpx.AsyncClient, path: str, ask: Any, last_id: str = ""
) -> list[SseEvent]:
    headers = {"X-Milliways-Event-Ids": "1"}
    if last_id:
        headers["Last-Event-ID"] = last_id
    response = await client.post(path, json=ask, headers=headers)
    assert response.status_code == 200, response.text
    return sse_events(response.text)


def by_choice(events: list[SseEvent]) -> list[list[str]]:
    """The data of each choice in order, then the data that belongs to no choice."""
    choices: dict[int, list[str]] = {}
    for _, data in events:
        chunks = [] if data == "[DONE]" else json.loads(data)["choices"]
        choices.setdefault(chunks[0]["index"] if chunks else 10**6, []).append(data)
    return [choices[index] for index in sorted(choices)]


ASKS: list[tuple[str, dict[str, Any], int]] = [
    (COMPLETIONS, body(max_tokens=6), 1),
    (COMPLETIONS, body(max_tokens=5, logprobs=1, return_token_ids=True, n=2), 1),
    (COMPLETIONS, body(max_tokens=4, n=3, prompt=[[7, 100], [7, 101]], echo=True), 2),
    (COMPLETIONS, body(max_tokens=3, prompt=["Welcome to", "A", "B"], logprobs=0), 3),
    (CHAT, chat_body(max_tokens=5, n=2, logprobs=True, top_logprobs=1), 1),
]


@pytest.mark.parametrize("second_order", [partly_hidden, reordered])
@pytest.mark.parametrize(("path", "ask", "num_prompts"), ASKS)
def test_stream_resumes_after_any_event(
    model: ServedModel, path: str, ask: dict[str, Any], num_prompts: int, second_order: Any
) -> None:
    source = CountingSource(make_events=partly_hidden)
    ask = ask | {"stream": True, "stream_options": {"include_usage": True}}

    async def scenario(client: httpx.AsyncClient, _: Ingress) -> None:
        whole = await streamed(client, path, ask)
        assert whole[-1] == ("", "[DONE]")
        source.make_events = second_order
        for num_received in range(1, len(whole)):
            had = whole[:num_received]
            rest = await streamed(client, path, ask, last_id=had[-1][0])
            assert by_choice(had + rest) == by_choice(whole)
            # After the usage only [DONE] is left.
            assert (had + rest)[-2][0] == whole[-2][0]

    run(scenario, source, model)
    # Each run of a request has the same seed, but its own id.
    assert len({request.sampling.seed for request in source.requests}) == num_prompts
    assert len(set(source.request_ids)) == len(source.request_ids)


ENGINE_ASKS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 8, "n": 3, "temperature": 1.2},
    {"max_tokens": 10, "presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 7},
    {"max_tokens": 10, "stop": ["e", "42"], "temperature": 0.7, "logprobs": 3},
    {"max_tokens": 6, "prompt": ["Welcome to", "The answer"], "top_p": 0.9, "logprobs": 2},
]


@pytest.mark.parametrize("fields", ENGINE_ASKS)
def test_connection_cut_after_any_event_loses_nothing(
    model: ServedModel, engine_source: LocalSource, fields: dict[str, Any]
) -> None:
    ask = body(prompt="The answer to life", stream=True) | fields
    ask |= {"stream_options": {"include_usage": True}}

    async def scenario(urls: list[str]) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            whole: list[SseEvent] = []
            num_cuts = 0
            while not whole or num_cuts < len(whole) - 1:
                num_cuts += 1
                had = await cut_off(client, urls[0] + COMPLETIONS, ask, num_cuts)
                rest = await streamed(client, urls[1] + COMPLETIONS, ask, had[-1][0])
                request_id = had[-1][0].partition("/")[0]
                whole = await streamed(client, urls[1] + COMPLETIONS, ask, zero_of(had[-1][0]))
                assert by_choice(had + rest) == by_choice(whole)
                assert all(event[0].startswith(request_id) for event in rest[:-1])

    ingresses = [make_ingress(engine_source, model) for _ in range(2)]
    with (
        served(lambda: make_http_app(ingresses[0])) as first,
        served(lambda: make_http_app(ingresses[1])) as second,
    ):
        asyncio.run(scenario([first, second]))


def zero_of(event_id: str) -> str:
    """The event id of a stream of which nothing was received."""
    request_id, counts = event_id.split("/")[:2]
    return f"{request_id}/{'.'.join('0' for _ in counts.split('.'))}"


async def cut_off(client: httpx.AsyncClient, url: str, ask: Any, num_events: int) -> list[SseEvent]:
    """Reads the first events of a stream, then closes its connection."""
    text = ""
    headers = {"X-Milliways-Event-Ids": "1"}
    async with client.stream("POST", url, json=ask, headers=headers) as response:
        async for piece in response.aiter_text():
            text += piece
            if text.count("\n\n") >= num_events:
                break
    return sse_events(text)[:num_events]


def test_client_that_received_everything_gets_only_the_end(model: ServedModel) -> None:
    source = CountingSource()

    async def scenario(client: httpx.AsyncClient, _: Ingress) -> None:
        ask = body(stream=True)
        assert await streamed(client, COMPLETIONS, ask, f"{ID}/3") == [("", "[DONE]")]
        assert await streamed(client, COMPLETIONS, ask, f"{ID}/3/usage") == [("", "[DONE]")]

    run(scenario, source, model)


BAD_IDS: list[tuple[str, dict[str, Any]]] = [
    ("nonsense", {}),
    (f"{ID}/1.1", {}),
    (f"{ID}/1", {"n": 2}),
    (f"{ID}/4", {}),
    (f"{ID}/1", {"stream": False}),
    (f"{ID}/x", {}),
]


@pytest.mark.parametrize(("last_id", "fields"), BAD_IDS)
def test_bad_id_is_refused_by_name(
    model: ServedModel, last_id: str, fields: dict[str, Any]
) -> None:
    source = CountingSource()

    async def scenario(client: httpx.AsyncClient, _: Ingress) -> httpx.Response:
        ask = body(stream=True) | fields
        return await client.post(COMPLETIONS, json=ask, headers={"Last-Event-ID": last_id})

    response = run(scenario, source, model)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Last-Event-ID"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert source.requests == []


def test_more_tokens_than_there_are_is_an_error(model: ServedModel) -> None:
    def stopped(request: GenerationRequest) -> list[TokenEvent]:
        return counted_events(replace(request, max_tokens=2))

    async def scenario(client: httpx.AsyncClient, _: Ingress) -> httpx.Response:
        headers = {"Last-Event-ID": f"{ID}/3"}
        return await client.post(COMPLETIONS, json=body(stream=True), headers=headers)

    response = run(scenario, CountingSource(make_events=stopped), model)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Last-Event-ID"


def test_unavailable_is_an_http_error_before_the_stream_begins(model: ServedModel) -> None:
    source = CountingSource(error=UnavailableError("no router"), num_before_error=1)

    async def scenario(client: httpx.AsyncClient, _: Ingress) -> httpx.Response:
        headers = {"Last-Event-ID": f"{ID}/2"}
        return await client.post(COMPLETIONS, json=body(stream=True), headers=headers)

    response = run(scenario, source, model)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def documented_stream() -> Callable[..., Iterator[str]]:
    """The client of docs/resume.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "resume.md").read_text("utf-8")
    example: dict[str, Any] = {}
    exec(re.findall(r"```python\n(import.*?)```", text, re.DOTALL)[0], example)
    return example["stream"]


def test_documented_client_gets_the_whole_stream(model: ServedModel) -> None:
    """Connections break before and after every second event."""
    ask = body(max_tokens=9, stream=True, n=2)
    ingress = make_ingress(CountingSource(), model)
    with served(lambda: BreaksOff(make_http_app(ingress), num_events=2)) as url:
        chunks = [json.loads(data) for data in documented_stream()(url + COMPLETIONS, ask, 30.0)]
    assert len({chunk["id"] for chunk in chunks}) == 1
    expected = counted_events(GenerationRequest(prompt_ids=(100,), max_tokens=9, num_samples=2))
    for sample in range(2):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == sample]
        texts = [event.text for event in expected if event.sample_index == sample]
        assert [choice["text"] for choice in choices] == texts


def test_documented_client_goes_on_when_a_server_leaves(model: ServedModel) -> None:
    ask = body(max_tokens=9, stream=True)
    source = LeavesOnce(error=LeavingError("the server stops"), num_before_error=4)
    with served(lambda: make_http_app(make_ingress(source, model))) as url:
        received = list(documented_stream()(url + COMPLETIONS, ask, 30.0))
    texts = [json.loads(data)["choices"][0]["text"] for data in received]
    expected = counted_events(GenerationRequest(prompt_ids=(100,), max_tokens=9))
    assert texts == [event.text for event in expected]
    assert len(source.requests) == 2


class LeavesOnce(CountingSource):
    """The first request fails."""

    async def generate(self, request: GenerationRequest, **options: Any) -> AsyncGenerator[Event]:
        try:
            async with aclosing(super().generate(request, **options)) as events:
                async for event in events:
                    yield event
        except LeavingError:
            self.error = None
            raise


class BreaksOff:
    """Wraps an app so that responses end after a number of pieces, as if its process had died.

    The first has none at all, for which Serve's proxy makes up an answer.
    """

    def __init__(self, app: ASGIApp, num_events: int) -> None:
        self._app = app
        self._num_events = num_events
        self._has_answered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._has_answered:
            self._has_answered = True
            await PlainTextResponse("Internal Server Error", 500)(scope, receive, send)
            return
        num_pieces = 0

        async def send_some(message: Message) -> None:
            nonlocal num_pieces
            num_pieces += message["type"] == "http.response.body"
            if num_pieces > self._num_events:
                raise ConnectionError("the process is gone")
            await send(message)

        with suppress(ConnectionError):
            await self._app(scope, receive, send_some)
