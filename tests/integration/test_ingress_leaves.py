"""An ingress that leaves: its streams end, new requests go elsewhere, and no token is lost."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.leaving import leave
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.public_grpc.service import SERVICE
from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.cluster.ingress.served_model import ServedModel
from milliways.v1 import generate_pb2, generate_pb2_grpc
from milliways.wire.errors import LeavingError
from milliways.wire.status_codes import error_of
from tests.fake_routers import Directory, FakeRouter, running
from tests.http_apps import COMPLETIONS, body
from tests.ingresses import demo_model, make_ingress

NUM_TOKENS = 6
LONG_S = 60.0


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


class Side:
    """An ingress with its own source, HTTP client and gRPC server."""

    def __init__(self, directory: Directory, model: ServedModel) -> None:
        self.source = RouterSource(directory)
        self.ingress: Ingress = make_ingress(self.source, model)
        self.server: IngressGrpcServer | None = None
        transport = httpx.ASGITransport(make_http_app(self.ingress), raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def start(self, port: int = 0) -> None:
        """Listens. Before, the kernel gives it none of the connections to a shared port."""
        self.server = IngressGrpcServer(self.ingress, port=port, shares_port=True)
        await self.server.start()

    @property
    def port(self) -> int:
        assert self.server is not None
        return self.server.port

    async def leave(self, grace_s: float) -> None:
        assert self.server is not None
        await leave(self.ingress, self.server, self.source, grace_s)

    async def complete(self, **headers: str) -> httpx.Response:
        asked = body(stream=True, max_tokens=NUM_TOKENS, seed=1)
        with_ids = {"X-Milliways-Event-Ids": "1"} | headers
        return await self.http.post(COMPLETIONS, json=asked, headers=with_ids)

    async def close(self) -> None:
        if self.server is not None:
            await self.server.stop()
        await self.source.close()
        await self.http.aclose()


def run(model: ServedModel, scenario: Callable[[FakeRouter, Side, Side], Awaitable[None]]) -> None:
    """Runs a scenario with two ingresses before a router that sends a token when it may."""

    async def main() -> None:
        router = FakeRouter(tokens_allowed=asyncio.Semaphore(0))
        async with running(router) as directory, asyncio.timeout(LONG_S):
            first, second = Side(directory, model), Side(directory, model)
            await first.start()
            try:
                await scenario(router, first, second)
            finally:
                await asyncio.gather(first.close(), second.close())

    asyncio.run(main())


def allow(router: FakeRouter, count: int) -> None:
    assert router.tokens_allowed is not None
    for _ in range(count):
        router.tokens_allowed.release()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def sse_events(text: str) -> list[tuple[str, Any]]:
    """Id and data of each event."""
    events: list[tuple[str, Any]] = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        events.append((fields.get("id", ""), data if data == "[DONE]" else json.loads(data)))
    return events


def texts(events: list[tuple[str, Any]]) -> list[str]:
    return [data["choices"][0]["text"] for _, data in events if "choices" in data]


def grpc_request() -> generate_pb2.GenerateRequest:
    tokens = generate_pb2.TokenIds(token_ids=[7, 100])
    return generate_pb2.GenerateRequest(tokens=tokens, max_tokens=NUM_TOKENS)


async def token_ids(call: Any) -> list[int]:
    return [event.token_id async for response in call for event in response.events]


ALL = [101, 102, 103, 104, 105, 106]


def test_streams_that_run_end_undisturbed(model: ServedModel) -> None:
    async def scenario(router: FakeRouter, first: Side, second: Side) -> None:
        async with aio.insecure_channel(f"127.0.0.1:{first.port}") as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            by_grpc = asyncio.ensure_future(token_ids(stub.Generate(grpc_request())))
            by_http = asyncio.ensure_future(first.complete())
            await until(lambda: router.num_running == 2)
            allow(router, 3)
            leaving = asyncio.ensure_future(first.leave(LONG_S))
            await asyncio.sleep(0.2)
            assert not leaving.done() and not by_grpc.done() and not by_http.done()
            allow(router, 2 * NUM_TOKENS)
            assert await by_grpc == ALL
            events = sse_events((await by_http).text)
            assert (len(texts(events)), events[-1][1]) == (NUM_TOKENS, "[DONE]")
            await leaving

    run(model, scenario)


def test_new_calls_go_to_the_other_ingress_on_the_port(model: ServedModel) -> None:
    async def scenario(router: FakeRouter, first: Side, second: Side) -> None:
        async with aio.insecure_channel(f"127.0.0.1:{first.port}") as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            old = asyncio.ensure_future(token_ids(stub.Generate(grpc_request())))
            await until(lambda: router.num_running == 1)
            await second.start(first.port)
            leaving = asyncio.ensure_future(first.leave(LONG_S))
            await until(lambda: first.ingress.readiness.is_draining)
            allow(router, 8 * NUM_TOKENS)
            for _ in range(4):
                # The same channel: the server has told it to connect anew.
                call = stub.Generate(grpc_request(), wait_for_ready=True)
                assert await token_ids(call) == ALL
            assert await old == ALL
            await leaving
            assert first.ingress.num_ongoing == 0
        ids = [asked.ingress_id for asked in router.asked]
        assert ids.count(ids[0]) == 1 and len(set(ids)) == 2

    run(model, scenario)


def test_health_checks_say_at_once_that_it_does_not_serve(model: ServedModel) -> None:
    async def scenario(router: FakeRouter, first: Side, second: Side) -> None:
        allow(router, 1)
        async with aio.insecure_channel(f"127.0.0.1:{first.port}") as channel:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            watch = health_pb2_grpc.HealthStub(channel).Watch(request)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert (await first.http.get("/ready")).status_code == 200
            await first.leave(LONG_S)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watch.read() is aio.EOF
        assert (await first.http.get("/ready")).status_code == 503

    run(model, scenario)


def test_stream_over_the_limit_gets_a_cursor_and_the_rest_elsewhere(model: ServedModel) -> None:
    async def scenario(router: FakeRouter, first: Side, second: Side) -> None:
        asking = asyncio.ensure_future(first.complete())
        await until(lambda: router.num_running == 1)
        allow(router, 2)
        await until(lambda: router.tokens_allowed is not None and router.tokens_allowed.locked())
        await first.leave(0.3)
        events = sse_events((await asking).text)
        cursor, last = events[-1]
        assert last["error"]["type"] == "service_unavailable_error"
        assert last["error"]["code"] == "server_leaving"
        had = texts(events)
        assert len(had) == 2 and cursor == events[-2][0]
        allow(router, 3 * NUM_TOKENS)
        rest = sse_events((await second.complete(**{"Last-Event-ID": cursor})).text)
        whole = sse_events((await second.complete()).text)
        assert had + texts(rest) == texts(whole)
        assert rest[-1][1] == "[DONE]"

    run(model, scenario)


def test_call_over_the_limit_gets_a_cursor_and_the_rest_elsewhere(model: ServedModel) -> None:
    async def scenario(router: FakeRouter, first: Side, second: Side) -> None:
        had: list[int] = []
        request = grpc_request()
        async with aio.insecure_channel(f"127.0.0.1:{first.port}") as channel:
            call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request)
            allow(router, 2)
            while len(had) < 2:
                had += [event.token_id for event in (await call.read()).events]
            await first.leave(0.3)
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
        error = caught.value
        named = error_of(error.details() or "", dict(error.trailing_metadata() or ()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert isinstance(named, LeavingError)
        request_id, count, *_ = named.cursor.split("/")
        request.resume.request_id = request_id
        request.resume.received.add(num_tokens=int(count))
        allow(router, 2 * NUM_TOKENS)
        await second.start(first.port)
        async with aio.insecure_channel(f"127.0.0.1:{second.port}") as channel:
            call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request)
            assert had + await token_ids(call) == ALL

    run(model, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_request_without_a_token_at_the_limit_gets_503(model: ServedModel, stream: bool) -> None:
    async def scenario(router: FakeRouter, first: Side, second: Side) -> None:
        asking = asyncio.ensure_future(first.http.post(COMPLETIONS, json=body(stream=stream)))
        await until(lambda: router.num_running == 1)
        await first.leave(0.0)
        response = await asking
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == "server_leaving"

    run(model, scenario)
