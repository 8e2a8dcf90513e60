"""The addresses of the endpoint: checks them before Ray starts, and who else listens there."""

import dataclasses
import socket
from collections.abc import Collection
from typing import Any

import psutil

from milliways.cluster.settings.config import IngressSettings
from milliways.wire.addresses import join_address, listens_on_all, plain_host
from milliways.wire.errors import StartupError

_OPTIONS = (("--port", "port"), ("--grpc-port", "grpc_port"))


def settle_addresses(ingress: IngressSettings) -> IngressSettings:
    """The settings with real ports in place of 0, and a host without brackets.

    Raises:
        StartupError: an address cannot be listened on; names the option, address and reason.
    """
    family, host = _resolve(plain_host(ingress.host))
    ports: dict[str, int] = {}
    for option, name in _OPTIONS:
        port = _probe(family, host, getattr(ingress, name), option)
        while not getattr(ingress, name) and port in ports.values():
            port = _probe(family, host, 0, option)
        if port in ports.values():
            raise StartupError(f"{option} {port}: the same as --port")
        ports[name] = port
    return dataclasses.replace(ingress, host=host, **ports)


def _resolve(host: str) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise StartupError(f"--host {host}: no such address: {error.strerror}") from error
    family, _, _, _, address = found[0]
    # A name of an IPv6 address would be taken for one of an IPv4 address later.
    is_name = family is socket.AF_INET6 and ":" not in host
    return family, str(address[0]) if is_name else host


def _probe(family: socket.AddressFamily, host: str, port: int, option: str) -> int:
    """Binds an address and gives it up; returns its port."""
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        reason = f"cannot listen on {join_address(host, port)}: {error.strerror}"
        raise StartupError(f"{option} {port}: {reason}") from error


def check_listeners(ingress: IngressSettings, ours: Collection[int]) -> None:
    """Checks that the endpoint's ports are ours alone.

    A process of the same user can listen on a port that another shares (SO_REUSEPORT, as Ray Serve
    and gRPC do); the kernel then gives it some of the connections.

    Raises:
        StartupError: a process that is not among `ours` listens there; names port and process.
    """
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid in ours:
            continue
        address: Any = connection.laddr
        ip, port = address.ip, address.port
        for option, name in _OPTIONS:
            if port == getattr(ingress, name) and _overlaps(ip, ingress.host):
                other = f"process {connection.pid}" if connection.pid else "another process"
                where = join_address(ingress.host, port)
                raise StartupError(f"{option} {port}: {other} listens on {where} too")


def _overlaps(theirs: str, ours: str) -> bool:
    """Whether a listener at `theirs` takes connections from one at `ours`.

    One on all addresses takes none from one on a single address.
    """
    return listens_on_all(ours) or theirs.removeprefix("::ffff:") in (ours, _numeric(ours))


def _numeric(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return host
