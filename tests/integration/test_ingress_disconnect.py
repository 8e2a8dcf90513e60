"""Over real sockets: a request ends when its client leaves; a slow client slows no other."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.served_model import ServedModel
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent
from tests.ingresses import demo_model, make_ingress, served
from tests.sources import CountingSource, counted_events


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "not within the time limit"
        time.sleep(0.005)


def send_request(url: str, path: str, **fields: object) -> socket.socket:
    """Sends a completion request; does not read the response."""
    address = urlsplit(url)
    assert address.hostname and address.port
    connection = socket.create_connection((address.hostname, address.port))
    body = json.dumps({"model": "demo", "prompt": [7, 100], **fields}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[7, 100], [[7, 100], [7, 200]]])
def test_request_of_a_client_that_leaves_ends(
    model: ServedModel, stream: bool, prompt: list[object]
) -> None:
    # The source gives two tokens, and then waits for ever.
    source = CountingSource(gate=asyncio.Semaphore(2))
    ingress = make_ingress(source, model)
    with served(lambda: make_http_app(ingress)) as url:
        connection = send_request(url, "/v1/completions", prompt=prompt, stream=stream)
        wait_until(lambda: source.num_running == len(source.requests) > 0)
        if stream:
            assert b"200 OK" in connection.recv(100)
        connection.close()
        wait_until(lambda: source.num_running == 0 and ingress.num_ongoing == 0)
        assert source.num_closed_early == len(source.requests)
        wait_until(lambda: 'code="499"' in httpx.get(f"{url}/metrics").text)


def test_slow_client_slows_its_own_request_and_no_other(model: ServedModel) -> None:
    def endless(request: GenerationRequest) -> list[TokenEvent]:
        return counted_events(request) * 2000

    ingress = make_ingress(CountingSource(make_events=endless), model)
    with served(lambda: make_http_app(ingress)) as url:
        slow = send_request(url, "/v1/completions", stream=True, max_tokens=500)
        wait_until(lambda: ingress.num_ongoing == 1)
        quick = {"model": "demo", "prompt": "A", "max_tokens": 1, "stream": True}
        started_s = time.monotonic()
        with httpx.stream("POST", f"{url}/v1/completions", json=quick) as response:
            assert next(response.iter_lines()).startswith("data: ")
        assert time.monotonic() - started_s < 10
        # A million tokens are wanted, but the socket is full, so the source has stopped.
        wait_until(lambda: ingress.num_ongoing == 1)
        slow.close()
        wait_until(lambda: ingress.num_ongoing == 0)


def test_body_beyond_the_limit_is_refused_over_a_socket(model: ServedModel) -> None:
    ingress: Ingress = make_ingress(CountingSource(), model, max_body_bytes=2048)
    with served(lambda: make_http_app(ingress)) as url:
        for content in (b"x" * 100_000, iter([b"x" * 1000] * 100)):
            headers = {"content-type": "application/json"}
            answer = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
        assert httpx.get(f"{url}/health").status_code == 200
