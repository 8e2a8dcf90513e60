"""The controller as a Ray actor: one for the cluster, detached, off the path of every token.

It has a `Controller` for each generation of workers. Of these there is one, and two while the
cluster changes to other workers (`control/generations.py`). Commands ask about the one that serves.
"""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray

from milliways.cluster.control.changes import anew, differences
from milliways.cluster.control.controller import Controller
from milliways.cluster.control.generations import Follower
from milliways.cluster.control.targets import number
from milliways.cluster.ray.generation import RunningGeneration
from milliways.cluster.ray.generation_set import RunningGenerations, needs_generation
from milliways.cluster.ray.worker_reports import ask_status, progress_of
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.model.small_files import SmallFiles
from milliways.runtime.fatal import end_process
from milliways.wire.errors import ChangeRefusedError, UnavailableError
from milliways.wire.status import (
    ClusterStatus,
    GenerationStatus,
    SettingsStatus,
)
from milliways.wire.view import EMPTY_VIEW, ClusterView, Declared, WorkerState

logger = logging.getLogger(__name__)

VIEW_POLL_S = 5.0
# Finding workers that do not answer takes seconds for each.
BEGIN_TIMEOUT_S = 25.0
# How often generations are looked at.
LOOK_PERIOD_S = 0.5


class ControllerActor:
    """What commands and the ingress ask. `Controller` and `Generations` decide.

    Everything runs in this actor's asyncio loop.
    """

    def __init__(self, config: ClusterConfig, declared_at_s: float = 0.0) -> None:
        self._first_config = config
        # Later than what nobody declared.
        self._first = Declared(values=flat(config), at_s=max(declared_at_s, 1.0))
        self._started_at_s = time.time()
        self._all = RunningGenerations()
        self._is_beginning = False
        self._has_begun = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def begin(self, known: ClusterView = EMPTY_VIEW) -> None:
        """Starts the cluster, or continues from the view that the caller knows; does so once."""
        if self._is_beginning:
            await self._has_begun.wait()
            return
        self._is_beginning = True
        try:
            await self._all.begin(self._first_config, self._first, known)
        except BaseException:
            # Otherwise callers would wait for ever for a beginning that failed.
            self._is_beginning = False
            raise
        self._has_begun.set()
        self._looking = asyncio.get_running_loop().create_task(self._look_again_and_again())

    async def _look_again_and_again(self) -> None:
        """Ends generations that nobody needs, and new ones that will not be complete."""
        try:
            while True:
                await asyncio.sleep(LOOK_PERIOD_S)
                self._all.look()
        except Exception as error:
            # Like every service: the next controller goes on.
            end_process(error)

    async def plan(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """How the cluster would take these settings, in words; those of them that are other ones.

        Raises:
            ChangeRefusedError: it cannot take them; says which, and why.
            ConfigError: they do not go with the present ones.
        """
        await self._begun()
        serving = self._all.serving
        config = changed(serving.config, values)
        wanted = flat(config)
        changes = differences(serving.controller.declared.values, wanted)
        lines = tuple(map(str, changes))
        if not anew(changes):
            reason = self._all.busy() if changes else ""
            if reason := reason or serving.controller.refusal(wanted):
                raise ChangeRefusedError(reason)
            return lines
        if (found := self._all.of(wanted)) is not None:
            self._all.check_same(found, wanted)
            return lines
        _, room = await self._all.check_new(config)
        return (*lines, room)

    async def apply(self, values: Mapping[str, Any]) -> Declared:
        """Takes other values for some settings; returns all that is declared then.

        Raises: as `plan`.
        """
        controller = await self._begun()
        return await self.declare(controller.declared.with_values(values, time.time()))

    async def declare(self, declared: Declared) -> Declared:
        """Takes settings, unless later ones were declared; returns those that count.

        A new generation is not started: it must be prepared before.

        Raises: as `plan`.
        """
        await self._begun()
        generation = self._all.of(declared.values)
        if generation is None:
            present = self._all.serving.controller.declared
            if declared.at_s <= present.at_s:
                return present
            reason = needs_generation(anew(differences(present.values, declared.values)))
            raise ChangeRefusedError(reason)
        controller = generation.controller
        changes = differences(controller.declared.values, declared.values)
        try:
            is_later = declared.at_s > controller.declared.at_s
            if is_later and changes and (reason := self._all.busy()):
                raise ChangeRefusedError(reason)
            generation.declare(declared)
        except ChangeRefusedError as error:
            self._all.refused = str(error)
            raise
        self._all.refused = ""
        return controller.declared

    async def prepare(self, declared: Declared, timeout_s: float) -> GenerationStatus:
        """The generation with these settings, as soon as it is complete, or after the timeout.

        If there is none, it is started, provided that it has room. It lives as long as somebody
        asks for it at least every minute, or has an ingress.

        Raises:
            ChangeRefusedError: it has no room, or cannot be complete. All is as before.
            ConfigError: the settings do not go together.
        """
        await self._begun()
        return await self._all.prepare(declared, timeout_s)

    async def abandon(self, values: Mapping[str, Any]) -> bool:
        """Ends the generation with these settings at once, if no ingress follows it.

        Returns whether there is none any more.
        """
        await self._begun()
        return self._all.abandon(values)

    async def settle(self, at_s: float, timeout_s: float) -> SettingsStatus:
        """The state of the settings that were declared then, as soon as everything is so or fails.

        It returns after the timeout in any case.
        """
        await self._begun()
        until_s = time.monotonic() + timeout_s
        while True:
            generation = self._all.serving
            controller = generation.controller
            is_so = controller.reconciler.settled() and not self._all.others()
            left_s = until_s - time.monotonic()
            if controller.declared.at_s > at_s or is_so:
                break
            if controller.reconciler.problem or left_s <= 0:
                break
            await generation.changed(min(left_s, VIEW_POLL_S))
        return self._settings_status(controller)

    def _settings_status(self, controller: Controller) -> SettingsStatus:
        records = controller.workers.values()
        num_ready = sum(record.state is WorkerState.READY for record in records)
        return SettingsStatus(
            declared=dict(controller.declared.values),
            declared_at_s=controller.declared.at_s,
            observed={"workers.count": num_ready},
            pending=(*controller.pending, *self._all.others()),
            by_worker=controller.by_worker,
            unconfirmed=self._all.unconfirmed(),
            problem=controller.reconciler.problem or self._all.refused,
        )

    async def _begun(self) -> Controller:
        """The controller that serves. One that was just started has to find its workers first.

        Raises:
            UnavailableError: it takes too long.
        """
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT_S):
                await self._has_begun.wait()
        except TimeoutError:
            raise UnavailableError("the controller has not begun") from None
        return self._all.serving.controller

    async def config(self) -> ClusterConfig:
        return self._all.serving.config if self._all.running else self._first_config

    async def small_files(self, values: Mapping[str, Any]) -> SmallFiles | None:
        """Configuration, tokenizer and template, as workers with these settings have read them.

        None if there are no such workers, or none has read them yet.
        """
        await self._begun()
        generation = self._all.of(values)
        return generation.controller.small_files if generation is not None else None

    async def whereabouts(self) -> tuple[str, int]:
        """The node and the process of the controller itself."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def view(
        self, known_epoch: int, timeout_s: float, follower: Follower | None = None
    ) -> ClusterView:
        """The view, as soon as it is newer than the known one, or after the timeout.

        A follower gets the view of the generation that has its settings; if there is none, that of
        the generation that serves, like those who are no followers.
        """
        await self._begun()
        generation = self._all.of(follower.values) if follower is not None else None
        if follower is not None and generation is not None:
            self._all.take(follower, generation)
        generation = generation or self._all.serving
        if follower is not None and follower.generation != generation.number:
            # It knows no view of this generation.
            known_epoch = min(known_epoch, 0)
        controller = generation.controller
        controller.overtake(known_epoch)
        until_s = time.monotonic() + timeout_s
        while controller.view.placement_epoch <= known_epoch:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not await generation.changed(left_s):
                break
        return controller.view

    async def unfollow(self, follower_id: str) -> None:
        """An ingress replica has nothing left to do: nobody need wait for it."""
        self._all.lives.unfollow(follower_id)

    async def progress(self) -> dict[str, Any]:
        """How far the start is: what each worker waits for, and how many bytes it has read."""
        controller = await self._begun()
        # Before the workers are asked, which takes time: what is complete shows every worker ready.
        is_complete = controller.all_ready
        generation = self._all.serving
        workers = await asyncio.gather(
            *(progress_of(generation, record) for record in controller.workers.values())
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
        generation = self._all.serving
        records = sorted(controller.workers.values(), key=number)
        workers = await asyncio.gather(*(ask_status(generation, record) for record in records))
        return ClusterStatus(
            model=generation.config.model.path,
            placement_epoch=controller.view.placement_epoch,
            is_complete=controller.is_complete,
            uptime_s=round(time.time() - self._started_at_s, 1),
            deaths=controller.figures.num_deaths,
            controller_pid=os.getpid(),
            settings=self._settings_status(controller),
            workers=tuple(workers),
            generation=generation.number,
            generations=self._all.status(),
        )

    async def scale(self, num_workers: int) -> None:
        """Grows or shrinks; returns when the new placement is served.

        A step that goes on already, such as one that a new controller takes, is waited for.
        """
        generation = await self._idle()
        if busy := self._all.busy():
            raise ChangeRefusedError(busy)
        await generation.done(generation.controller.scale(num_workers, time.time()))

    async def drain(self, worker_id: str, restarts: bool) -> None:
        """Moves a worker's work away, then stops or restarts it; returns when that is done."""
        generation = await self._idle()
        if not restarts and (busy := self._all.busy()):
            raise ChangeRefusedError(busy)
        controller = generation.controller
        task = controller.drain(worker_id, restarts=restarts, now_s=time.time())
        await generation.done(task)
        if restarts:
            ready = WorkerState.READY
            await generation.until(lambda: controller.workers[worker_id].state is ready)

    async def finish_drain(self, worker_id: str, restarts: bool, incarnation: int) -> None:
        """Completes what an earlier controller was to do with this incarnation of a worker."""
        generation = await self._idle()
        workers, steady = generation.controller.workers, (WorkerState.READY, WorkerState.STOPPED)
        await generation.until(
            lambda: worker_id not in workers or workers[worker_id].state in steady
        )
        record = workers.get(worker_id)
        if record is None or record.state is WorkerState.STOPPED:
            return
        if not (restarts and record.incarnation > incarnation):
            await self.drain(worker_id, restarts)

    async def incarnation_of(self, worker_id: str) -> int:
        """The present incarnation of a worker; 0 if there is no such worker."""
        record = (await self._begun()).workers.get(worker_id)
        return record.incarnation if record is not None else 0

    async def _idle(self) -> RunningGeneration:
        """The generation that serves, once the steps that it takes by itself are done."""
        await self._begun()
        generation = self._all.serving
        reconciler = generation.controller.reconciler
        await generation.until(lambda: not reconciler.is_stepping)
        return generation

    async def stop(self) -> None:
        """Kills all workers; the cluster ends."""
        if self._looking is not None:
            self._looking.cancel()
        self._all.end_all()
