"""From a member of the cluster to a link to it: greets the worker, takes the way they settle."""

from collections.abc import Mapping

from milliways.router.links.grpc_link import GrpcChannel
from milliways.router.links.shm_link import ShmLink
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.v1 import worker_pb2 as pb
from milliways.wire.errors import ConfigError, PeerLostError
from milliways.wire.limits import LinkLimits
from milliways.wire.links import WorkerLink
from milliways.wire.tls import TlsSettings
from milliways.wire.view import Member

_WANTED: Mapping[str, pb.Transport] = {
    "auto": pb.TRANSPORT_UNSPECIFIED,
    "grpc": pb.TRANSPORT_GRPC,
    "shm": pb.TRANSPORT_SHM,
}


class Connector:
    """Opens a router's links. Used from the thread of its reactor, which hosts an event loop."""

    def __init__(
        self,
        reactor: Reactor,
        *,
        router_id: str,
        host_id: str = "",
        wanted: str = "auto",
        tls: TlsSettings | None = None,
        limits: LinkLimits | None = None,
    ) -> None:
        """`wanted` is the setting `workers.transport`; `host_id` that of `local_host_id`."""
        self._reactor = reactor
        self._tls = tls or TlsSettings()
        self._limits = limits or LinkLimits()
        self._wanted = wanted
        self._greeting = pb.HelloRequest(
            router_id=router_id, host_id=host_id, wanted=_WANTED[wanted]
        )

    def connect(self, member: Member) -> Pending[WorkerLink]:
        """A link to one life of a worker.

        Fails with PeerLostError where that life is not to be reached, and with ConfigError where
        shared memory is asked for and the worker is on another host.
        """
        return self._reactor.tasks.start(self._connect(member))

    async def _connect(self, member: Member) -> WorkerLink:
        door = GrpcChannel(
            self._reactor, member.worker_id, member.address, tls=self._tls, limits=self._limits
        )
        is_handed_over = False
        try:
            response = await door.hello(self._greeting)
            self._check(member, response)
            link = await self._try_share(member, response)
            if link is None:
                link = door.exchange()
                is_handed_over = True
            return link
        finally:
            if not is_handed_over:
                door.close()

    async def _try_share(self, member: Member, response: pb.HelloResponse) -> ShmLink | None:
        """A link by shared memory; None where it is not settled, or not to be had after all."""
        if response.transport != pb.TRANSPORT_SHM:
            return None
        link = None
        is_open = False
        try:
            link = ShmLink(
                self._reactor,
                member.worker_id,
                member.incarnation,
                socket_name=response.socket_name,
                router_id=self._greeting.router_id,
                limits=self._limits,
            )
            tasks = self._reactor.tasks
            if not await tasks.wait_for(link.opened, self._limits.connect_timeout_s):
                raise PeerLostError(member.worker_id, "no welcome in time")
            link.opened.result()
            is_open = True
            return link
        except PeerLostError:
            if self._wanted == "shm":
                raise
            return None
        finally:
            if link is not None and not is_open:
                link.close()

    def _check(self, member: Member, response: pb.HelloResponse) -> None:
        met = (response.worker_id, response.incarnation)
        if met != (member.worker_id, member.incarnation):
            text = f"life {member.incarnation} is gone: {met[1]} of {met[0]} answers"
            raise PeerLostError(member.worker_id, text)
        if self._wanted == "shm" and response.transport != pb.TRANSPORT_SHM:
            limit = f"auto or grpc: {member.worker_id} at {member.address} shares no memory with us"
            raise ConfigError("workers.transport", self._wanted, limit)
