"""A generation of workers on Ray: its fleet, and the controller that decides for it."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ray
from ray._private.state import available_resources_per_node

from milliways.cluster.control.changes import differences, is_same_generation, refusal
from milliways.cluster.control.controller import Controller
from milliways.cluster.control.fleet import Existing
from milliways.cluster.control.room import NodeRoom, check_room
from milliways.cluster.control.targets import ControllerSettings, make_settings
from milliways.cluster.host.memory_limit import USABLE_PART
from milliways.cluster.host.model_bytes import kv_tokens_of
from milliways.cluster.host.model_checks import read_sizes
from milliways.cluster.ray.fleet import RayFleet
from milliways.cluster.ray.start_worker import resources_of
from milliways.cluster.settings.config import ClusterConfig, WorkerSettings
from milliways.cluster.settings.names import changed, flat
from milliways.model.manifest import EMPTY_MANIFEST, read_manifest
from milliways.runtime.async_tasks import AsyncTasks
from milliways.runtime.fatal import end_process
from milliways.runtime.tasks import Pending
from milliways.wire.errors import ChangeRefusedError
from milliways.wire.placement import BYTES_PER_GB, ModelBytes
from milliways.wire.view import EMPTY_VIEW, ClusterView, Declared

# How often is looked for what nobody notifies.
POLL_S = 5.0


class RunningGeneration:
    """The workers of one generation. `controller` is there once it was started.

    Everything runs in the loop in which it was made.
    """

    controller: Controller

    def __init__(self, number: int, config: ClusterConfig) -> None:
        self.number = number
        self.config = config
        # Why it did not take the settings with which it was started.
        self.refused = ""
        # Why it has ended; empty as long as it has not.
        self.ended = ""
        self.shell = AsyncTasks(end_process)
        self.fleet = RayFleet(config, self.shell, number)
        self._num_sharing = config.workers.count
        # Since when it is not complete, as far as `hopeless` has looked.
        self._waits_since_s = self.shell.tasks.clock.now_s()

    def start(
        self,
        first: Declared,
        existing: Sequence[Existing] = (),
        known: ClusterView = EMPTY_VIEW,
        sizes: ModelBytes | None = None,
    ) -> None:
        """Starts the controller: of new workers, or of those that an earlier controller left.

        `first` has the settings of whoever starts it, `known` the view that it knows; these count
        only if they are of this generation. `sizes` are those of the model's parts, if known.

        Raises:
            CheckpointError, ModelConfigError, ManifestError: a file of the model cannot be read.
        """
        views = [view for view in (known, *(found.view for found in existing)) if view.members]
        declared = self._settings_to_go_on_with(first, views, existing)
        newest = max(views, key=lambda view: view.placement_epoch, default=EMPTY_VIEW)
        config = changed(self.config, declared.values)
        # Of a model that runs no file is read again: it may be unreadable now, or another one.
        model = sizes or newest.model or read_sizes(config.model)
        pinned = EMPTY_MANIFEST
        if config.model.manifest and not newest.manifest_is_whole:
            pinned = read_manifest(Path(config.model.manifest))
        self.fleet.sizes = model
        self.controller = Controller(
            model, settings_of(config, model), self.fleet, self.shell.tasks, pinned, self.number
        )
        self._set_config(config)
        self.controller.declare(declared)
        self.controller.start(existing, known if known.members else EMPTY_VIEW)
        self.shell.kick()

    def has(self, values: Mapping[str, object]) -> bool:
        """Whether these settings are those of this generation, as far as generations differ."""
        return is_same_generation(self.controller.declared.values, values)

    def declare(self, declared: Declared) -> None:
        """Takes settings, unless later ones were declared.

        Raises:
            ChangeRefusedError: its workers cannot take them; says which, and why.
            ConfigError: they do not go together.
        """
        if declared.at_s <= self.controller.declared.at_s:
            return
        config = changed(self.config, declared.values)
        if reason := self.controller.refusal(flat(config)):
            raise ChangeRefusedError(reason)
        self._set_config(config)
        self.controller.declare(declared)
        # Nothing arrived that would run its tasks.
        self.shell.kick()

    def hopeless(self) -> str:
        """Why it will not be complete; empty as long as it may be."""
        now_s = self.shell.tasks.clock.now_s()
        if self.controller.all_ready:
            self._waits_since_s = now_s
            return ""
        waited_s = now_s - self._waits_since_s
        return self.controller.hopeless(waited_s, self.config.workers.load_timeout_s)

    async def changed(self, timeout_s: float) -> bool:
        """Waits until something changes; whether it does within this time."""
        changed, change = asyncio.Event(), self.controller.changed.wait()
        change.when_done(changed.set)
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return False
        finally:
            # A cluster at rest is asked again and again.
            change.forget(changed.set)
        return True

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits until something is so.

        Raises:
            ChangeRefusedError: the generation ends meanwhile; says why.
        """
        while not self.ended:
            if holds():
                return
            await self.changed(POLL_S)
        raise ChangeRefusedError(self.ended)

    async def done(self, change: Pending[None]) -> None:
        """Waits for a change that its controller makes.

        Raises:
            ChangeRefusedError: the generation ends meanwhile.
            ClusterError: the change failed.
        """
        change.when_done(self.controller.changed.notify)
        self.shell.kick()
        await self.until(lambda: change.is_done)
        change.result()

    def leave(self) -> None:
        """Decides nothing any more. Its workers go on."""
        self.shell.close()

    def end(self, reason: str) -> None:
        """Ends all of its workers, at once, and gives back what they took of nodes."""
        self.ended = reason
        self.shell.close()
        self.fleet.stop_all()

    def _set_config(self, config: ClusterConfig) -> None:
        """Takes settings; workers that start from now on have them."""
        self.config = config
        workers = config.workers
        least = max(self._num_sharing, workers.expert_replicas, workers.experts_only + 1)
        self.fleet.config = changed(config, {"workers.count": least})

    def _settings_to_go_on_with(
        self, first: Declared, views: Sequence[ClusterView], existing: Sequence[Existing]
    ) -> Declared:
        """The newest settings that the workers can take."""
        declared = [view.declared for view in views]
        for found in existing:
            # Workers share the machine's memory as they did at first.
            self._num_sharing = found.settings.get("workers.count", self._num_sharing)
            # It may have got no view yet. Whatever was declared counts more.
            declared.append(Declared().with_values(found.settings))
        if not declared:
            return first
        before = max(declared, key=lambda d: d.at_s)
        if not is_same_generation(before.values, first.values) or first.at_s < before.at_s:
            return before
        num_workers = max((len(view.members) for view in views), default=0)
        self.refused = refusal(differences(before.values, first.values), num_workers)
        return before if self.refused else first


