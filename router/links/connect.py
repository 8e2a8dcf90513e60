"""Opens links: greets a worker, then connects by the first transport that works."""

import logging
from collections.abc import Mapping

from milliways.router.links.opening import LinkClass, Opening, WorkerChannel
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.v1 import worker_pb2 as pb
from milliways.wire.errors import ConfigError, PeerLostError
from milliways.wire.exchange import ExchangeNode
from milliways.wire.limits import LinkLimits
from milliways.wire.links import WorkerLink
from milliways.wire.tls import TlsSettings
from milliways.wire.transports import AUTO, allowed_transports, load_class
from milliways.wire.view import Member

logger = logging.getLogger(__name__)

_LINKS = "milliways.router.links"


class Connector:
    """Opens a router's links. Used in the thread of its reactor, which hosts an event loop."""

    def __init__(
        self,
        reactor: Reactor,
        *,
        router_id: str,
        host_id: str = "",
        wanted: str = AUTO,
        tls: TlsSettings | None = None,
        limits: LinkLimits | None = None,
        node: ExchangeNode | None = None,
    ) -> None:
        """`wanted` is the setting `workers.transport`; `host_id` is that of `local_host_id`.

        With a `node`, links open rings for the exchange in compiled steps, where they can.

        Raises:
            ConfigError: there is no such transport.
        """
        self._reactor = reactor
        self._wanted = wanted
        self._tls = tls or TlsSettings()
        self._limits = limits or LinkLimits()
        self._node = node
        self._hello = pb.HelloRequest(router_id=router_id, host_id=host_id)
        # Best first.
        self._links: dict[str, LinkClass] = {
            transport.name: load_class(_LINKS, transport.link)
            for transport in allowed_transports(wanted)
        }

    def connect(self, member: Member) -> Pending[WorkerLink]:
        """A link to one incarnation of a worker.

        Fails with PeerLostError if that incarnation cannot be reached, and with ConfigError if the
        worker offers none of the transports that `wanted` allows.
        """
        return self._reactor.tasks.start(self._connect(member))

    async def _connect(self, member: Member) -> WorkerLink:
        channel = WorkerChannel(self._reactor, member, self._tls, self._limits)
        opening = Opening(self._reactor, self._hello, member, self._limits, channel, self._node)
        try:
            response = await channel.hello(self._hello)
            _check_identity(member, response)
            return await self._open_best(opening, endpoints_of(response))
        finally:
            opening.close()

    async def _open_best(self, opening: Opening, endpoints: Mapping[str, str]) -> WorkerLink:
        member, error = opening.member, None
        for name, link_class in self._links.items():
            if name not in endpoints:
                continue
            try:
                return await link_class.open(opening, endpoints[name])
            except PeerLostError as lost:
                logger.info("no connection by %s: %s", name, lost)
                error = lost
        if error is not None:
            raise error
        limit = f"auto, or one of {', '.join(sorted(endpoints))}, which {member.worker_id} offers"
        raise ConfigError("workers.transport", self._wanted, limit)


def _check_identity(member: Member, response: pb.HelloResponse) -> None:
    worker_id, incarnation = response.worker_id, response.incarnation
    if (worker_id, incarnation) != (member.worker_id, member.incarnation):
        text = f"incarnation {member.incarnation} is gone: {incarnation} of {worker_id} answers"
        raise PeerLostError(member.worker_id, text)


def endpoints_of(response: pb.HelloResponse) -> Mapping[str, str]:
    """The endpoint of a worker for each transport that it offers, by the transport's name."""
    if response.endpoints:
        return response.endpoints
    # An older worker: it always takes Exchange streams.
    endpoints = {"grpc": ""}
    if response.socket_name:
        endpoints["shm"] = response.socket_name
    return endpoints
