"""Bounds of the data plane's links, the same on both sides."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """What one link may carry, and how soon a silent peer is noticed."""

    max_message_bytes: int = 256 << 20
    # More calls wait at the router, and beyond that in its worker's socket.
    max_calls_in_flight: int = 64
    # Between a link's signs of life; twice this without one, and the peer is gone.
    keepalive_s: float = 1.0
    connect_timeout_s: float = 5.0
    # The first piece of memory that a link shares with its worker, and all pieces together.
    first_segment_bytes: int = 16 << 20
    max_shared_bytes: int = 1 << 30

    def grpc_options(self) -> list[tuple[str, int]]:
        """Settings of gRPC channels and servers."""
        keepalive_ms = int(self.keepalive_s * 1000)
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", keepalive_ms),
            ("grpc.keepalive_timeout_ms", keepalive_ms),
            # Without it a frozen process goes unnoticed: its kernel still acknowledges bytes.
            ("grpc.http2.ping_timeout_ms", keepalive_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Servers count pings as abuse unless they are told otherwise.
            ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 2),
            ("grpc.http2.max_ping_strikes", 0),
            # One connection for each link: its break is that peer's, and nobody else's.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
        ]
