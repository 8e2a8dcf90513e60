"""Certificates for gRPC connections, as settings name them."""

from dataclasses import dataclass, field

from milliways.wire.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Certificates in PEM files, all three or none. With them, every gRPC connection is mutual TLS.

    This holds between workers, from ingress to router, and from clients to the public port: clients
    and probes of that port need a certificate of `ca_file` as well. HTTP stays plain; put a proxy
    that ends TLS before it. Shared memory does not leave its machine. Ray's own connections are set
    up with RAY_USE_TLS.
    """

    ca_file: str = field(
        default="", metadata={"description": "Certificate of the authority.", "strict": True}
    )
    cert_file: str = field(
        default="", metadata={"description": "Certificate of this cluster.", "strict": True}
    )
    key_file: str = field(default="", metadata={"description": "Its key.", "strict": True})

    def __post_init__(self) -> None:
        given = [bool(path) for path in (self.ca_file, self.cert_file, self.key_file)]
        if any(given) and not all(given):
            raise ConfigError("tls", given, "ca_file, cert_file and key_file together, or none")

    @property
    def is_on(self) -> bool:
        return bool(self.ca_file)
