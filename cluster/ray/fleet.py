"""The controller's fleet on Ray: a placement group and an actor for each worker."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import list_named_actors
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group_table,
    remove_placement_group,
)

from milliways.cluster.control.fleet import (
    Existing,
    Loaded,
    LoadFailedError,
    Spawned,
    WorkerDiedError,
)
from milliways.cluster.ray.resources import missing_of
from milliways.cluster.ray.start_worker import NAMESPACE, group_of, resources_of, start_worker
from milliways.cluster.settings.config import ClusterConfig
from milliways.model.errors import CheckpointError, ModelConfigError, TokenizerError
from milliways.model.manifest import Manifest
from milliways.model.small_files import SmallFiles
from milliways.runtime.async_tasks import AsyncTasks
from milliways.runtime.tasks import Pending
from milliways.wire.errors import UnavailableError
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.status import ProcessStatus
from milliways.wire.view import ClusterView, Member

logger = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 5.0
DESCRIBE_TRIES = 3
DESCRIBE_AGAIN_AFTER_S = 1.0
# Errors that say that a file of the model is missing, unreadable or another one.
_UNREADABLE = (CheckpointError, ModelConfigError, TokenizerError)
_ACTOR_NAME = re.compile(r"g(\d+)-worker-\d+-\d+")
_GROUP_NAME = re.compile(r"milliways-g(\d+)-worker-\d+")
T = TypeVar("T")


class RayFleet:
    """A `Fleet` of Ray actors, all of one generation. Used from the loop of its `AsyncTasks`.

    Invariant: `_actors` and `_deaths` have the latest incarnation of each worker, and no earlier
    one of it is alive.
    """

    def __init__(self, config: ClusterConfig, shell: AsyncTasks, generation: int = 1) -> None:
        self.generation = generation
        # What the next incarnations are started with.
        self.config = config
        # Of the model's parts; set before any worker is started.
        self.sizes: ModelBytes | None = None
        self._shell = shell
        self._groups: dict[str, PlacementGroup] = {}
        self._actors: dict[str, Any] = {}
        self._deaths: dict[str, Pending[None]] = {}

    def spawn(
        self, worker_id: str, incarnation: int, small_files: SmallFiles | None
    ) -> Pending[Spawned]:
        return self._shell.pending(self._spawn(worker_id, incarnation, small_files))

    def missing_resource(self, worker_id: str) -> str:
        group = self._groups.get(worker_id)
        if group is not None and placement_group_table(group)["state"] == "CREATED":
            return "its process to start"
        nodes: Any = ray.nodes()
        amounts = [node["Resources"] for node in nodes if node["Alive"]]
        wanted = resources_of(self.config.workers, worker_id)
        return missing_of(wanted, amounts, ray.available_resources())

    def load(
        self, worker_id: str, shards: ShardPlan, wanted: Manifest, peers: Sequence[Member]
    ) -> Pending[Loaded]:
        actor = self._actors[worker_id]
        loading = actor.load.remote(shards, self.bytes_of(shards), wanted, peers)
        return self._shell.pending(_answer_of_load(worker_id, loading))

    def unload(self, worker_id: str, kept: frozenset[ExpertId]) -> Pending[None]:
        return self._call(worker_id, self._actors[worker_id].unload.remote(kept))

    def publish(self, worker_id: str, view: ClusterView) -> Pending[None]:
        return self._call(worker_id, self._actors[worker_id].publish.remote(view))

    def fence(self, worker_id: str, placement_epoch: int) -> Pending[None]:
        return self._call(worker_id, self._actors[worker_id].fence.remote(placement_epoch))

    def drain(self, worker_id: str) -> Pending[None]:
        return self._call(worker_id, self._actors[worker_id].drain.remote())

    def stop(self, worker_id: str) -> Pending[None]:
        return self._shell.pending(self._stop(worker_id))

    def death(self, worker_id: str) -> Pending[None]:
        return self._deaths[worker_id]

    async def find_existing(self) -> list[Existing]:
        """Workers of this generation that another controller started and that serve.

        Those that are silent, or have not loaded what they were to load, are ended.

        Raises:
            UnavailableError: a worker answers with errors. It may serve well, so it is not ended.
        """
        found: dict[str, Existing] = {}
        for name in names_of_workers(self.generation):
            try:
                actor = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:
                # It died since it was listed.
                continue
            existing = await _described(name, actor)
            if existing is None:
                ray.kill(actor)
                continue
            worker_id = existing.worker_id
            found[worker_id] = existing
            self._watch(worker_id, actor)
        return list(found.values())

    async def progress(self, worker_id: str) -> tuple[int, int]:
        """Bytes that a worker has read, and bytes that it is to read."""
        return await self._actors[worker_id].progress.remote()

    async def status(self, worker_id: str) -> ProcessStatus:
        """What a worker says of itself."""
        return await self._actors[worker_id].status.remote()

    def stop_all(self) -> None:
        """Kills all workers, at once."""
        for actor in self._actors.values():
            ray.kill(actor)
        for group in self._groups.values():
            remove_placement_group(group)
        remove_groups(lambda generation: generation == self.generation)

    def bytes_of(self, shards: ShardPlan) -> int:
        """How many bytes of the checkpoint shards take."""
        model = self.sizes
        assert model is not None
        return (
            shards.num_layers * model.attention_layer_bytes
            + len(shards.experts) * model.expert_bytes
            + shards.has_ends * model.end_bytes
        )

    async def _spawn(
        self, worker_id: str, incarnation: int, small_files: SmallFiles | None
    ) -> Spawned:
        assert self.sizes is not None
        self._end(worker_id)
        if worker_id not in self._groups:
            self._groups[worker_id] = group_of(self.config.workers, self.generation, worker_id)
        try:
            group = self._groups[worker_id]
            actor = start_worker(
                self.config, self.generation, worker_id, incarnation, group, self.sizes
            )
        except ValueError as error:
            # An earlier controller started this incarnation, and died before anybody knew of it.
            # The next one is free, or the one after that.
            text = f"incarnation {incarnation} of {worker_id} is taken"
            raise WorkerDiedError(text) from error
        self._watch(worker_id, actor)
        return await _answer_of_load(worker_id, actor.start.remote(small_files))

    def _watch(self, worker_id: str, actor: Any) -> None:
        self._actors[worker_id] = actor
        self._deaths[worker_id] = self._shell.pending(_gone(actor.until_gone.remote()))

    def _end(self, worker_id: str) -> None:
        """Ends an incarnation that counts as dead; its process may be alive, with its resources."""
        actor = self._actors.pop(worker_id, None)
        if actor is not None:
            ray.kill(actor)

    async def _stop(self, worker_id: str) -> None:
        self._end(worker_id)
        group = self._groups.pop(worker_id, None)
        if group is not None:
            remove_placement_group(group)

    def _call(self, worker_id: str, reference: Any) -> Pending[None]:
        return self._shell.pending(_answer(worker_id, reference))


def names_of_workers(generation: int) -> list[str]:
    """The names of the actors of a generation's workers."""
    return [name for number, name in _workers() if number == generation]


def generations_that_run() -> list[int]:
    """The numbers of the generations of which an actor exists, in order."""
    return sorted({number for number, _ in _workers()})


def _workers() -> list[tuple[int, str]]:
    """Generation and name of each worker's actor."""
    entries: Any = list_named_actors(all_namespaces=True)
    names = [entry["name"] for entry in entries if entry["namespace"] == NAMESPACE]
    matches = [_ACTOR_NAME.fullmatch(name) for name in names]
    return [(int(match[1]), match[0]) for match in matches if match is not None]


def remove_groups(unwanted: Callable[[int], bool]) -> None:
    """Removes the placement groups of unwanted generations, which nobody uses any more."""
    table: Any = placement_group_table()
    for entry in table.values():
        match = _GROUP_NAME.fullmatch(entry["name"])
        if match is None or entry["state"] == "REMOVED" or not unwanted(int(match[1])):
            continue
        # It may be gone since it was listed.
        with suppress(ValueError):
            remove_placement_group(get_placement_group(entry["name"]))


async def _answer(worker_id: str, reference: Awaitable[T]) -> T:
    """The answer of an actor.

    Raises:
        WorkerDiedError: it is dead, or could not do what it was asked to do.
    """
    try:
        return await reference
    except (RayActorError, RayTaskError) as error:
        raise WorkerDiedError(f"{worker_id}: {_first_line(error)}") from error


async def _answer_of_load(worker_id: str, reference: Awaitable[T]) -> T:
    """The answer of an actor to a call that makes it read files of the model.

    Raises:
        LoadFailedError: a file cannot be read, or is not the right one.
        WorkerDiedError: it is dead, or must not live on.
    """
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, _UNREADABLE):
            raise LoadFailedError(f"{worker_id} cannot load: {error.cause}") from error
        raise WorkerDiedError(f"{worker_id}: {_first_line(error)}") from error
    except RayActorError as error:
        raise WorkerDiedError(f"{worker_id}: {_first_line(error)}") from error


async def _described(name: str, actor: Any) -> Existing | None:
    """What a worker says of itself; None if it is gone, silent, or has nothing loaded.

    Raises:
        UnavailableError: it answers, but with an error each time.
    """
    for attempt in range(1, DESCRIBE_TRIES + 1):
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                return await actor.describe.remote()
        except RayTaskError as error:
            # First of all: a TimeoutError in the worker arrives as an error of both types.
            logger.warning("%s cannot describe itself: %s", name, _first_line(error))
            if attempt == DESCRIBE_TRIES:
                text = f"{name} does not say what it holds: {_first_line(error)}"
                raise UnavailableError(text, DESCRIBE_AGAIN_AFTER_S) from error
            await asyncio.sleep(DESCRIBE_AGAIN_AFTER_S)
        except (TimeoutError, RayActorError):
            return None
    raise AssertionError


async def _gone(reference: Awaitable[None]) -> None:
    try:
        await reference
    except (RayActorError, RayTaskError) as error:
        logger.info("a worker ended: %s", _first_line(error))


def _first_line(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__
