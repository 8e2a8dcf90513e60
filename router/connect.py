"""From a member of the cluster to a link to it: greets the worker, takes the way they settle."""

from collections.abc import Mapping

from milliways.v1 import worker_pb2 as pb

from cluster.config import TlsSettings
from cluster.errors import ConfigError, PeerLostError
from cluster.link_limits import LinkLimits
from cluster.links import WorkerLink
from cluster.reactor import Reactor
from cluster.tasks import Pending
from cluster.view import Member
from router.grpc_link import GrpcDoor

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
        door = GrpcDoor(
            self._reactor, member.worker_id, member.address, tls=self._tls, limits=self._limits
        )
        is_handed_over = False
        try:
            response = await door.hello(self._greeting)
            self._check(member, response)
            link = door.exchange()
            is_handed_over = True
            return link
        finally:
            if not is_handed_over:
                door.close()

    def _check(self, member: Member, response: pb.HelloResponse) -> None:
        met = (response.worker_id, response.incarnation)
        if met != (member.worker_id, member.incarnation):
            text = f"life {member.incarnation} is gone: {met[1]} of {met[0]} answers"
            raise PeerLostError(member.worker_id, text)
        if self._wanted == "shm" and response.transport != pb.TRANSPORT_SHM:
            limit = f"auto or grpc: {member.worker_id} at {member.address} shares no memory with us"
            raise ConfigError("workers.transport", self._wanted, limit)
