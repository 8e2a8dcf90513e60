"""Routers in separate processes that die or freeze, mutual TLS, and ports in use."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent
from milliways.v1 import generate_pb2, generate_pb2_grpc
from milliways.wire.channels import open_channel
from milliways.wire.errors import UnavailableError
from milliways.wire.tls import TlsSettings
from tests.certificates import make_certificates
from tests.fake_routers import Directory, FakeRouter, InOrder, expected_events, running, start
from tests.ingresses import demo_model, make_ingress
from tests.sources import CountingSource

REPOSITORY = Path(__file__).resolve().parents[2]
REQUEST = GenerationRequest(prompt_ids=(100,), max_tokens=5)
# Keepalive needs two seconds to notice; the rest is slack for a busy machine.
NOTICED_WITHIN_S = 10.0


@contextmanager
def stalling_process() -> Iterator[tuple[int, RouterInfo]]:
    """A router process that stalls after two tokens; yields its process id and address."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fake_routers"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            # Both are idle, so the first by name receives the request.
            yield process.pid, RouterInfo("a", process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
def test_request_leaves_a_router_process_that_dies_or_freezes(number: signal.Signals) -> None:
    async def main(pid: int, info: RouterInfo) -> list[TokenEvent]:
        async with running(FakeRouter()) as directory:
            directory.set([info, *directory.infos])
            source = RouterSource(directory, random=InOrder())
            events: list[TokenEvent] = []
            stream = source.generate(REQUEST, request_id="r", deadline_s=time.monotonic() + 60)
            hurt_s = 0.0
            async for event in stream:
                events.append(event)
                if len(events) == 2:
                    os.kill(pid, number)
                    hurt_s = time.monotonic()
                if len(events) == 3:
                    assert time.monotonic() - hurt_s < NOTICED_WITHIN_S
            await source.close()
            return events

    with stalling_process() as (pid, info):
        assert asyncio.run(main(pid, info)) == expected_events(REQUEST)


def test_routers_are_reached_by_mutual_tls(tmp_path: Path) -> None:
    tls, others = make_certificates(tmp_path / "ours"), make_certificates(tmp_path / "others")

    async def ask(router: FakeRouter, settings: TlsSettings | None) -> list[TokenEvent]:
        source = RouterSource(Directory([router.info]), random=InOrder(), tls=settings)
        try:
            stream = source.generate(REQUEST, request_id="r", deadline_s=time.monotonic() + 2)
            return [event async for event in stream]
        finally:
            await source.close()

    async def main() -> None:
        router = FakeRouter()
        await start(router, "r0", tls)
        assert await ask(router, tls) == expected_events(REQUEST)
        for settings in (others, None):
            with pytest.raises(UnavailableError):
                await ask(router, settings)
        assert router.server is not None
        await router.server.stop(None)

    asyncio.run(main())


def test_public_server_speaks_mutual_tls(tmp_path: Path) -> None:
    tls = make_certificates(tmp_path)

    async def main() -> None:
        server = IngressGrpcServer(make_ingress(CountingSource(), demo_model()), tls=tls)
        await server.start()
        address = f"127.0.0.1:{server.port}"
        async with open_channel(address, tls) as channel, aio.insecure_channel(address) as plain:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            listed = await stub.ListModels(generate_pb2.ListModelsRequest())
            assert [model.name for model in listed.models] == ["demo"]
            stub = generate_pb2_grpc.GenerateServiceStub(plain)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.ListModels(generate_pb2.ListModelsRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.stop()

    asyncio.run(main())


def test_port_in_use_is_an_error_that_names_it() -> None:
    async def main() -> None:
        ingress = make_ingress(CountingSource(), demo_model())
        server = IngressGrpcServer(ingress)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            IngressGrpcServer(ingress, port=server.port)
        await server.start()
        await server.stop()

    asyncio.run(main())


def test_port_is_shared_if_all_servers_ask_for_it() -> None:
    async def main() -> None:
        ingresses = [make_ingress(CountingSource(), demo_model()) for _ in range(2)]
        first = IngressGrpcServer(ingresses[0], shares_port=True)
        second = IngressGrpcServer(ingresses[1], port=first.port, shares_port=True)
        with pytest.raises(OSError, match="cannot listen"):
            IngressGrpcServer(ingresses[0], port=first.port)
        await first.start()
        await second.start()
        address = f"127.0.0.1:{first.port}"
        for stopped in (first, second):
            # The remaining server answers new connections.
            async with open_channel(address, TlsSettings()) as channel:
                stub = generate_pb2_grpc.GenerateServiceStub(channel)
                listed = await stub.ListModels(generate_pb2.ListModelsRequest(), timeout=30)
                assert [model.name for model in listed.models] == ["demo"]
            await stopped.stop()

    asyncio.run(main())


def test_closing_the_source_ends_its_streams() -> None:
    async def main() -> None:
        router = FakeRouter(gate=asyncio.Event())
        async with running(router) as directory:
            source = RouterSource(directory, random=InOrder())
            stream = source.generate(REQUEST, request_id="r", deadline_s=time.monotonic() + 60)
            task = asyncio.ensure_future(anext(stream))
            while not router.asked:
                await asyncio.sleep(0.005)
            await source.close()
            with pytest.raises(UnavailableError, match="this server stops"):
                await task

    asyncio.run(main())


def test_router_that_left_the_directory_keeps_its_stream() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        router, other = FakeRouter(gate=gate), FakeRouter()
        async with running(router, other) as directory:
            source = RouterSource(directory, random=InOrder())
            stream = source.generate(REQUEST, request_id="r", deadline_s=time.monotonic() + 60)
            task = asyncio.ensure_future(anext(stream))
            while not router.asked:
                await asyncio.sleep(0.005)
            directory.set([other.info])
            assert [
                e
                async for e in source.generate(
                    REQUEST, request_id="s", deadline_s=time.monotonic() + 60
                )
            ] == expected_events(REQUEST)
            gate.set()
            events = [await task] + [event async for event in stream]
            assert events == expected_events(REQUEST)
            assert len(router.asked) == 1
            await source.close()

    asyncio.run(main())
