"""A run of `milliways chaos`: starts or joins the cluster to break, and runs a trial on it.

Faults that end a cluster come at the end of the run, each on a cluster of its own.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from milliways.benchmarks.chaos.clients import Endpoint, open_clients
from milliways.benchmarks.chaos.endings import Ended, end_a_cluster
from milliways.benchmarks.chaos.faults import Fault
from milliways.benchmarks.chaos.injectors import Actuator
from milliways.benchmarks.chaos.load import Load
from milliways.benchmarks.chaos.local_cluster import local_cluster
from milliways.benchmarks.chaos.report import Report, make_report
from milliways.benchmarks.chaos.requests import draw_requests
from milliways.benchmarks.chaos.trial import Heard, Plan, Trial
from milliways.cluster.ray.environment import enter, use_token
from milliways.cluster.ray.running_clusters import find_running
from milliways.cluster.settings.config import ClusterConfig, read_config
from milliways.model.model_dir import resolve_model_dir
from milliways.wire.errors import ClusterError, StartupError

# `ray_actuator` is imported inside functions. It imports Ray, which reads the token of the cluster
# from the environment when it is imported.


@dataclass(frozen=True, slots=True)
class Target:
    """The cluster to break."""

    endpoint: Endpoint
    actuator: Actuator
    # The process that started it, if the run did.
    pid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSize:
    """How many different requests the load has, how many run at a time, and how long they are."""

    num_requests: int = 48
    num_clients: int = 8
    max_tokens: int = 48


@contextmanager
def copied_model(config: str | None) -> Generator[Path]:
    """A copy of the model that a cluster would serve, for faults that damage files.

    Raises:
        StartupError: there is no room for a copy.
    """
    settings = (read_config(Path(config)) if config else ClusterConfig()).model
    model_dir = resolve_model_dir(settings.path)
    with tempfile.TemporaryDirectory(prefix="milliways-chaos-") as folder:
        try:
            yield Path(shutil.copytree(model_dir, Path(folder) / model_dir.name))
        except shutil.Error as error:
            raise StartupError(f"{model_dir} cannot be copied: {error}") from error


@contextmanager
def started_cluster(serve_arguments: Sequence[str]) -> Generator[Target]:
    """Starts a cluster with `milliways serve`, and stops it at the end.

    Raises:
        StartupError: the cluster does not become ready.
    """
    with local_cluster(serve_arguments) as cluster:
        running = cluster.running
        enter(running)
        from milliways.benchmarks.chaos.ray_actuator import joined

        with joined(running.address) as actuator:
            yield Target(Endpoint(http=running.http, grpc=running.grpc), actuator, running.pid)


@contextmanager
def joined_cluster(address: str, http: str | None, grpc: str | None) -> Generator[Target]:
    """Joins a running cluster; endpoints that are not given are those of its configuration.

    Raises:
        StartupError: no cluster answers at the address.
    """
    _set_token(address)
    from milliways.benchmarks.chaos.ray_actuator import joined

    with joined(address) as actuator:
        ingress = actuator.config().ingress
        endpoint = Endpoint(
            http=http or f"http://{ingress.host}:{ingress.port}",
            grpc=grpc or f"{ingress.host}:{ingress.grpc_port}",
        )
        yield Target(endpoint, actuator)


def run_trial(target: Target, plan: Plan, size: LoadSize, say: Callable[[str], None]) -> Heard:
    """Sends the load to the cluster and injects the faults of the plan.

    Raises:
        StartupError: the cluster does not answer.
    """
    requests = draw_requests(size.num_requests, size.max_tokens, plan.seed)
    with open_clients(target.endpoint) as clients:
        load = Load(requests, clients, size.num_clients)
        return Trial(requests, load, target.actuator, say).run(plan)


def run_endings(
    faults: Sequence[Fault],
    serve_arguments: Sequence[str],
    plan: Plan,
    size: LoadSize,
    say: Callable[[str], None],
) -> tuple[Ended, ...]:
    """Ends a cluster by each of these faults, under the load of the plan's seed.

    A cluster that does not come as far is a problem of the report, like a fault of a trial that
    cannot be injected.
    """
    requests = draw_requests(size.num_requests, size.max_tokens, plan.seed)
    ended: list[Ended] = []
    for fault in faults:
        say(f"starting a cluster for {fault.value} …")
        try:
            one = end_a_cluster(fault, serve_arguments, requests, size.num_clients)
        except (ClusterError, psutil.Error) as error:
            one = Ended(None, Heard((), (), (), f"{fault.value}: {error}"))
        ended.append(one)
        say(str(one.ending) if one.ending is not None else one.heard.problem)
    return tuple(ended)


def report_of(plan: Plan, size: LoadSize, heard: Heard | None, ended: Sequence[Ended]) -> Report:
    """What the trial and the clusters that were ended say together."""
    parts = [one.heard for one in ended]
    if heard is not None:
        parts.insert(0, heard)
    report = make_report(
        draw_requests(size.num_requests, size.max_tokens, plan.seed),
        [outcome for part in parts for outcome in part.undisturbed],
        [outcome for part in parts for outcome in part.disturbed],
        [record for part in parts for record in part.records],
        [one.ending for one in ended if one.ending is not None],
    )
    problems = [part.problem for part in parts if part.problem]
    return replace(report, complaints=(*problems, *report.complaints))


def _set_token(address: str) -> None:
    """Sets the token of a cluster that this user started, otherwise that of the environment."""
    running = find_running()
    if running is not None and running.address == address:
        enter(running)
    else:
        use_token(os.environ.get("RAY_AUTH_TOKEN", ""))
