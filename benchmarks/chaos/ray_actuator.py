"""Acts on a cluster on Ray: asks its controller, and signals processes on any node."""

# Ray's own types are unknown in part.
# pyright: basic

import os
import resource
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray._private.state import actors
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.context import _get_global_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from milliways.benchmarks.chaos.victims import Place, WorkerFacts
from milliways.cluster.ray.cluster import join
from milliways.cluster.ray.declaring import declared_now
from milliways.cluster.ray.serving import deploy_ingress, wait_for_ingress
from milliways.cluster.ray.start_controller import find_controller
from milliways.cluster.ray.start_worker import NAMESPACE, actor_name
from milliways.cluster.settings.config import IngressSettings
from milliways.cluster.settings.names import changed
from milliways.model.checkpoint import find_directories
from milliways.model.model_dir import resolve_model_dir
from milliways.wire.errors import StartupError
from milliways.wire.status import ClusterStatus
from milliways.wire.view import ClusterView, WorkerState

# The name of the deployment in `milliways.cluster.ray.app`. The application's name may differ.
INGRESS_NAME = "Ingress"
PATIENCE_S = 60.0
ANSWER_TIMEOUT_S = 15.0
POLL_S = 0.1
T = TypeVar("T")


@contextmanager
def joined(address: str) -> Generator["RayActuator"]:
    """Joins the Ray cluster at an address, and leaves it at the end.

    Raises:
        StartupError: no Ray cluster answers at the address.
    """
    join(address)
    try:
        yield RayActuator()
    finally:
        ray.shutdown()


class RayActuator:
    """`Actuator` for the cluster that this process has joined."""

    def __init__(self) -> None:
        self._own_node = ray.get_runtime_context().get_node_id()

    def workers(self) -> Sequence[WorkerFacts]:
        status: ClusterStatus = self._ask_controller("status")
        return [WorkerFacts.of(w) for w in status.workers if w.state == WorkerState.READY.value]

    def controller(self) -> Place:
        node_id, pid = self._ask_controller("whereabouts")
        return Place(name="controller", node_id=node_id, pid=pid)

    def ingress(self) -> Sequence[Place]:
        places: list[Place] = []
        for application in _serve_details()["applications"].values():
            deployment = application["deployments"].get(INGRESS_NAME)
            for replica in deployment["replicas"] if deployment else ():
                if replica["state"] == "RUNNING":
                    places += _alive(replica["actor_id"], f"ingress {replica['replica_id']}")
        return places

    def proxies(self) -> Sequence[Place]:
        places: list[Place] = []
        for proxy in _serve_details()["proxies"].values():
            if proxy["status"] == "HEALTHY":
                places += _alive(proxy["actor_id"], "proxy")
        return places

    def view(self) -> ClusterView:
        return self._ask_controller("view", -1, 0.0)

    def config(self) -> Any:
        """The configuration of the cluster."""
        return self._ask_controller("config")

    def send(self, place: Place, number: signal.Signals) -> None:
        self._at(place, lambda: signal_actor(place.pid, number))

    def drop_replies(self, place: Place, count: int) -> int:
        status: ClusterStatus = self._ask_controller("status")
        incarnations = {worker.worker_id: worker.incarnation for worker in status.workers}
        try:
            name = actor_name(status.generation, place.name, incarnations[place.name])
            actor = ray.get_actor(name, namespace=NAMESPACE)
            num_lost: Any = ray.get(actor.drop_replies.remote(count), timeout=PATIENCE_S)
        except (ValueError, KeyError, RayActorError, RayTaskError, GetTimeoutError) as error:
            raise StartupError(f"{place.name} cannot drop replies: {error}") from error
        return num_lost

    def deploy_ingress(self, num_replicas: int) -> None:
        ingress: IngressSettings = self.config().ingress
        # Another value of any setting makes Serve replace all replicas.
        grace_s = ingress.grace_s + 1.0
        declared = declared_now(
            changed(
                self.config(),
                {
                    "ingress.min_replicas": num_replicas,
                    "ingress.max_replicas": num_replicas,
                    "ingress.grace_s": grace_s,
                },
            )
        )
        deploy_ingress(changed(self.config(), declared.values), declared.at_s)
        wait_for_ingress(PATIENCE_S)
        until_s = time.monotonic() + PATIENCE_S
        while len(self.ingress()) != num_replicas:
            if time.monotonic() > until_s:
                raise StartupError(f"the ingress does not come to {num_replicas} replicas")
            time.sleep(POLL_S)

    def ckpt_dir(self) -> Path:
        return find_directories(resolve_model_dir(self.config().model.path))[0]

    def file_fault_of(self, place: Place) -> str:
        status: ClusterStatus = self._ask_controller("status")
        for worker in status.workers:
            is_next = worker.worker_id == place.name and worker.pid != place.pid
            if is_next and "tensor" in worker.last_error:
                return worker.last_error
        return ""

    def limit_files(self, place: Place, max_bytes: int | None) -> None:
        self._at(place, lambda: limit_files(place.pid, max_bytes))

    def _at(self, place: Place, act: Callable[[], None]) -> None:
        """Runs a function on a node: directly if it is this node, otherwise in a Ray task."""
        if place.node_id == self._own_node:
            act()
            return
        there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        remote: Any = ray.remote(_call).options(num_cpus=0, scheduling_strategy=there)
        ray.get(remote.remote(act), timeout=PATIENCE_S)

    def _ask_controller(self, method: str, *arguments: Any) -> Any:
        """The controller's answer. If the controller restarts, waits for the new one.

        Raises:
            StartupError: no controller answered within `PATIENCE_S`.
        """
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                reference = getattr(find_controller(), method).remote(*arguments)
                return ray.get(reference, timeout=ANSWER_TIMEOUT_S)
            except (ValueError, RayActorError, RayTaskError, GetTimeoutError) as error:
                if time.monotonic() > until_s:
                    raise StartupError(f"no controller answers: {error}") from error
            time.sleep(POLL_S)


def _serve_details() -> Any:
    """What Ray Serve knows of its replicas and proxies."""
    client: Any = _get_global_client()
    return client.get_serve_details()


def _alive(actor_id: str, name: str) -> list[Place]:
    """The node and process of an actor; empty if it is dead. Ray notices a death before Serve."""
    actor: Any = actors(actor_id)
    if actor.get("State") != "ALIVE":
        return []
    return [Place(name=name, node_id=actor["Address"]["NodeID"], pid=actor["Pid"])]


def signal_actor(pid: int, number: signal.Signals) -> None:
    """Signals an actor's process. Does nothing if another program has its process id now."""
    if _is_actor(pid):
        os.kill(pid, number)


def limit_files(pid: int, max_bytes: int | None) -> None:
    """Sets the soft limit on the size of a process's files; None sets it to the hard limit."""
    if _is_actor(pid):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        soft = hard if max_bytes is None else max_bytes
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _is_actor(pid: int) -> bool:
    try:
        return psutil.Process(pid).cmdline()[0].startswith("ray::")
    except (psutil.Error, IndexError):
        return False


def _call(act: Callable[[], None]) -> None:
    act()
