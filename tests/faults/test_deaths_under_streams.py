"""Processes killed while an HTTP and a gRPC stream run: both are what they are undisturbed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from milliways.benchmarks.chaos.answers import Answer, difference
from milliways.benchmarks.chaos.clients import Client, Endpoint, open_clients
from milliways.benchmarks.chaos.requests import ChaosRequest, Surface
from tests.faults.leftovers import left_as_found, processes_of
from tests.served_cluster import ServedCluster, wait_until

# Long enough to be in its middle when somebody dies.
NUM_TOKENS = 400
NUM_BEFORE = 20
END_TIMEOUT_S = 130.0
ASKS = {
    Surface.HTTP: ChaosRequest(
        mode="logprobs",
        surface=Surface.HTTP,
        prompt="Welcome to",
        seed=11,
        max_tokens=NUM_TOKENS,
    ),
    Surface.GRPC: ChaosRequest(
        mode="logprobs",
        surface=Surface.GRPC,
        prompt="Always bring a towel, because",
        seed=12,
        max_tokens=NUM_TOKENS,
    ),
}


@pytest.fixture(autouse=True)
def leaves_nothing(cluster: ServedCluster) -> Iterator[None]:
    with left_as_found(cluster):
        yield


@pytest.fixture
def clients(cluster: ServedCluster) -> Iterator[dict[Surface, Client]]:
    with open_clients(Endpoint(http=cluster.url, grpc=f"127.0.0.1:{cluster.grpc_port}")) as clients:
        yield clients


class Streams:
    """One stream over each surface, each in a thread."""

    def __init__(self, clients: dict[Surface, Client]) -> None:
        self.answers = {surface: Answer.of(ask) for surface, ask in ASKS.items()}
        self.errors: list[Exception] = []
        self._clients = clients
        self._threads = [threading.Thread(target=self._ask, args=(one,)) for one in ASKS]
        for thread in self._threads:
            thread.start()

    def wait_until_in_the_middle(self) -> None:
        answers = self.answers.values()
        wait_until(
            lambda: all(len(a.token_times_s) >= NUM_BEFORE for a in answers), "both streams run"
        )
        assert not any(answer.is_complete for answer in answers)

    def join(self) -> dict[Surface, Answer]:
        """Their answers, when both have come to their end."""
        for thread in self._threads:
            thread.join(END_TIMEOUT_S)
            assert not thread.is_alive(), "a stream does not end"
        assert self.errors == []
        assert all(answer.is_complete for answer in self.answers.values())
        return self.answers

    def _ask(self, surface: Surface) -> None:
        try:
            self._clients[surface].send(ASKS[surface], self.answers[surface])
        except Exception as error:
            self.errors.append(error)


def disturbed(clients: dict[Surface, Client], disturb: Callable[[], None]) -> dict[Surface, Answer]:
    """Both streams, with something done in their middle; they are what they are without it."""
    wanted = Streams(clients).join()
    streams = Streams(clients)
    streams.wait_until_in_the_middle()
    disturb()
    got = streams.join()
    assert {s: difference(wanted[s], got[s]) for s in ASKS} == dict.fromkeys(ASKS, "")
    assert all(answer.breaks == [] for answer in wanted.values())
    return got


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def pids_of(cluster: ServedCluster, *names: str) -> list[int]:
    return [process.pid for process in processes_of(cluster, *names)]


def test_clients_go_on_when_the_ingress_replica_is_killed(
    cluster: ServedCluster, clients: dict[Surface, Client]
) -> None:
    (replica,) = pids_of(cluster, "ray::ServeReplica:milliways:Ingress")
    got = disturbed(clients, lambda: kill([replica]))
    for answer in got.values():
        assert answer.breaks


def test_clients_of_http_go_on_when_the_proxy_is_killed(
    cluster: ServedCluster, clients: dict[Surface, Client]
) -> None:
    # HAProxy itself ends with it.
    (proxy,) = pids_of(cluster, "ray::HAProxyManager")
    got = disturbed(clients, lambda: kill([proxy]))
    assert got[Surface.HTTP].breaks
    # It is not on the way of the others.
    assert got[Surface.GRPC].breaks == []


@pytest.mark.parametrize("controller_is_first", [True, False])
def test_streams_go_on_when_all_workers_and_the_controller_are_killed(
    cluster: ServedCluster, clients: dict[Surface, Client], controller_is_first: bool
) -> None:
    controller = pids_of(cluster, "ray::ControllerActor")
    workers = pids_of(cluster, "ray::WorkerActor")
    assert (len(controller), len(workers)) == (1, 3)
    victims = controller + workers if controller_is_first else workers + controller
    got = disturbed(clients, lambda: kill(victims))
    for answer in got.values():
        # A pause is all that they see.
        assert answer.breaks == []