def settings_of(config: ClusterConfig, model: ModelBytes) -> ControllerSettings:
    """Settings of the controller from those of the cluster."""
    workers = config.workers
    return make_settings(
        workers.count,
        workers.expert_replicas,
        workers.attention,
        kv_tokens_of(workers, model.sequence_len),
        start_timeout_s=workers.start_timeout_s,
        experts_only=workers.experts_only,
        default_kv_tokens=kv_tokens_of(WorkerSettings(), model.sequence_len),
    )


def room_beside(present: Controller, config: ClusterConfig, model: ModelBytes) -> str:
    """The room that workers with these settings have beside the present ones, for people.

    Raises:
        PlacementError: there is none; says what is short.
    """
    workers = config.workers
    return check_room(
        model,
        settings_of(config, model),
        [resources_of(workers, f"worker-{number}") for number in range(workers.count)],
        nodes_with_room(present.used_bytes()),
        limit_bytes=round(workers.memory_gb_each * BYTES_PER_GB),
        on_gpus=workers.gpus_each > 0,
    )


def nodes_with_room(used_bytes: Mapping[str, int]) -> list[NodeRoom]:
    """What the nodes of the Ray cluster have left; `used_bytes` is what workers use, by node."""
    nodes: list[NodeRoom] = []
    alive: list[dict[str, object]] = ray.nodes()
    names = {str(node["NodeID"]) for node in alive if node["Alive"]}
    for node_id, free in available_resources_per_node().items():
        if node_id in names:
            memory_bytes = round(USABLE_PART * free.get("memory", 0.0))
            used = used_bytes.get(node_id, 0)
            nodes.append(NodeRoom(node_id, free, memory_bytes, used))
    return nodes
