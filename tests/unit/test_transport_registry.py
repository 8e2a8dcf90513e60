"""A transport is a class on each side and a line in a registry."""

import pytest

from milliways.cluster.settings.config import WorkerSettings
from milliways.router.links.connect import Connector
from milliways.runtime.clock import FakeClock
from milliways.runtime.reactor import Reactor
from milliways.wire.errors import ConfigError
from milliways.wire.transports import (
    SETTINGS,
    TRANSPORTS,
    Transport,
    allowed_transports,
    load_class,
)
from milliways.workers.servers.transport import TransportServer


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
def test_each_transport_has_a_link_and_a_server(transport: Transport) -> None:
    link = load_class("milliways.router.links", transport.link)
    assert (link.transport, link.is_local) == (transport.name, False)
    assert all(callable(getattr(link, name)) for name in ("open", "ask", "close"))
    server = load_class("milliways.workers.servers", transport.server)
    assert issubclass(server, TransportServer)
    assert server.endpoint_for is not TransportServer.endpoint_for


def test_shared_memory_is_preferred_to_grpc() -> None:
    names = [transport.name for transport in allowed_transports("auto")]
    assert names.index("shm") < names.index("grpc")
    assert [transport.name for transport in allowed_transports("grpc")] == ["grpc"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_take_auto_and_every_transport(setting: str) -> None:
    assert WorkerSettings(transport=setting).transport == setting


def test_unknown_transport_is_an_error_that_names_the_others() -> None:
    with pytest.raises(ConfigError, match=r"workers.transport = 'pigeon'.*one of auto, grpc"):
        WorkerSettings(transport="pigeon")
    reactor = Reactor(FakeClock())
    with pytest.raises(ConfigError, match=r"workers.transport = 'pigeon'.*one of auto, grpc"):
        Connector(reactor, router_id="r", wanted="pigeon")
    reactor.close()
