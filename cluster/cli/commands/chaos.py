"""`milliways chaos`: breaks a cluster under load, and compares every token."""

import argparse
import json
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from milliways.benchmarks.chaos.faults import (
    DAMAGES_FILES,
    ENDS_CLUSTER,
    IMPOSSIBLE,
    INJECTED_BY_WORKER,
    POSSIBLE,
    Fault,
    parse_faults,
)
from milliways.benchmarks.chaos.histogram import draw_histogram
from milliways.benchmarks.chaos.report import Report, format_report
from milliways.benchmarks.chaos.resource_usage import Sample, as_records, format_growth, watched
from milliways.benchmarks.chaos.run import (
    LoadSize,
    Target,
    copied_model,
    joined_cluster,
    report_of,
    run_endings,
    run_trial,
    started_cluster,
)
from milliways.benchmarks.chaos.trial import Plan
from milliways.cluster.cli.messages import say
from milliways.cluster.ray.environment import be_quiet
from milliways.wire.errors import ClusterError, ConfigError

MAX_REQUESTS = 10_000
MAX_CLIENTS = 256
DEFAULT = LoadSize()
NEEDS_OWN_CLUSTER = INJECTED_BY_WORKER | DAMAGES_FILES | ENDS_CLUSTER


class PromiseBrokenError(ClusterError):
    """A request failed, an answer differed, or the cluster did not recover; see the table."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    _add_load_options(parser)
    _add_output_options(parser)
    _add_cluster_options(parser)


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "--faults",
        metavar="A,B",
        help=f"faults to inject, of {', '.join(fault.value for fault in Fault)};"
        f" {', '.join(fault.value for fault in IMPOSSIBLE)} is refused, with the reason"
        f" [all others; with --address all but"
        f" {', '.join(fault.value for fault in POSSIBLE if fault in NEEDS_OWN_CLUSTER)}]",
    )
    option(
        "--requests",
        type=int,
        default=DEFAULT.num_requests,
        metavar="N",
        help="number of different requests [%(default)s]",
    )
    option(
        "--clients",
        type=int,
        default=DEFAULT.num_clients,
        metavar="C",
        help="number of requests that run at the same time [%(default)s]",
    )
    option(
        "--tokens",
        type=int,
        default=DEFAULT.max_tokens,
        metavar="N",
        help="tokens to generate for each request [%(default)s]",
    )
    option(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the requests and of the order of faults [%(default)s]",
    )
    option(
        "--duration",
        type=float,
        default=120.0,
        metavar="S",
        help="least seconds to inject faults; each kind is injected at least once [%(default)s]",
    )
    option(
        "--every",
        type=float,
        metavar="S",
        help="seconds between two faults [wait for full replication after each fault]",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "--record",
        type=Path,
        metavar="FILE.json",
        help="write the report, and the memory and descriptors that the cluster used",
    )
    option("--histogram", type=Path, metavar="FILE.svg", help="draw a histogram of the stalls")


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "--address",
        metavar="RAY",
        help="Ray address of a running cluster to break [start a cluster for this run]",
    )
    option("--http", metavar="URL", help="HTTP endpoint of that cluster [from its configuration]")
    option(
        "--grpc",
        metavar="HOST:PORT",
        help="gRPC endpoint of that cluster [from its configuration]",
    )
    option("--yes", action="store_true", help="break the cluster at --address without asking")
    for name in ("--workers", "--expert-replicas", "--attention", "--transport", "--config"):
        option(name, metavar="…", help="for the cluster to start, as for `milliways serve`")


def run(options: argparse.Namespace) -> None:
    """Runs the trial, prints the table, and writes the files.

    Raises:
        ConfigError: an option is wrong, or names a fault that cannot be injected.
        PromiseBrokenError: there was a complaint.
    """
    faults = _faults(options)
    _check(options)
    in_turn = tuple(fault for fault in faults if fault not in ENDS_CLUSTER)
    last = tuple(fault for fault in faults if fault in ENDS_CLUSTER)
    plan = Plan(
        faults=in_turn, seed=options.seed, duration_s=options.duration, every_s=options.every
    )
    size = LoadSize(
        num_requests=options.requests, num_clients=options.clients, max_tokens=options.tokens
    )
    be_quiet()
    heard, samples = None, list[Sample]()
    if in_turn:
        with _target(options, in_turn) as target, watched(target.pid) as samples:
            heard = run_trial(target, plan, size, say)
    ended = run_endings(last, _serve_arguments(options), plan, size, say)
    report = report_of(plan, size, heard, ended)
    print(format_report(report))
    print(format_growth(samples))
    _write(options, report, samples)
    if not report.holds:
        raise PromiseBrokenError(f"the promise was broken {len(report.complaints)} times")


def _faults(options: argparse.Namespace) -> tuple[Fault, ...]:
    if options.faults is not None:
        faults = parse_faults(options.faults)
        for kinds, does in ((DAMAGES_FILES, "damages a checkpoint"), (ENDS_CLUSTER, "ends it")):
            if options.address and (refused := kinds.intersection(faults)):
                name = min(fault.value for fault in refused)
                raise ConfigError("--faults", name, f"left out with --address: it {does}")
        return faults
    left_out = NEEDS_OWN_CLUSTER if options.address else frozenset[Fault]()
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
def _target(options: argparse.Namespace, faults: tuple[Fault, ...]) -> Generator[Target]:
    """The cluster at --address after a confirmation, or one that is started for this run."""
    if options.address:
        with joined_cluster(options.address, options.http, options.grpc) as target:
            _confirm(options, faults)
            yield target
        return
    arguments = _serve_arguments(options)
    say("starting a cluster …")
    with ExitStack() as stack:
        if DAMAGES_FILES.intersection(faults):
            model_dir = stack.enter_context(copied_model(options.config))
            arguments += ["--model", str(model_dir)]
        yield stack.enter_context(started_cluster(arguments))


def _serve_arguments(options: argparse.Namespace) -> list[str]:
    """Arguments of `milliways serve` for the clusters that the run starts."""
    arguments: list[str] = []
    for name in ("workers", "expert_replicas", "attention", "transport", "config"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", value]
    return arguments


def _confirm(options: argparse.Namespace, faults: tuple[Fault, ...]) -> None:
    """Asks the user before it breaks a running cluster.

    Raises:
        ConfigError: the user did not confirm.
    """
    if options.yes:
        return
    names = ", ".join(fault.value for fault in faults)
    say(f"This kills and stops processes of the cluster at {options.address}: {names}.")
    if sys.stdin.isatty():
        say("Continue? Type yes:")
        if sys.stdin.readline().strip() == "yes":
            return
    raise ConfigError("--yes", "", "given, to break a running cluster")


def _write(options: argparse.Namespace, report: Report, samples: list[Sample]) -> None:
    if options.record is not None:
        record = {"report": report.as_record(), "vitals": as_records(samples)}
        options.record.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if options.histogram is not None:
        title = f"{sum(row.count for row in report.rows[1:-1])} faults under load"
        picture = draw_histogram(title, report.rows[0].stalls_s, report.stalls_s)
        options.histogram.write_text(picture, "utf-8")
