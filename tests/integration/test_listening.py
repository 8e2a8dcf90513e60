"""Addresses of the endpoint: every form of host, free ports, and ports that others have."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import grpc
import pytest
from fastapi import FastAPI
from grpc import aio

from milliways.cluster.cli.listening import check_listeners, settle_addresses
from milliways.cluster.settings.config import IngressSettings
from milliways.wire.addresses import join_address, reachable_host
from milliways.wire.channels import add_port, open_channel
from milliways.wire.errors import StartupError
from milliways.wire.local_http import open_url
from milliways.wire.tls import TlsSettings
from tests.ingresses import served

HOSTS = ["127.0.0.1", "localhost", "0.0.0.0", "::1", "[::1]", "::"]
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY")


@contextmanager
def listening(host: str, *, shares: bool) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares))
        server.bind((host, 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", HOSTS)
def test_any_form_of_host_gets_real_ports(host: str) -> None:
    settled = settle_addresses(IngressSettings(host=host, port=0, grpc_port=0))
    assert 0 < settled.port != settled.grpc_port > 0
    assert "[" not in settled.host

    async def main() -> None:
        server = aio.server()
        port = add_port(server, join_address(settled.host, settled.port), TlsSettings())
        assert port == settled.port
        await server.start()
        with socket.create_connection((reachable_host(host), port), timeout=5):
            await server.stop(None)

    asyncio.run(main())


def test_name_that_is_no_address_is_named() -> None:
    with pytest.raises(StartupError, match=r"^--host no\.such\.host\.invalid: no such address"):
        settle_addresses(IngressSettings(host="no.such.host.invalid"))


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared"])
def test_taken_port_is_named(shares: bool) -> None:
    with listening("127.0.0.1", shares=shares) as port:
        for settings, option in (
            (IngressSettings(port=port, grpc_port=0), "--port"),
            (IngressSettings(port=0, grpc_port=port), "--grpc-port"),
        ):
            expected = f"^{option} {port}: cannot listen on 127.0.0.1:{port}: Address already"
            with pytest.raises(StartupError, match=expected):
                settle_addresses(settings)


def test_two_equal_ports_are_named() -> None:
    port = settle_addresses(IngressSettings(port=0, grpc_port=0)).port
    with pytest.raises(StartupError, match=f"--grpc-port {port}: the same as --port"):
        settle_addresses(IngressSettings(port=port, grpc_port=port))


@pytest.mark.parametrize(
    ("theirs", "ours", "takes"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", False),
        ("127.0.0.2", "127.0.0.1", False),
    ],
)
def test_process_that_shares_a_port_later_is_named(theirs: str, ours: str, takes: bool) -> None:
    with listening(theirs, shares=True) as port:
        settings = IngressSettings(host=ours, port=port, grpc_port=1)
        check_listeners(settings, {os.getpid()})
        if not takes:
            check_listeners(settings, set())
            return
        with pytest.raises(StartupError, match=rf"^--port {port}: process {os.getpid()} listens"):
            check_listeners(settings, set())


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment behind which there is nothing."""
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("dead_proxy")
def test_no_proxy_is_between_processes_of_a_cluster() -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return request

    async def main() -> bytes:
        server = aio.server()
        method = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("a.Service", {"Echo": method}),)
        )
        port = add_port(server, "127.0.0.1:0", TlsSettings())
        await server.start()
        async with open_channel(f"127.0.0.1:{port}", TlsSettings()) as channel:
            call: Any = channel.unary_unary("/a.Service/Echo")
            answered: bytes = await call(b"here", timeout=20)
        await server.stop(None)
        return answered

    assert asyncio.run(main()) == b"here"


@pytest.mark.usefixtures("dead_proxy")
def test_our_own_endpoint_is_asked_without_a_proxy() -> None:
    with served(FastAPI) as url:
        with pytest.raises(URLError):
            urlopen(f"{url}/docs", timeout=5)
        with open_url(f"{url}/docs", timeout_s=20) as response:
            assert response.status == 200
