"""A redeploy and a scale-in under streams: no stream is cut, over HTTP and over gRPC.

The tests run in this order. The last one leaves the application as it found it.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
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
NUM_TOKENS = 300
# Over each of HTTP and gRPC.
NUM_CLIENTS = 3
# The change begins when each client has received this many events.
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


class NotBegunError(Exception):
    """A request was refused before it had begun; its client asks again."""


@dataclass
class Traffic:
    """Clients that repeat the same request, each time on a new connection, until they are stopped.

    Half of them use HTTP, half gRPC; streams are kept in the order of their beginning.
    """

    cluster: ServedCluster
    by_http: list[Stream] = field(default_factory=list)
    by_grpc: list[Stream] = field(default_factory=list)

    async def run_while(self, change: Callable[[], Awaitable[None]]) -> None:
        """Runs clients; the change begins when all are served, and they stop after it."""
        is_over = asyncio.Event()
        clients = [
            asyncio.ensure_future(self._repeat(ask, streams, is_over))
            for ask, streams in ((self.http, self.by_http), (self.grpc, self.by_grpc))
            for _ in range(NUM_CLIENTS)
        ]
        try:
            while not self._are_all_served():
                await asyncio.sleep(0.01)
                self._raise_from(clients)
            await change()
            is_over.set()
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()

    async def _repeat(self, ask: "Ask", streams: list[Stream], is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            streams.append(Stream())
            try:
                await ask(streams[-1])
            except NotBegunError:
                await asyncio.sleep(0.1)

    def _are_all_served(self) -> bool:
        begun = [
            sum(stream.num_events >= NUM_BEFORE for stream in streams)
            for streams in (self.by_http, self.by_grpc)
        ]
        return min(begun) >= NUM_CLIENTS

    async def http(self, stream: Stream, cursor: str = "") -> None:
        """Adds what comes over HTTP, from a cursor on."""
        body = {
            "model": "demo",
            "prompt": PROMPT,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"X-Milliways-Event-Ids": "1"}
        if cursor:
            headers["Last-Event-ID"] = cursor
        url = f"{self.cluster.url}/v1/completions"
        async with (
            httpx.AsyncClient(timeout=TIMEOUT_S) as client,
            client.stream("POST", url, json=body, headers=headers) as response,
        ):
            if response.status_code == 503:
                assert json.loads(await response.aread())["error"]["code"] == "server_leaving"
                raise NotBegunError
            if response.status_code == 404:
                # The cluster has changed to another model.
                raise NotBegunError
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

    async def grpc(self, stream: Stream, cursor: str = "") -> None:
        """Adds what comes over gRPC, from a cursor on."""
        request = generate_pb2.GenerateRequest(
            model="demo",
            text=PROMPT,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            sampling=sampling_pb2.SamplingParams(temperature=0.0),
        )
        if cursor:
            request_id, count, *_ = cursor.split("/")
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
                if not stream.num_events:
                    raise NotBegunError from error
                named = error_of(error.details() or "", dict(error.trailing_metadata() or ()))
                assert isinstance(named, LeavingError), error
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                stream.error, stream.cursor = "server_leaving", named.cursor

    @property
    def begun(self) -> list[Stream]:
        return [stream for stream in self.by_http + self.by_grpc if stream.num_events]

    @staticmethod
    def _raise_from(clients: Sequence["asyncio.Future[None]"]) -> None:
        for client in clients:
            if client.done():
                client.result()


Ask = Callable[[Stream], Awaitable[None]]


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


def check_whole(streams: Sequence[Stream], text: str) -> None:
    """Asserts that each client has the text of an undisturbed run."""
    assert [stream.error for stream in streams if stream.error] == []
    assert all(stream.is_complete for stream in streams)
    assert {stream.text for stream in streams} == {text}


def test_redeploy_cuts_no_stream(cluster: ServedCluster, text: str) -> None:
    traffic = Traffic(cluster)
    asyncio.run(traffic.run_while(lambda: redeploy(cluster, {"grace_s": 100.0}, replicas=2)))
    check_whole(traffic.begun, text)


def test_scale_in_cuts_no_stream(cluster: ServedCluster, text: str) -> None:
    traffic = Traffic(cluster)
    asyncio.run(traffic.run_while(lambda: redeploy(cluster, {"grace_s": 100.0}, replicas=1)))
    check_whole(traffic.begun, text)


def test_streams_over_the_limit_are_resumed_at_their_cursor(
    cluster: ServedCluster, text: str
) -> None:
    asyncio.run(redeploy(cluster, {"grace_s": 0.0}, replicas=1))
    traffic = Traffic(cluster)
    # The application as `milliways serve` started it.
    asyncio.run(traffic.run_while(lambda: redeploy(cluster, {})))

    async def resume(streams: Sequence[Stream], ask: Callable[..., Awaitable[None]]) -> None:
        ended = [stream for stream in streams if stream.error]
        assert ended and {stream.error for stream in ended} == {"server_leaving"}
        for stream in ended:
            stream.error = ""
            await ask(stream, stream.cursor)

    async def resume_all() -> None:
        await resume(traffic.by_http, traffic.http)
        await resume(traffic.by_grpc, traffic.grpc)

    asyncio.run(resume_all())
    check_whole(traffic.begun, text)
