"""What strangers send before a request is one: half a body, other protocols, odd headers."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from milliways.cluster.ingress.front import Front, fit_headers
from milliways.cluster.ingress.http_protocol import NoUpgradeProtocol, without_offers
from milliways.cluster.ingress.openai import exchange
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.request_id import is_request_id
from milliways.cluster.ingress.served_model import ServedModel
from tests.http_apps import COMPLETIONS, body
from tests.ingresses import demo_model, make_ingress, served
from tests.sources import CountingSource

TYPE = "Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


@contextmanager
def sent(
    url: str, *headers: str, content: bytes, size: int | None = None
) -> Iterator[socket.socket]:
    """A connection on which a request was sent, perhaps in part."""
    address = urlsplit(url)
    assert address.hostname and address.port
    length = len(content) if size is None else size
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n"
    head += "".join(f"{header}\r\n" for header in (TYPE.strip(), *headers))
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode("latin-1") + b"\r\n" + content)
        yield connection


def answer_on(connection: socket.socket) -> bytes:
    return connection.recv(65536)


def test_half_sent_bodies_keep_nobody_waiting(model: ServedModel) -> None:
    source = CountingSource()
    ingress = make_ingress(source, model, max_ongoing_requests=1)
    with served(lambda: Front(make_http_app(ingress), body_within_s=2.0)) as url:
        held = [sent(url, content=b"{", size=9) for _ in range(40)]
        connections = [each.__enter__() for each in held]
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        response = httpx.post(f"{url}{COMPLETIONS}", json=body(), timeout=30)
        assert response.status_code == 200
        for connection in connections:
            # The server closes it.
            answer = b"".join(iter(lambda held=connection: answer_on(held), b""))
            status, _, rest = answer.partition(b"\r\n")
            assert b" 408 " in status
            assert b"connection: close" in rest.lower()
            assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["type"]
        for each in held:
            each.__exit__(None, None, None)
    assert len(source.requests) == 1


def test_body_that_does_not_come_is_refused_without_a_front_too(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "BODY_WITHIN_S", 0.05)
    with (
        served(lambda: make_http_app(make_ingress(CountingSource(), model))) as url,
        sent(url, content=b"{", size=9) as connection,
    ):
        assert b" 408 " in answer_on(connection)


def test_client_that_leaves_within_its_body_is_no_error_of_the_server(model: ServedModel) -> None:
    ingress = make_ingress(CountingSource(), model)
    with served(lambda: make_http_app(ingress)) as url:
        with sent(url, content=b"{", size=9):
            assert httpx.get(f"{url}/health").status_code == 200
        gone = 'code="499"'
        while gone not in (text := httpx.get(f"{url}/metrics").text):
            assert 'code="500"' not in text


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.3"])
def test_offer_of_another_protocol_is_ignored(model: ServedModel, offer: str) -> None:
    make_app = lambda: Front(make_http_app(make_ingress(CountingSource(), model)))  # noqa: E731
    content = json.dumps(body()).encode()
    headers = (
        "Connection: Upgrade, HTTP2-Settings",
        "HTTP2-Settings: AAMAAABk",
        f"UPGRADE: {offer}",
    )
    with served(make_app, NoUpgradeProtocol) as url:
        for _ in range(2):
            with sent(url, *headers, content=content) as connection:
                assert answer_on(connection).startswith(b"HTTP/1.1 200 OK")


def test_body_that_looks_like_an_offer_stays_as_it_is() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nUpgrade-Insecure-Requests: 1\r\n\r\n"
    text = b"a\r\nUpgrade: h2c\r\n\r\n"
    assert without_offers(head + text) == head + text
    offering = b"POST / HTTP/1.1\r\nupgrade : h2c\r\n\r\n"
    assert b"upgrade :" not in without_offers(offering + text)
    assert without_offers(offering + text).endswith(text)


def test_bytes_that_are_no_utf8_reach_the_application(model: ServedModel) -> None:
    make_app = lambda: Front(make_http_app(make_ingress(CountingSource(), model)))  # noqa: E731
    with (
        served(make_app) as url,
        sent(url, "X-Request-Id: \xff\xfeab\xe9", "X-Other: \xff", content=b"{}") as connection,
    ):
        answer = answer_on(connection)
    assert answer.startswith(b"HTTP/1.1 400") and b"x-request-id: ab\r\n" in answer


def test_headers_that_serve_obeys_are_not_taken_from_strangers() -> None:
    given = [
        (b"x-request-timeout-seconds", b"0.001"),
        (b"x-request-disconnect-disabled", b"1"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"Serve-Multiplexed-Model-Id", b"x"),
        (b"accept", b"\xe9t\xe9"),
        (b"x-request-id", b"mine"),
    ]
    kept = dict(fit_headers(given))
    assert kept == {b"accept": "été".encode(), b"x-request-id": b"mine"}
    (name,) = [value for key, value in fit_headers([]) if key == b"x-request-id"]
    assert is_request_id(name.decode())


@pytest.mark.parametrize("max_held_bytes", [0, 3, 1000])
def test_body_reaches_the_application_whole(max_held_bytes: int) -> None:
    pieces = [b"abc", b"def", b"g"]

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        content, more = b"", True
        while more:
            message = await receive()
            content, more = content + message["body"], message["more_body"]
        await send({"type": "http.response.body", "body": content})

    async def main() -> list[Message]:
        front = Front(echo, max_held_bytes=max_held_bytes)
        left = [
            {"type": "http.request", "body": piece, "more_body": piece != pieces[-1]}
            for piece in pieces
        ]
        answers: list[Message] = []

        async def receive() -> Any:
            return left.pop(0)

        async def send(message: Message) -> None:
            answers.append(message)

        await front({"type": "http", "method": "POST", "headers": []}, receive, send)
        assert front._num_held_bytes == 0
        return answers

    assert [message["body"] for message in asyncio.run(main())] == [b"abcdefg"]
