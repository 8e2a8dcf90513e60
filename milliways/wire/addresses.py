"""Hosts and ports as one text, and back: IPv6 addresses contain colons, so they get brackets."""

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def plain_host(host: str) -> str:
    """A host without the brackets in which URLs put IPv6 addresses."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    host = plain_host(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether `host:port` is on this machine, so that no proxy can reach it."""
    host = plain_host(address.rpartition(":")[0])
    return host in ("localhost", "::1") or host.startswith("127.")


def listens_on_all(host: str) -> bool:
    """Whether a host to listen on means every address of the machine."""
    return plain_host(host) in _ANY


def reachable_host(host: str) -> str:
    """Where a client on the same machine reaches a server that listens on this host."""
    host = plain_host(host)
    return _ANY.get(host, host)
