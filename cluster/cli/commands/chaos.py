"""`milliways chaos`: breaks a cluster under load, and compares every token."""

# Ray's own types are unknown in part.
# pyright: basic

import argparse
import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from milliways.benchmarks.chaos.asks import draw_asks
from milliways.benchmarks.chaos.clients import Endpoint, open_clients
from milliways.benchmarks.chaos.faults import (
    FROM_WITHIN,
    NOT_FROM_OUTSIDE,
    POSSIBLE,
    Fault,
    parse_faults,
)
from milliways.benchmarks.chaos.histogram import draw_histogram
from milliways.benchmarks.chaos.load import Load
from milliways.benchmarks.chaos.local_cluster import local_cluster
from milliways.benchmarks.chaos.report import Report, format_report
from milliways.benchmarks.chaos.trial import Plan, Trial
from milliways.benchmarks.chaos.vitals import as_records, format_growth, watched
from milliways.cluster.cli.commands.serve import say
from milliways.cluster.ray.environment import (
    RunningCluster,
    be_quiet,
    enter,
    find_running,
    use_token,
)
from milliways.cluster.settings.config import ClusterConfig
from milliways.wire.errors import ClusterError, ConfigError

MAX_REQUESTS = 10_000
MAX_CLIENTS = 256


class PromiseBrokenError(ClusterError):
    """Requests failed, or tokens differed; the table above says which."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "--faults",
        metavar="A,B",
        help=f"of {', '.join(fault.value for fault in Fault)}; not possible from outside:"
        f" {', '.join(fault.value for fault in NOT_FROM_OUTSIDE)} [all that are possible; with"
        f" --address without {', '.join(fault.value for fault in FROM_WITHIN)}]",
    )
    option("--requests", type=int, default=48, metavar="N", help="different ones [%(default)s]")
    option("--clients", type=int, default=8, metavar="C", help="at a time [%(default)s]")
    option("--tokens", type=int, default=48, metavar="N", help="of each request [%(default)s]")
    option("--seed", type=int, default=0, metavar="S", help="of requests and faults [%(default)s]")
    option(
        "--duration",
        type=float,
        default=120.0,
        metavar="S",
        help="of faults, and at least until each had its turn [%(default)s]",
    )
    option(
        "--every",
        type=float,
        metavar="S",
        help="from one fault to the next, whatever became of it [until all is replicated again]",
    )
    option("--record", type=Path, metavar="FILE.json", help="write what it found, and the vitals")
    option("--histogram", type=Path, metavar="FILE.svg", help="write a picture of the stalls")
    option("--address", metavar="RAY", help="a running cluster to break [starts one of its own]")
    option("--http", metavar="URL", help="its HTTP endpoint [as it was configured]")
    option("--grpc", metavar="HOST:PORT", help="its gRPC endpoint [as it was configured]")
    option("--yes", action="store_true", help="break the cluster at --address without asking")
    for name in ("--workers", "--expert-replicas", "--attention", "--transport", "--config"):
        option(name, metavar="…", help="of the cluster it starts; as for `milliways serve`")


def run(options: argparse.Namespace) -> None:
    """Runs it all, prints the table.

    Raises:
        ConfigError: an option is wrong, or names what cannot be done from outside.
        PromiseBrokenError: the promise does not hold.
    """
    faults = _faults(options)
    _check(options)
    be_quiet()
    with _joined(options, faults) as (endpoint, pid), watched(pid) as samples:
        report = _run(options, faults, endpoint)
    print(format_report(report))
    print(format_growth(samples))
    if options.record is not None:
        record = {"report": report.as_record(), "vitals": as_records(samples)}
        options.record.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if options.histogram is not None:
        title = f"{sum(row.count for row in report.rows[1:-1])} faults under load"
        picture = draw_histogram(title, report.rows[0].stalls_s, report.stalls_s)
        options.histogram.write_text(picture, "utf-8")
    if not report.holds:
        raise PromiseBrokenError(f"{len(report.complaints)} times the promise was broken")


def _faults(options: argparse.Namespace) -> tuple[Fault, ...]:
    if options.faults is not None:
        return parse_faults(options.faults)
    left_out = FROM_WITHIN if options.address else frozenset[Fault]()
    return tuple(fault for fault in POSSIBLE if fault not in left_out)


def _check(options: argparse.Namespace) -> None:
    for name, value, most in (
        ("--requests", options.requests, MAX_REQUESTS),
        ("--clients", options.clients, MAX_CLIENTS),
        ("--tokens", options.tokens, 1 << 20),
        ("--duration", options.duration, 1e6),
        ("--every", 1.0 if options.every is None else options.every, 1e6),
    ):
        if not 1 <= value <= most:
            raise ConfigError(name, value, f"between 1 and {most:g}")


@contextmanager
def _joined(
    options: argparse.Namespace, faults: tuple[Fault, ...]
) -> Generator[tuple[Endpoint, int | None]]:
    """This process in the cluster's Ray; the cluster is ours, and has a process, or was there."""
    if options.address:
        _show_token(options.address)
        with _ray(options.address):
            _confirm(options, faults)
            yield _endpoint(options), None
        return
    arguments: list[str] = []
    for name in ("workers", "expert_replicas", "attention", "transport", "config"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", value]
    say("starting a cluster …")
    with local_cluster(arguments) as running:
        enter(running)
        with _ray(running.address):
            yield _endpoint_of(running), running.pid


def _show_token(address: str) -> None:
    """That of a cluster which this user started, else what the environment says."""
    running = find_running()
    if running is not None and running.address == address:
        enter(running)
    else:
        use_token(os.environ.get("RAY_AUTH_TOKEN", ""))


@contextmanager
def _ray(address: str) -> Generator[None]:
    # Not before: Ray reads its settings when it is imported.
    import ray

    from milliways.cluster.ray.cluster import join

    join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _endpoint_of(running: RunningCluster) -> Endpoint:
    return Endpoint(http=running.http, grpc=running.grpc)


def _endpoint(options: argparse.Namespace) -> Endpoint:
    from milliways.benchmarks.chaos.ray_actuator import RayActuator

    config: ClusterConfig = RayActuator().config()
    ingress = config.ingress
    return Endpoint(
        http=options.http or f"http://{ingress.host}:{ingress.port}",
        grpc=options.grpc or f"{ingress.host}:{ingress.grpc_port}",
    )


def _confirm(options: argparse.Namespace, faults: tuple[Fault, ...]) -> None:
    """Asks before somebody's cluster is broken.

    Raises:
        ConfigError: it was not confirmed.
    """
    if options.yes:
        return
    names = ", ".join(fault.value for fault in faults)
    say(f"This kills and stops processes of the cluster at {options.address}: {names}.")
    if sys.stdin.isatty():
        say("Go on? Type yes:")
        if sys.stdin.readline().strip() == "yes":
            return
    raise ConfigError("--yes", "", "given, to break a cluster that serves others")


def _run(options: argparse.Namespace, faults: tuple[Fault, ...], endpoint: Endpoint) -> Report:
    from milliways.benchmarks.chaos.ray_actuator import RayActuator

    asks = draw_asks(options.requests, options.tokens, options.seed)
    plan = Plan(
        faults=faults, seed=options.seed, duration_s=options.duration, every_s=options.every
    )
    with open_clients(endpoint) as clients:
        load = Load(asks, clients, options.clients)
        return Trial(asks, load, RayActuator(), say).run(plan)
