"""Faults that end a cluster: after SIGTERM it finishes its requests, otherwise it says why it ends.

Each of them has a cluster of its own. Clients send the load as in a trial. As soon as every running
request has its first token, the clients begin no further one, and the fault comes. `milliways
serve` must then end with the promised exit code, after a death with the reason, and leave no
process.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from milliways.benchmarks.chaos.answers import Outcome
from milliways.benchmarks.chaos.clients import Endpoint, open_clients
from milliways.benchmarks.chaos.faults import LOSES_REQUESTS, Fault
from milliways.benchmarks.chaos.load import Load
from milliways.benchmarks.chaos.local_cluster import LocalCluster, local_cluster
from milliways.benchmarks.chaos.report import Ending, FaultRecord
from milliways.benchmarks.chaos.requests import ChaosRequest
from milliways.benchmarks.chaos.trial import Heard
from milliways.wire.errors import StartupError

# Only a hang takes longer. Requests that run have the default of `ingress.grace_s`.
END_TIMEOUT_S = 180.0
# Clients of a cluster that is gone give up after this time, or after this many times as long as the
# slowest answer took without a fault.
GIVE_UP_S = 20.0
GIVE_UP_TIMES = 4.0
# Processes that ended with their parent are gone a moment later.
GONE_WITHIN_S = 2.0
SERVED_TIMEOUT_S = 60.0
POLL_S = 0.02
SERVE = "milliways serve"
_OURS = "milliways: "


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a cluster and its clients; `ending` is None if the fault never came."""

    ending: Ending | None
    heard: Heard


def end_a_cluster(
    fault: Fault,
    serve_arguments: Sequence[str],
    requests: Sequence[ChaosRequest],
    num_clients: int,
) -> Ended:
    """Starts a cluster, has it serve the load, and ends it by the fault.

    Every request is sent once undisturbed, then again and again.

    Raises:
        StartupError: the cluster does not become ready or does not answer, or has no raylet here.
    """
    with local_cluster(serve_arguments) as cluster:
        endpoint = Endpoint(http=cluster.running.http, grpc=cluster.running.grpc)
        with open_clients(endpoint) as clients:
            undisturbed = tuple(Load(requests, clients, num_clients).run_once())
        with open_clients(endpoint, _patience_s(fault, undisturbed)) as clients:
            load = Load(requests, clients, num_clients)
            load.start({one.request_index: one.answer for one in undisturbed})
            try:
                _wait_until_served(load, num_clients)
                processes = psutil.Process(cluster.process.pid).children(recursive=True)
                began_s = time.monotonic()
                _STRIKES[fault](cluster)
                ending = _wait_for_end(fault, cluster, processes, began_s)
            finally:
                disturbed = tuple(load.stop())
    ended_s = began_s + ending.after_s
    record = FaultRecord(
        fault=fault, victim=SERVE, began_s=began_s, ended_s=ended_s, restored_s=None
    )
    return Ended(ending, Heard(undisturbed, disturbed, (record,)))


def _wait_until_served(load: Load, num_clients: int) -> None:
    """Returns when clients have been served, all wait for the rest of an answer, and begin no more.

    Raises:
        StartupError: that does not happen in time.
    """
    _wait_until(lambda: load.num_ended >= num_clients, "clients are served")
    _wait_until(load.begin_no_more_if_all_have_a_token, "every running request has a token")


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + SERVED_TIMEOUT_S
    while not holds():
        if time.monotonic() > until_s:
            raise StartupError(f"not within {SERVED_TIMEOUT_S:g} s: {what}")
        time.sleep(POLL_S)


def _terminate(cluster: LocalCluster) -> None:
    cluster.process.send_signal(signal.SIGTERM)


def _kill_raylet(cluster: LocalCluster) -> None:
    children = psutil.Process(cluster.process.pid).children(recursive=True)
    raylets = [child.pid for child in children if child.name() == "raylet"]
    if not raylets:
        raise StartupError(f"{Fault.KILL_RAYLET.value}: no raylet runs below {SERVE}")
    os.kill(raylets[0], signal.SIGKILL)


_STRIKES: Mapping[Fault, Callable[[LocalCluster], None]] = {
    Fault.SIGTERM: _terminate,
    Fault.KILL_RAYLET: _kill_raylet,
}


def _patience_s(fault: Fault, undisturbed: Sequence[Outcome]) -> float | None:
    """How long clients wait for an answer; None for as long as in a trial."""
    if fault not in LOSES_REQUESTS:
        return None
    slowest_s = max(one.ended_s - one.started_s for one in undisturbed)
    return max(GIVE_UP_S, GIVE_UP_TIMES * slowest_s)


def _wait_for_end(
    fault: Fault, cluster: LocalCluster, processes: Sequence[psutil.Process], began_s: float
) -> Ending:
    until_s = began_s + END_TIMEOUT_S
    while cluster.process.poll() is None and time.monotonic() < until_s:
        time.sleep(POLL_S)
    after_s = time.monotonic() - began_s
    _, left = psutil.wait_procs(list(processes), timeout=GONE_WITHIN_S)
    reasons = [line for line in cluster.output().splitlines() if line.startswith(_OURS)]
    return Ending(
        fault=fault,
        exit_code=cluster.process.poll(),
        reason=reasons[-1].removeprefix(_OURS) if reasons else "",
        after_s=after_s,
        num_left=len(left),
    )
