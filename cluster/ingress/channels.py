"""How gRPC connections are kept: dead peers noticed within two seconds, with or without calls."""

from pathlib import Path

import grpc
from grpc import aio

from cluster.config import TlsSettings

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A frozen process's kernel still acknowledges bytes, which is all that the timeout above looks
    # at: that no ping is answered counts only after a minute, unless this says otherwise.
    ("grpc.http2.ping_timeout_ms", 1000),
    # A router that was started again is found soon, one that does not answer is given up soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

# Every server that such clients connect to has to put up with their pings.
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(address: str, tls: TlsSettings) -> aio.Channel:
    """A channel to a peer; the connection is made when it is needed.

    Raises:
        OSError: a certificate file cannot be read.
    """
    options = list(CLIENT_OPTIONS)
    if not tls.is_on:
        return aio.insecure_channel(address, options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.cert_file),
    )
    return aio.secure_channel(address, credentials, options)


def server_credentials(tls: TlsSettings, *, wants_client: bool) -> grpc.ServerCredentials:
    """What a server shows, and whether it wants the same of its clients.

    Raises:
        OSError: a certificate file cannot be read.
    """
    return grpc.ssl_server_credentials(
        [(_read(tls.key_file), _read(tls.cert_file))],
        root_certificates=_read(tls.ca_file) if wants_client else None,
        require_client_auth=wants_client,
    )


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
