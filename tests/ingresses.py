"""Ingresses of the demo model for tests, over any source of tokens."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from milliways.cluster.host.local import cache_size_for, load_local_model, make_local_engine
from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.served_model import ServedModel, load_served_model
from milliways.cluster.ingress.token_source import TokenSource
from milliways.cluster.settings.config import IngressSettings, ModelSettings
from milliways.model.demo import DEMO_DIR
from milliways.router.engine import LocalEngine
from milliways.wire.tls import TlsSettings
from tests.sources import LocalSource


def demo_model() -> ServedModel:
    return load_served_model(ModelSettings())


def make_ingress(source: TokenSource, model: ServedModel, **settings: Any) -> Ingress:
    return Ingress(model, source, IngressSettings(**settings))


def demo_engine(num_sequences: int = 8) -> LocalEngine:
    model = load_local_model(DEMO_DIR, "float32")
    return make_local_engine(model, cache_size_for(num_sequences, 512))


@contextmanager
def local_source() -> Iterator[LocalSource]:
    source = LocalSource(demo_engine())
    try:
        yield source
    finally:
        source.close()


@contextmanager
def served(make_app: Callable[[], ASGIApp], http: Any = "auto") -> Iterator[str]:
    """Runs an app on a real server in a thread; yields its base URL.

    `http` is the server's protocol, if it is not the usual one.
    """
    server: uvicorn.Server | None = None
    started = threading.Event()
    port: list[int] = []

    async def serve() -> None:
        nonlocal server
        config = uvicorn.Config(make_app(), host="127.0.0.1", port=0, http=http, log_config=None)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not (server.started or task.done()):
            await asyncio.sleep(0.005)
        if server.started:
            port.append(server.servers[0].sockets[0].getsockname()[1])
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="uvicorn", daemon=True)
    thread.start()
    started.wait(30)
    assert port and server is not None, "the server did not start"
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def grpc_served(
    source: TokenSource, model: ServedModel, tls: TlsSettings | None = None
) -> Iterator[str]:
    """Runs a gRPC server in a thread of its own; gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="grpc-server", daemon=True)
    thread.start()

    async def start() -> IngressGrpcServer:
        server = IngressGrpcServer(make_ingress(source, model), tls=tls)
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
