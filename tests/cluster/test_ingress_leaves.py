"""A redeploy and a scale-in under streams: no stream is cut, over HTTP and over gRPC.

The tests run in this order. The last one leaves the application as it found it.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from grpc import aio

from milliways.v1 import generate_pb2, generate_pb2_grpc, sampling_pb2
from milliways.wire.errors import LeavingError
from milliways.wire.status_codes import error_of
from tests.conftest import REPOSITORY
from tests.demo_requests import alone, request_of
from tests.ingresses import demo_engine, demo_model
from tests.served_cluster import ServedCluster

PROMPT = "Welcome to"
NUM_TOKENS = 400
NUM_STREAMS = 4
# A stream that runs has received this many tokens before the change begins.
NUM_BEFORE = 5
TIMEOUT_S = 240.0

pytestmark = pytest.mark.timeout(TIMEOUT_S)


@dataclass
class Stream:
    """What a client has received; `cursor` and `error` if the server ended it early."""

    text: str = ""
    num_events: int = 0
    cursor: str = ""
    error: str = ""
    is_complete: bool = False


@dataclass
class Client:
    """Streams over HTTP and gRPC, each of them on a connection of its own."""

    cluster: ServedCluster
    streams: list[Stream] = field(default_factory=list)

    async def by_http(self, stream: Stream, cursor: str = "") -> None:
        body = {
            "model": "demo",
            "prompt": PROMPT,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"Last-Event-ID": cursor} if cursor else {}
        url = f"{self.cluster.url}/v1/completions"
        async with (
            httpx.AsyncClient(timeout=TIMEOUT_S) as client,
            client.stream("POST", url, json=body, headers=headers) as response,
        ):
            assert response.status_code == 200, await response.aread()
            event_id = ""
            async for line in response.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = value
                elif name == "data" and value == "[DONE]":
                    stream.is_complete = True
                elif name == "data":
                    data = json.loads(value)
                    stream.num_events += 1
                    if "error" in data:
                        stream.error, stream.cursor = data["error"]["code"], event_id
                    else:
                        stream.text += data["choices"][0]["text"]

    async def by_grpc(self, stream: Stream, cursor: str = "") -> None:
        request = generate_pb2.GenerateRequest(
            text=PROMPT,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            sampling=sampling_pb2.SamplingParams(temperature=0.0),
        )
        if cursor:
            request_id, _, count = cursor.partition("/")
            request.resume.request_id = request_id
            request.resume.received.add(num_tokens=int(count))
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = f"127.0.0.1:{self.cluster.grpc_port}"
        async with aio.insecure_channel(address, options=options) as channel:
            call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request)
            try:
                async for response in call:
                    stream.num_events += 1
                    stream.text += "".join(event.text for event in response.events)
                    stream.is_complete |= response.HasField("usage")
            except aio.AioRpcError as error:
                metadata = dict(error.trailing_metadata() or ())
                named = error_of(error.details() or "", metadata)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert isinstance(named, LeavingError), error
                stream.error, stream.cursor = "server_leaving", named.cursor

    async def run_while(self, change: Callable[[], Awaitable[None]]) -> None:
        """Runs streams of both kinds; the change begins when all have begun."""
        self.streams = [Stream() for _ in range(2 * NUM_STREAMS)]
        running = [
            asyncio.ensure_future((self.by_http, self.by_grpc)[i % 2](stream))
            for i, stream in enumerate(self.streams)
        ]
        while any(stream.num_events < NUM_BEFORE for stream in self.streams):
            await asyncio.sleep(0.01)
            failed = [task for task in running if task.done() and task.exception()]
            assert not failed, failed
        await change()
        await asyncio.gather(*running)


@pytest.fixture(scope="module")
def text() -> str:
    """The text of a single process."""
    request = request_of(
        demo_model(), PROMPT, {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    )
    return "".join(event.text for event in alone(demo_engine(), request)[0])


def ports(cluster: ServedCluster) -> dict[str, Any]:
    return {"port": cluster.http_port, "grpc_port": cluster.grpc_port}


async def redeploy(
    cluster: ServedCluster, ingress: dict[str, Any], replicas: int | None = None
) -> None:
    """Returns when the application runs as told."""
    settings: dict[str, Any] = {"ingress": ports(cluster) | ingress}
    if replicas is not None:
        settings["replicas"] = replicas
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.redeploy", json.dumps(settings)),
        cwd=REPOSITORY,
        env=cluster.environment | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


def test_redeploy_cuts_no_stream(cluster: ServedCluster, text: str) -> None:
    client = Client(cluster)
    asyncio.run(client.run_while(lambda: redeploy(cluster, {"grace_s": 100.0}, replicas=2)))
    assert [stream.error for stream in client.streams] == [""] * len(client.streams)
    assert {stream.text for stream in client.streams} == {text}
    assert all(stream.is_complete for stream in client.streams)


def test_scale_in_cuts_no_stream(cluster: ServedCluster, text: str) -> None:
    client = Client(cluster)
    asyncio.run(client.run_while(lambda: redeploy(cluster, {"grace_s": 100.0}, replicas=1)))
    assert [stream.error for stream in client.streams] == [""] * len(client.streams)
    assert {stream.text for stream in client.streams} == {text}
    assert all(stream.is_complete for stream in client.streams)


def test_streams_over_the_limit_are_resumed_at_their_cursor(
    cluster: ServedCluster, text: str
) -> None:
    asyncio.run(redeploy(cluster, {"grace_s": 0.0}, replicas=1))
    client = Client(cluster)
    # The application as `milliways serve` started it.
    asyncio.run(client.run_while(lambda: redeploy(cluster, {})))
    ended = [stream for stream in client.streams if stream.error]
    assert {stream.error for stream in ended} <= {"server_leaving"}
    assert all(stream.cursor for stream in ended)

    async def resume() -> None:
        for i, stream in enumerate(client.streams):
            if stream.error:
                await (client.by_http, client.by_grpc)[i % 2](stream, stream.cursor)

    asyncio.run(resume())
    assert {stream.text for stream in client.streams} == {text}
    assert all(stream.is_complete for stream in client.streams)
