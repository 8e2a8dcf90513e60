"""Limits of the connections between routers and workers, the same on both sides."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """What one connection may carry, and how soon a silent peer is noticed."""

    max_message_bytes: int = 256 << 20
    # The router queues further calls; the worker takes no more of them from the connection.
    max_calls_in_flight: int = 64
    # The time between two pings. A peer is lost after twice this time without an answer.
    keepalive_s: float = 1.0
    connect_timeout_s: float = 5.0
    # The first segment of memory that a link shares with its worker, and all segments together.
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
            # Notices a frozen process, whose kernel still acknowledges bytes.
            ("grpc.http2.ping_timeout_ms", keepalive_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Without these, a server closes connections that ping so often.
            ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 2),
            ("grpc.http2.max_ping_strikes", 0),
            # One connection for each link, so that links do not break together.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
        ]
