"""Clients that send nonsense, leave, or do not read: the cluster still serves the others."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from grpc import aio

from milliways.cluster.ingress.public_grpc.service import SERVICE
from milliways.v1 import generate_pb2, generate_pb2_grpc, sampling_pb2
from tests.served_cluster import ServedCluster, wait_until

COMPLETIONS = "/v1/completions"
GOOD: dict[str, Any] = {"model": "demo", "prompt": "Welcome to", "max_tokens": 2}
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True, "n": 8}


@pytest.fixture(autouse=True)
def goes_on(cluster: ServedCluster) -> Iterator[None]:
    """After each test the next request is answered, and earlier requests hold no resource."""
    yield
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        assert client.post(COMPLETIONS, json=GOOD).status_code == 200
    wait_until(lambda: blocks_used(cluster) == 0, "all blocks are free")
    wait_until(lambda: sum(cluster.metric("milliways_ongoing_requests")) == 0, "no request runs")


def blocks_used(cluster: ServedCluster) -> float:
    return sum(cluster.metric("milliways_kv_blocks_used"))


def post(cluster: ServedCluster, path: str, **options: Any) -> httpx.Response:
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        return client.post(path, **options)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-9"}, 404, "model"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [7] * 513}, 400, "prompt"),
        ({"prompt": [99999]}, 400, "prompt token"),
        ({"prompt": 5}, 400, "prompt"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"n": 0}, 400, "n"),
        ({"stream": 1}, 400, "stream"),
        ({"num_beams": 4}, 400, "num_beams"),
    ],
)
def test_bad_field_is_named(
    cluster: ServedCluster, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = post(cluster, COMPLETIONS, json=GOOD | fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_unknown_field_is_ignored_and_named(cluster: ServedCluster) -> None:
    answer = post(cluster, COMPLETIONS, json=GOOD | {"nonsense": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-milliways-ignored-fields"] == "nonsense"


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"\xff\xfe", 400), (b"[]", 400), (b" " * (5 << 20), 413)],
    ids=["cut", "no text", "no object", "giant"],
)
def test_malformed_body_is_refused(cluster: ServedCluster, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = post(cluster, COMPLETIONS, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_giant_body_in_pieces_is_refused(cluster: ServedCluster) -> None:
    headers = {"content-type": "application/json"}
    pieces = iter([b" " * (64 << 10)] * 200)
    try:
        answer = post(cluster, COMPLETIONS, content=pieces, headers=headers)
    except (httpx.WriteError, httpx.ReadError):
        # The server read no more of the body and closed the connection.
        return
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"model": "gpt-9"}, "NOT_FOUND", "model"),
        ({"text": ""}, "INVALID_ARGUMENT", "prompt"),
        ({"tokens": generate_pb2.TokenIds(token_ids=[7] * 513)}, "INVALID_ARGUMENT", "prompt"),
        (
            {"sampling": sampling_pb2.SamplingParams(temperature=-1)},
            "INVALID_ARGUMENT",
            "temperature",
        ),
        ({"max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens"),
    ],
)
def test_bad_field_has_a_canonical_code(
    cluster: ServedCluster, fields: dict[str, Any], code: str, field: str
) -> None:
    prompt = {} if fields.keys() & {"text", "tokens"} else {"text": "Welcome to"}
    request = generate_pb2.GenerateRequest(**prompt, **fields)

    async def main() -> aio.AioRpcError:
        async with cluster.channel() as channel:
            call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=60)
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
            return caught.value

    error = asyncio.run(main())
    assert error.code() is grpc.StatusCode[code]
    if code == "INVALID_ARGUMENT":
        assert dict(error.trailing_metadata() or ())["milliways-field"] == field


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff" * 20, grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x08", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x00" * (5 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["malformed", "cut", "giant"],
)
def test_malformed_message_is_refused(
    cluster: ServedCluster, raw: bytes, code: grpc.StatusCode
) -> None:
    async def main() -> grpc.StatusCode:
        async with cluster.channel() as channel:
            path = f"/{SERVICE}/Generate"
            call = channel.unary_stream(path, lambda raw: raw, lambda raw: raw)(raw, timeout=60)
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
            return caught.value.code()

    assert asyncio.run(main()) is code


def test_http_client_that_leaves_frees_its_blocks(cluster: ServedCluster) -> None:
    with (
        httpx.Client(base_url=cluster.url, timeout=60) as client,
        client.stream("POST", COMPLETIONS, json=GOOD | LONG | {"stream": True}) as answer,
    ):
        # Keep a reference: a collected iterator would close the connection.
        lines = answer.iter_lines()
        first = next(lines)
        assert answer.status_code == 200, first
        assert "error" not in first
        wait_until(lambda: blocks_used(cluster) > 0, f"its blocks are taken, after {first}")
    wait_until(lambda: blocks_used(cluster) == 0, "its blocks are free")


def test_http_client_that_leaves_before_the_response_frees_its_blocks(
    cluster: ServedCluster,
) -> None:
    connection = send(cluster, GOOD | LONG)
    wait_until(lambda: blocks_used(cluster) > 0, "its blocks are taken")
    connection.close()
    wait_until(lambda: blocks_used(cluster) == 0, "its blocks are free")


def test_grpc_client_that_leaves_frees_its_blocks(cluster: ServedCluster) -> None:
    request = generate_pb2.GenerateRequest(text="A", max_tokens=500, ignore_eos=True, num_samples=8)

    async def main() -> None:
        async with cluster.channel() as channel:
            call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request)
            await call.read()
            assert await asyncio.to_thread(blocks_used, cluster) > 0
            call.cancel()

    asyncio.run(main())
    wait_until(lambda: blocks_used(cluster) == 0, "its blocks are free")


def test_client_that_does_not_read_delays_no_other(cluster: ServedCluster) -> None:
    # It asks for many tokens with many log-probabilities, and reads nothing.
    slow = [send(cluster, GOOD | LONG | {"stream": True, "logprobs": 20}) for _ in range(4)]
    try:
        wait_until(lambda: blocks_used(cluster) > 0, "they are served")
        answer = post(cluster, COMPLETIONS, json=GOOD | {"temperature": 0})
        assert answer.status_code == 200
        # A server that waited for the slow clients' sockets would never answer.
        assert sum(cluster.metric("milliways_ongoing_requests")) > 0
    finally:
        for connection in slow:
            connection.close()


def send(cluster: ServedCluster, fields: dict[str, Any]) -> socket.socket:
    """Sends a request; does not read the response."""
    connection = socket.socket()
    # A small receive buffer, so that the sender blocks soon.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", cluster.http_port))
    body = json.dumps(fields).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection
