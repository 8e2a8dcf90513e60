"""The controller as a Ray actor: one for the cluster, detached, off the path of every token."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from milliways.cluster.control.changes import differences, refusal
from milliways.cluster.control.controller import Controller
from milliways.cluster.control.fleet import Existing
from milliways.cluster.control.targets import make_settings, number
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.cluster.host.model_bytes import checkpoint_bytes, kv_tokens_of
from milliways.cluster.ray.fleet import RayFleet
from milliways.cluster.settings.config import ClusterConfig, ModelSettings, WorkerSettings
from milliways.cluster.settings.names import changed, flat
from milliways.model.checkpoint import Checkpoint
from milliways.model.manifest import EMPTY_MANIFEST, read_manifest
from milliways.model.model_dir import resolve_model_dir
from milliways.runtime.async_tasks import AsyncTasks
from milliways.runtime.fatal import end_process
from milliways.wire.errors import ChangeRefusedError, UnavailableError
from milliways.wire.placement import ModelBytes
from milliways.wire.status import ClusterStatus, ProcessStatus, SettingsStatus, WorkerStatus
from milliways.wire.view import EMPTY_VIEW, ClusterView, Declared, WorkerState

logger = logging.getLogger(__name__)

VIEW_POLL_S = 5.0
# Finding workers that do not answer takes seconds for each.
BEGIN_TIMEOUT_S = 25.0
STATUS_TIMEOUT_S = 5.0
_VALUE_BYTES = {"float32": 4, "bfloat16": 2}


class ControllerActor:
    """What commands and the ingress ask. `Controller` decides.

    Everything runs in this actor's asyncio loop.
    """

    def __init__(self, config: ClusterConfig, declared_at_s: float = 0.0) -> None:
        self._config = config
        # Later than what nobody declared.
        self._first = Declared(values=flat(config), at_s=max(declared_at_s, 1.0))
        # Why the last declaration was refused.
        self._refused = ""
        self._num_sharing = config.workers.count
        self._started_at_s = time.time()
        self._shell: AsyncTasks | None = None
        self._has_begun = asyncio.Event()

    async def begin(self, known: ClusterView = EMPTY_VIEW) -> None:
        """Starts the cluster, or continues from the view that the caller knows; does so once."""
        if self._shell is not None:
            await self._has_begun.wait()
            return
        self._shell = AsyncTasks(end_process)
        try:
            await self._begin(self._shell, known)
        except BaseException:
            # Otherwise callers would wait for ever for a beginning that failed.
            self._shell = None
            raise
        self._shell.kick()
        self._has_begun.set()

    async def _begin(self, shell: AsyncTasks, known: ClusterView) -> None:
        self._fleet = RayFleet(self._config, shell)
        existing = await self._fleet.find_existing()
        config, declared = self._settings_to_go_on_with(known, existing)
        pinned = EMPTY_MANIFEST
        if config.model.manifest:
            pinned = read_manifest(Path(config.model.manifest))
        model = _sizes([known, *(found.view for found in existing)]) or _read_sizes(config.model)
        self._fleet.sizes = model
        workers = config.workers
        settings = make_settings(
            workers.count,
            workers.expert_replicas,
            workers.attention,
            kv_tokens_of(workers, model.sequence_len),
            start_timeout_s=workers.start_timeout_s,
            experts_only=workers.experts_only,
            default_kv_tokens=kv_tokens_of(WorkerSettings(), model.sequence_len),
        )
        self._controller = Controller(model, settings, self._fleet, shell.tasks, pinned)
        self._set_config(config)
        self._controller.declare(declared)
        self._controller.start(existing, known)

    def _settings_to_go_on_with(
        self, known: ClusterView, existing: Sequence[Existing]
    ) -> tuple[ClusterConfig, Declared]:
        """The newest settings that the workers can take, as settings and as declaration."""
        for found in existing:
            # Workers share the machine's memory as they did at first.
            self._num_sharing = found.settings.get("workers.count", self._num_sharing)
        views = [known, *(found.view for found in existing)]
        before = max((view.declared for view in views), key=lambda declared: declared.at_s)
        reason = refusal(differences(before.values, self._first.values), len(known.members))
        if before.at_s <= self._first.at_s:
            if not reason:
                return self._config, self._first
            self._refused = reason
        return changed(self._config, before.values), before

    def _set_config(self, config: ClusterConfig) -> None:
        """Takes settings; workers that start from now on have them."""
        self._config = config
        workers = config.workers
        least = max(self._num_sharing, workers.expert_replicas, workers.experts_only + 1)
        self._fleet.config = changed(config, {"workers.count": least})

    async def plan(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """How the cluster would take these settings, in words; those of them that are other ones.

        Raises:
            ChangeRefusedError: it cannot take them; says which, and why.
            ConfigError: they do not go with the present ones.
        """
        controller = await self._begun()
        wanted = flat(changed(self._config, values))
        if reason := controller.refusal(wanted):
            raise ChangeRefusedError(reason)
        return tuple(map(str, differences(controller.declared.values, wanted)))

    async def apply(self, values: Mapping[str, Any]) -> Declared:
        """Takes other values for some settings; returns all that is declared then.

        Raises: as `plan`.
        """
        controller = await self._begun()
        return await self.declare(controller.declared.with_values(values, time.time()))

    async def declare(self, declared: Declared) -> Declared:
        """Takes settings, unless later ones were declared; returns those that count.

        Raises: as `plan`.
        """
        controller = await self._begun()
        if declared.at_s > controller.declared.at_s:
            config = changed(self._config, declared.values)
            if reason := controller.refusal(flat(config)):
                self._refused = reason
                raise ChangeRefusedError(reason)
            self._refused = ""
            self._set_config(config)
            controller.declare(declared)
            assert self._shell is not None
            # Nothing arrived that would run its tasks.
            self._shell.kick()
        return controller.declared

    async def settle(self, at_s: float, timeout_s: float) -> SettingsStatus:
        """The state of the settings that were declared then, as soon as everything is so or fails.

        It returns after the timeout in any case.
        """
        controller = await self._begun()
        until_s = time.monotonic() + timeout_s
        while controller.declared.at_s <= at_s and not controller.reconciler.settled():
            left_s = until_s - time.monotonic()
            if controller.reconciler.problem or left_s <= 0:
                break
            await self._changed(min(left_s, VIEW_POLL_S))
        return self._settings_status(controller)

    def _settings_status(self, controller: Controller) -> SettingsStatus:
        records = controller.workers.values()
        num_ready = sum(record.state is WorkerState.READY for record in records)
        return SettingsStatus(
            declared=dict(controller.declared.values),
            declared_at_s=controller.declared.at_s,
            observed={"workers.count": num_ready},
            pending=tuple(controller.pending),
            by_worker=controller.by_worker,
            unconfirmed=controller.unconfirmed,
            problem=controller.reconciler.problem or self._refused,
        )

    async def _begun(self) -> Controller:
        """The controller. One that was just started has to find its workers first.

        Raises:
            UnavailableError: it takes too long.
        """
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT_S):
                await self._has_begun.wait()
        except TimeoutError:
            raise UnavailableError("the controller has not begun") from None
        return self._controller

    async def config(self) -> ClusterConfig:
        return self._config

    async def whereabouts(self) -> tuple[str, int]:
        """The node and the process of the controller itself."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def view(self, known_epoch: int, timeout_s: float) -> ClusterView:
        """The view, as soon as it is newer than the known one, or after the timeout."""
        controller = await self._begun()
        controller.overtake(known_epoch)
        until_s = time.monotonic() + timeout_s
        while controller.view.placement_epoch <= known_epoch:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not await self._changed(left_s):
                break
        return controller.view

    async def progress(self) -> dict[str, Any]:
        """How far the start is: what each worker waits for, and how many bytes it has read."""
        controller = await self._begun()
        # Before the workers are asked, which takes time: what is complete shows every worker ready.
        is_complete = controller.is_complete and all(
            record.state is WorkerState.READY for record in controller.workers.values()
        )
        workers = await asyncio.gather(
            *(self._progress_of(record) for record in controller.workers.values())
        )
        failure = controller.failure
        return {
            "is_complete": is_complete,
            "failure": str(failure) if failure else "",
            "workers": workers,
        }

    async def status(self) -> ClusterStatus:
        """Everything that `milliways status` shows."""
        controller = await self._begun()
        records = sorted(controller.workers.values(), key=number)
        workers = await asyncio.gather(*(self._status_of(record) for record in records))
        return ClusterStatus(
            model=self._config.model.path,
            placement_epoch=controller.view.placement_epoch,
            is_complete=controller.is_complete,
            uptime_s=round(time.time() - self._started_at_s, 1),
            deaths=controller.figures.num_deaths,
            controller_pid=os.getpid(),
            settings=self._settings_status(controller),
            workers=tuple(workers),
        )

    async def scale(self, num_workers: int) -> None:
        """Grows or shrinks; returns when the new placement is served.

        A step that goes on already, such as one that a new controller takes, is waited for.
        """
        controller = await self._idle()
        assert self._shell is not None
        await self._shell.wait(controller.scale(num_workers, time.time()))

    async def drain(self, worker_id: str, restarts: bool) -> None:
        """Moves a worker's work away, then stops or restarts it; returns when that is done."""
        controller = await self._idle()
        assert self._shell is not None
        task = controller.drain(worker_id, restarts=restarts, now_s=time.time())
        await self._shell.wait(task)
        while restarts and controller.workers[worker_id].state is not WorkerState.READY:
            await self._changed(VIEW_POLL_S)

    async def finish_drain(self, worker_id: str, restarts: bool, incarnation: int) -> None:
        """Completes what an earlier controller was to do with this incarnation of a worker."""
        controller = await self._idle()
        while (record := controller.workers.get(worker_id)) is not None:
            if record.state is WorkerState.STOPPED:
                return
            if record.state is WorkerState.READY:
                if not (restarts and record.incarnation > incarnation):
                    await self.drain(worker_id, restarts)
                return
            await self._changed(VIEW_POLL_S)

    async def incarnation_of(self, worker_id: str) -> int:
        """The present incarnation of a worker; 0 if there is no such worker."""
        record = (await self._begun()).workers.get(worker_id)
        return record.incarnation if record is not None else 0

    async def _idle(self) -> Controller:
        """The controller, once the steps of a change that it takes by itself are done."""
        controller = await self._begun()
        while controller.reconciler.is_stepping:
            await self._changed(VIEW_POLL_S)
        return controller

    async def stop(self) -> None:
        """Kills all workers; the cluster ends."""
        if self._shell is not None:
            self._controller.close()
            self._fleet.stop_all()

    async def _changed(self, timeout_s: float) -> bool:
        assert self._shell is not None
        changed = asyncio.Event()
        self._controller.changed.wait().when_done(changed.set)
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return False
        return True

    async def _progress_of(self, record: WorkerRecord) -> dict[str, Any]:
        bytes_read = bytes_wanted = 0
        if record.spawned is not None and record.state is not WorkerState.LOST:
            try:
                async with asyncio.timeout(2.0):
                    bytes_read, bytes_wanted = await self._fleet.progress(record.worker_id)
            except Exception:
                # It may die while it is asked; the next progress says so.
                pass
        return {
            "worker_id": record.worker_id,
            "state": record.state.value,
            "has_process": record.spawned is not None,
            "waits_for": self._controller.waits_for(record),
            "bytes_read": bytes_read,
            "bytes_wanted": bytes_wanted,
            "last_error": record.last_error,
        }

    async def _status_of(self, record: WorkerRecord) -> WorkerStatus:
        process: ProcessStatus | None = None
        last_error = record.last_error
        if record.state in (WorkerState.READY, WorkerState.DRAINING):
            try:
                async with asyncio.timeout(STATUS_TIMEOUT_S):
                    process = await self._fleet.status(record.worker_id)
            except Exception as error:
                # It may die while it is asked, or be busy. Neither is for a question to judge.
                last_error = f"it does not answer: {error}"
        return status_of(record, self._controller.waits_for(record), last_error, process)


def _sizes(views: Sequence[ClusterView]) -> ModelBytes | None:
    """The sizes of the model that runs; None if nothing runs yet.

    They are not read again: the files may be unreadable now, or those of another model.
    """
    return max(views, key=lambda view: view.placement_epoch).model


def _read_sizes(settings: ModelSettings) -> ModelBytes:
    """The sizes of a model, from its files.

    Raises:
        CheckpointError, ModelConfigError: a file is unreadable or invalid; says which and why.
    """
    with Checkpoint.open(resolve_model_dir(settings.path)) as checkpoint:
        return checkpoint_bytes(checkpoint, _VALUE_BYTES[settings.dtype])


def status_of(
    record: WorkerRecord, waits_for: str, last_error: str, process: ProcessStatus | None
) -> WorkerStatus:
    """A worker as the controller knows it, with what it says itself."""
    member = record.member()
    return WorkerStatus(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        pid=member.pid,
        state=record.state.value,
        process=process,
        role=_role(record),
        node=member.node_id,
        address=member.address,
        router_address=member.router_address,
        waits_for=waits_for,
        last_error=last_error,
        quick_deaths=record.num_quick_deaths,
        experts=tuple(sorted((e.layer, e.expert) for e in record.held)),
    )


def _role(record: WorkerRecord) -> str:
    if record.shards is None:
        return "none yet"
    parts = ["attention"] if record.shards.num_layers else []
    parts += ["router"] if record.shards.has_ends else []
    parts += ["experts"] if record.held else []
    return "+".join(parts) or "spare"
