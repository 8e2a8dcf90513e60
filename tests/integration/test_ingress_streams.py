"""What a stream looks like on the wire: every client of the field reads it, also while it waits."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.openai.exchange import Pace
from milliways.cluster.ingress.served_model import ServedModel
from milliways.wire.errors import ModelFaultError, OverloadedError
from tests.event_parsers import PARSERS, Parser
from tests.http_apps import CHAT, COMPLETIONS, body, chat_body, post
from tests.ingresses import demo_model, make_ingress, served
from tests.sources import CountingSource

QUICK = Pace(headers_after_s=0.01, quiet_s=0.01)


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def cut(text: str, size: int) -> Iterator[bytes]:
    whole = text.encode()
    yield from (whole[start : start + size] for start in range(0, len(whole), size))


class Waiting:
    """A stream over a real connection, whose tokens come only when they are allowed to."""

    def __init__(self, url: str, source: CountingSource, **headers: str) -> None:
        self._url, self._source, self._headers = url, source, headers
        self.pieces: list[bytes] = []

    async def read(self, num_quiet: int, **fields: Any) -> httpx.Response:
        """Lets a token come whenever this many pieces came without one."""
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream(
                "POST", self._url + COMPLETIONS, json=body(**fields), headers=self._headers
            ) as response,
        ):
            num_before = 0
            async for piece in response.aiter_raw():
                self.pieces.append(piece)
                assert self._source.gate is not None
                if len(self.pieces) - num_before >= num_quiet:
                    num_before = len(self.pieces)
                    self._source.gate.release()
        return response


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
@pytest.mark.parametrize(("path", "ask"), [(COMPLETIONS, body(n=2)), (CHAT, chat_body())])
def test_every_client_reads_a_stream(
    model: ServedModel, path: str, ask: dict[str, Any], parser: Parser, size: int
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = post(CountingSource(), model, path, json=ask | options)
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    values = parser(cut(response.text, size))
    assert len(values) == 3 * ask.get("n", 1) + 1
    assert values[-1]["usage"]["completion_tokens"] == 3 * ask.get("n", 1)
    assert "milliways_cursor" not in values[0]


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_every_client_reads_a_stream_that_was_kept_awake(
    model: ServedModel, parser: Parser
) -> None:
    source = CountingSource(gate=asyncio.Semaphore(0))
    with served(lambda: make_http_app(make_ingress(source, model), pace=QUICK)) as url:
        waiting = Waiting(url, source)
        asyncio.run(waiting.read(3, stream=True))
    blanks = [piece for piece in waiting.pieces if not piece.strip()]
    assert len(blanks) >= 6
    texts = [value["choices"][0]["text"] for value in parser(waiting.pieces)]
    assert texts == ["101,", "102,", "103,"]


def test_headers_do_not_wait_for_a_token(model: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(0))

    async def scenario(url: str) -> None:
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream("POST", url + COMPLETIONS, json=body(stream=True)) as response,
        ):
            assert response.status_code == 200
            assert source.gate is not None
            for _ in range(3):
                source.gate.release()
            assert (await response.aread()).endswith(b"data: [DONE]\n\n")

    with served(lambda: make_http_app(make_ingress(source, model), pace=QUICK)) as url:
        asyncio.run(scenario(url))


def test_blank_lines_are_no_events_to_a_client_that_wants_ids(model: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(0))
    with served(lambda: make_http_app(make_ingress(source, model), pace=QUICK)) as url:
        waiting = Waiting(url, source, **{"x-milliways-event-ids": "1"})
        asyncio.run(waiting.read(3, stream=True))
    assert b":\n" in waiting.pieces
    assert len(PARSERS["openai"](waiting.pieces)) == 3


def test_refusal_that_comes_at_once_has_its_own_status(model: ServedModel) -> None:
    source = CountingSource(error=OverloadedError("full"))
    assert post(source, model, COMPLETIONS, json=body(stream=True)).status_code == 429


def test_cursor_stands_in_the_json_when_asked(model: ServedModel) -> None:
    headers = {"x-milliways-event-ids": "json"}
    source = CountingSource(error=ModelFaultError("nan"), num_before_error=2)
    response = post(source, model, COMPLETIONS, json=body(stream=True), headers=headers)
    assert "id: " not in response.text
    values = PARSERS["sglang.bench_serving"]([response.content])
    cursors = [value["milliways_cursor"] for value in values]
    counts = [cursor.split("/")[1] for cursor in cursors]
    # The error has the cursor of the last event.
    assert (counts, list(values[-1])) == (["1", "2", "2"], ["error", "milliways_cursor"])

    again = {"Last-Event-ID": cursors[0]} | headers
    source = CountingSource()
    response = post(source, model, COMPLETIONS, json=body(stream=True), headers=again)
    values = PARSERS["sglang.bench_serving"]([response.content])
    assert [value["choices"][0]["text"] for value in values] == ["102,", "103,"]
    assert values[0]["milliways_cursor"].split("/")[0] == cursors[0].split("/")[0]


def test_client_that_resumes_gets_ids_unless_it_says_otherwise(model: ServedModel) -> None:
    first = post(
        CountingSource(),
        model,
        COMPLETIONS,
        json=body(stream=True),
        headers={"x-milliways-event-ids": "1"},
    )
    last_id = first.text.split("\n")[0].removeprefix("id: ")
    for more, has_ids in (({}, True), ({"x-milliways-event-ids": "0"}, False)):
        headers = {"Last-Event-ID": last_id} | more
        response = post(
            CountingSource(), model, COMPLETIONS, json=body(stream=True), headers=headers
        )
        assert ("id: " in response.text) == has_ids


def test_other_value_of_the_header_is_refused_by_name(model: ServedModel) -> None:
    headers = {"x-milliways-event-ids": "yes"}
    response = post(CountingSource(), model, COMPLETIONS, json=body(stream=True), headers=headers)
    assert response.status_code == 400
    error = json.loads(response.text)["error"]
    assert error["param"] == "X-Milliways-Event-Ids" and "json" in error["message"]
