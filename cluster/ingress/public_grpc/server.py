"""The public gRPC server: GenerateService, health, reflection."""

from grpc import aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.public_grpc.health import HealthServicer
from milliways.cluster.ingress.public_grpc.malformed_requests import MalformedRequestInterceptor
from milliways.cluster.ingress.public_grpc.service import SERVICE, GenerateServicer
from milliways.cluster.settings.config import LOOPBACK
from milliways.v1 import generate_pb2_grpc
from milliways.wire.addresses import join_address
from milliways.wire.channels import SERVER_OPTIONS, add_port
from milliways.wire.tls import TlsSettings

_OWN_KEEPALIVE: tuple[tuple[str, int], ...] = (
    # The requests of a client whose host vanished are cancelled within ten seconds.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
)
_MAX_STREAMS_PER_CONNECTION = 1024


class IngressGrpcServer:
    """One listening server.

    *Invariant:* `port` is the bound port from construction on, also if port 0 was asked for.
    """

    def __init__(
        self,
        ingress: Ingress,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        tls: TlsSettings | None = None,
        shares_port: bool = False,
    ) -> None:
        """Binds the port; must be called with an event loop running.

        Processes of one user that all set `shares_port` can listen on the same port: the kernel
        gives each connection to one of them.

        Raises:
            OSError: the port is taken, or a certificate file cannot be read.
        """
        self._ingress = ingress
        self._servicer = GenerateServicer(ingress)
        self._server = _make_server(ingress, self._servicer, shares_port)
        self.port = _bind(self._server, join_address(host, port), tls or TlsSettings())

    @property
    def num_calls(self) -> int:
        """Calls of GenerateService that have not ended."""
        return self._servicer.num_calls

    async def start(self) -> None:
        """Begins to accept calls."""
        await self._server.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Closes the port and accepts no more calls; health checks say that it does not serve.

        Calls that run have `grace_s` to end, then they are cancelled. Clients are told at once to
        connect elsewhere for the next call.
        """
        self._ingress.readiness.drain("the server is stopping")
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        await self._server.wait_for_termination()


def _make_server(ingress: Ingress, servicer: GenerateServicer, shares_port: bool) -> aio.Server:
    max_message_bytes = ingress.settings.max_body_bytes
    server = aio.server(
        interceptors=[MalformedRequestInterceptor()],
        options=[
            *SERVER_OPTIONS,
            *_OWN_KEEPALIVE,
            ("grpc.so_reuseport", int(shares_port)),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_concurrent_streams", _MAX_STREAMS_PER_CONNECTION),
        ],
    )
    # Generated code has no types.
    generate_pb2_grpc.add_GenerateServiceServicer_to_server(  # pyright: ignore[reportUnknownMemberType]
        servicer, server
    )
    health_pb2_grpc.add_HealthServicer_to_server(  # pyright: ignore[reportUnknownMemberType]
        HealthServicer(ingress.readiness, (SERVICE,)), server
    )
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    return server


def _bind(server: aio.Server, address: str, tls: TlsSettings) -> int:
    try:
        return add_port(server, address, tls)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {address}: {error}") from error
