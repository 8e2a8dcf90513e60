"""Settings of gRPC connections: a dead peer is noticed within two seconds, even without calls."""

from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc import aio

from milliways.wire.tls import TlsSettings

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The kernel of a frozen process still acknowledges bytes, and the timeout above looks at these
    # only. Without this setting, pings without an answer count only after a minute.
    ("grpc.http2.ping_timeout_ms", 1000),
    # Finds a restarted router soon, and gives up soon if there is no answer.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

# Servers have to accept the pings of such clients.
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(
    address: str,
    tls: TlsSettings,
    options: Sequence[tuple[str, int]] = CLIENT_OPTIONS,
    *,
    through_proxies: bool = False,
) -> aio.Channel:
    """A channel to a peer; it connects at the first call.

    A proxy that the environment names (`http_proxy`, `https_proxy`, `grpc_proxy`) is used only
    `through_proxies`: it cannot reach the processes of a cluster.

    Raises:
        OSError: a certificate file cannot be read.
    """
    options = [*options, ("grpc.enable_http_proxy", int(through_proxies))]
    if not tls.is_on:
        return aio.insecure_channel(address, options)
    return aio.secure_channel(address, channel_credentials(tls), options)


def channel_credentials(tls: TlsSettings) -> grpc.ChannelCredentials:
    """The certificate that a client shows, and the authority that it trusts.

    Raises:
        OSError: a certificate file cannot be read.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.cert_file),
    )


def add_port(server: aio.Server, address: str, tls: TlsSettings) -> int:
    """Lets a server listen at `host:port`, with mutual TLS if it is on; returns the port.

    Raises:
        OSError: a certificate file cannot be read.
        RuntimeError: the address cannot be listened on.
    """
    if not tls.is_on:
        return server.add_insecure_port(address)
    credentials = grpc.ssl_server_credentials(
        [(_read(tls.key_file), _read(tls.cert_file))],
        root_certificates=_read(tls.ca_file),
        require_client_auth=True,
    )
    return server.add_secure_port(address, credentials)


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
