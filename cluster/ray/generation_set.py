"""The generations of workers on Ray: finds, starts, and ends them. `Generations` decides."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from milliways.cluster.control.changes import (
    Change,
    anew,
    differences,
    is_same_generation,
    refusal,
)
from milliways.cluster.control.fleet import Existing
from milliways.cluster.control.generations import Follower, Generations
from milliways.cluster.control.targets import number
from milliways.cluster.host.model_checks import check_files
from milliways.cluster.ray.fleet import generations_that_run, remove_groups
from milliways.cluster.ray.generation import RunningGeneration, room_beside
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.model.errors import ModelError
from milliways.wire.errors import ChangeRefusedError, PlacementError
from milliways.wire.placement import ModelBytes
from milliways.wire.status import GenerationStatus
from milliways.wire.view import EMPTY_VIEW, ClusterView, Declared, WorkerState

logger = logging.getLogger(__name__)


class RunningGenerations:
    """The generations by number, and which of them serves.

    Invariant: `running` has the generations that `lives` has; once it was begun, at least one.
    """

    def __init__(self) -> None:
        self.lives = Generations()
        self.running: dict[int, RunningGeneration] = {}
        # Why the last declaration was refused, or the last new generation given up.
        self.refused = ""
        # When the settings of the generation that was given up last were declared, and why it was.
        self._given_up: tuple[float, str] | None = None
        # The settings of the one generation that is about to start, and what checks and starts it.
        self._starting: tuple[Declared, asyncio.Task[RunningGeneration]] | None = None

    @property
    def serving(self) -> RunningGeneration:
        return self.running[self.lives.serving(now_s())]

    def of(self, values: Mapping[str, Any]) -> RunningGeneration | None:
        """The newest generation with these settings, as far as generations differ."""
        of_them = [g for _, g in sorted(self.running.items()) if g.has(values)]
        return of_them[-1] if of_them else None

    async def begin(self, config: ClusterConfig, first: Declared, known: ClusterView) -> None:
        """Goes on with the workers that there are; without any, starts the first generation.

        `first` are the settings of whoever starts the controller, `known` is the view that it has.
        """
        found: dict[RunningGeneration, list[Existing]] = {}
        try:
            # If its generation is missing, all of its workers died with the controller.
            for generation_number in sorted({*generations_that_run(), known.generation} - {0}):
                generation = RunningGeneration(generation_number, config)
                found[generation] = await generation.fleet.find_existing()
                if not (found[generation] or generation_number == known.generation):
                    generation.leave()
                    del found[generation]
            if not found:
                found[RunningGeneration(1, config)] = []
            # A generation that was about to start may have left some.
            numbers = {generation.number for generation in found}
            remove_groups(lambda generation_number: generation_number not in numbers)
            # Not earlier: as long as one worker may serve and does not answer, nothing begins.
            self._start_found(found, first, known)
        except BaseException:
            # The next try finds them again.
            for generation in found:
                generation.leave()
            raise
        if self.of(first.values) is None:
            changes = differences(self.serving.controller.declared.values, first.values)
            self.refused = needs_generation(anew(changes))

    def _start_found(
        self,
        found: Mapping[RunningGeneration, Sequence[Existing]],
        first: Declared,
        known: ClusterView,
    ) -> None:
        """Goes on with the generations that it can. The others have never served; they end.

        Raises:
            ModelError: no generation can go on.
        """
        faults: dict[RunningGeneration, ModelError] = {}
        for generation, existing in found.items():
            is_known = known.generation == generation.number
            try:
                generation.start(first, existing, known if is_known else EMPTY_VIEW)
            except ModelError as error:
                faults[generation] = error
        if len(faults) == len(found):
            raise next(iter(faults.values()))
        for generation, existing in found.items():
            if generation in faults:
                self.refused = f"generation {generation.number} ends: {faults[generation]}"
                logger.warning("%s", self.refused)
                generation.end(self.refused)
                continue
            self.running[generation.number] = generation
            was_found = bool(existing or known.members)
            self.lives.add(generation.number, now_s(), was_found=was_found)
            self.refused = self.refused or generation.refused

    def look(self) -> None:
        """Ends generations that nobody needs, and new ones that will not be complete."""
        for generation_number in self.lives.others(now_s()):
            generation = self.running[generation_number]
            is_new = generation_number > self.serving.number
            if is_new and (reason := generation.hopeless()):
                self.refused = (
                    f"generation {generation_number} was given up, and all is as before: {reason}"
                )
                self._given_up = (generation.controller.declared.at_s, self.refused)
                logger.warning("%s", self.refused)
                self._end(generation_number, self.refused)
        for generation_number in self.lives.due(now_s()):
            self._end(generation_number, f"generation {generation_number} ended: nobody needs it")

    def _end(self, generation_number: int, reason: str) -> None:
        logger.info("generation %d ends", generation_number)
        self.lives.remove(generation_number)
        generation = self.running.pop(generation_number)
        generation.end(reason)
        # Whoever waits for a change of it, or of the one that serves.
        generation.controller.changed.notify()
        self.serving.controller.changed.notify()

    async def prepare(self, declared: Declared, timeout_s: float) -> GenerationStatus:
        """As `ControllerActor.prepare`."""
        until_s = now_s() + timeout_s
        generation = self.of(declared.values)
        if generation is None:
            generation = await self._started(declared, timeout_s)
        elif declared.at_s > generation.controller.declared.at_s:
            self.check_same(generation, declared.values)
        if generation is None:
            return self._checking(declared)
        while not generation.ended:
            self.lives.want(generation.number, now_s())
            left_s = until_s - now_s()
            status = self.status_of(generation)
            # Of the one that serves, nobody waits for every worker.
            if status.is_complete or status.serves or left_s <= 0:
                return status
            await generation.changed(min(left_s, 1.0))
        raise ChangeRefusedError(generation.ended)

    def check_same(self, generation: RunningGeneration, values: Mapping[str, Any]) -> None:
        """Checks that a generation need not change for these settings, unless it serves.

        Raises:
            ChangeRefusedError: it would have to, while generations change.
        """
        own = generation.controller.declared.values
        if generation is not self.serving and differences(own, values):
            raise ChangeRefusedError(self.busy())

    def take(self, follower: Follower, generation: RunningGeneration) -> None:
        """Notes that an ingress replica has a generation, or waits until it may serve with it."""
        if follower.is_healthy:
            follower_id, values = follower.follower_id, follower.values
            self.lives.follow(generation.number, follower_id, now_s(), values)
        else:
            self.lives.want(generation.number, now_s())

    def unconfirmed(self) -> tuple[str, ...]:
        """Workers without the newest view, and ingress replicas that run with older settings."""
        controller, serving = self.serving.controller, self.serving.number
        outdated = self.lives.outdated_followers(serving, controller.declared.values, now_s())
        return (*controller.unconfirmed, *(f"ingress-{follower_id}" for follower_id in outdated))

    def abandon(self, values: Mapping[str, Any]) -> bool:
        """As `ControllerActor.abandon`. The one that serves does not end."""
        if self._starting is not None and is_same_generation(self._starting[0].values, values):
            self._starting[1].cancel()
        generation = self.of(values)
        if generation is None:
            return True
        if generation is self.serving or self.lives.is_followed(generation.number, now_s()):
            return False
        self._end(generation.number, f"generation {generation.number} was taken back")
        return True

    async def _started(self, declared: Declared, timeout_s: float) -> RunningGeneration | None:
        """The next generation; None if its files are still being checked after the timeout.

        Raises:
            ChangeRefusedError: it is impossible, or was given up.
        """
        if self._given_up is not None and declared.at_s == self._given_up[0]:
            raise ChangeRefusedError(self._given_up[1])
        if self._starting is None:
            starting = asyncio.get_running_loop().create_task(self._start_next(declared))
            starting.add_done_callback(self._note_start)
            self._starting = (declared, starting)
        wanted, starting = self._starting
        if differences(wanted.values, declared.values):
            raise ChangeRefusedError("the cluster is about to change to other workers")
        await asyncio.wait((starting,), timeout=timeout_s)
        if starting.cancelled():
            raise ChangeRefusedError("the new generation was taken back")
        return starting.result() if starting.done() else None

    def _note_start(self, starting: asyncio.Task[RunningGeneration]) -> None:
        self._starting = None
        if not starting.cancelled():
            # Whoever waited may have gone away: asyncio complains of errors that nobody takes.
            starting.exception()

    def _checking(self, declared: Declared) -> GenerationStatus:
        """The next generation, while the files of its model are checked."""
        return GenerationStatus(
            generation=self.lives.next_number,
            model=declared.values["model.path"],
            num_workers=declared.values["workers.count"],
            num_ready=0,
            is_complete=False,
            serves=False,
            text="the files of its model are checked",
        )

    async def _start_next(self, declared: Declared) -> RunningGeneration:
        config = changed(self.serving.config, declared.values)
        try:
            sizes, room = await self.check_new(config)
        except ChangeRefusedError as error:
            self.refused = str(error)
            raise
        self.refused = ""
        generation = RunningGeneration(self.lives.next_number, config)
        logger.info("generation %d starts: %s", generation.number, room)
        try:
            generation.start(declared, sizes=sizes)
        except ModelError as error:
            generation.shell.close()
            raise ChangeRefusedError(str(error)) from error
        self.running[generation.number] = generation
        self.lives.add(generation.number, now_s())
        self.serving.controller.changed.notify()
        return generation

    async def check_new(self, config: ClusterConfig) -> tuple[ModelBytes, str]:
        """Checks that a new generation is possible; returns the model's sizes, and the room.

        Raises:
            ChangeRefusedError: it is not; says why.
        """
        why = needs_generation(self._anew(config))
        try:
            sizes = await asyncio.to_thread(check_files, config.model)
            # Another change may have begun meanwhile.
            self._anew(config)
            return sizes, room_beside(self.serving.controller, config, sizes)
        except (ModelError, PlacementError) as error:
            raise ChangeRefusedError(f"{why}, and: {error}") from error

    def _anew(self, config: ClusterConfig) -> tuple[Change, ...]:
        """The changes that need a new generation.

        Raises:
            ChangeRefusedError: some changes are impossible, or are while another change goes on.
        """
        present = self.serving.controller
        changes = differences(present.declared.values, flat(config))
        reason = refusal(changes, len(present.workers)) or self.busy()
        if not reason and present.is_changing:
            reason = "another change of the cluster goes on; ask again when it is done"
        if reason:
            raise ChangeRefusedError(reason)
        return anew(changes)

    def busy(self) -> str:
        """Why nothing else can change while generations change; empty if none do."""
        others = self.others()
        return f"the cluster changes to other workers: {'; '.join(others)}" if others else ""

    def others(self) -> list[str]:
        """What is to become of the generations that do not serve, as texts for people."""
        serving, texts = self.serving, list[str]()
        for generation_number in self.lives.others(now_s()):
            other = self.running[generation_number]
            text = f"generation {generation_number} {self.status_of(other).text}"
            before, after = serving.controller.declared.values, other.controller.declared.values
            if generation_number > serving.number:
                values = (change.values for change in anew(differences(before, after)))
                text = f"{'; '.join(values)}: {text}"
            texts.append(text)
        return texts

    def status(self) -> tuple[GenerationStatus, ...]:
        """Each generation, by number."""
        return tuple(self.status_of(generation) for _, generation in sorted(self.running.items()))

    def status_of(self, generation: RunningGeneration) -> GenerationStatus:
        """What becomes of a generation, and how far it is."""
        controller = generation.controller
        records = sorted(controller.workers.values(), key=number)
        serves = generation is self.serving
        waits = [
            f"{record.worker_id} waits for {controller.waits_for(record)}"
            for record in records
            if record.waits_for
        ]
        if serves:
            text = "serves"
        elif generation.number < self.serving.number:
            text = "ends when its requests have ended"
        elif controller.all_ready:
            text = "is complete, and has no ingress yet"
        else:
            text = f"starts: {'; '.join(waits)}" if waits else "starts"
        return GenerationStatus(
            generation=generation.number,
            model=generation.config.model.path,
            num_workers=len(records),
            num_ready=sum(record.state is WorkerState.READY for record in records),
            is_complete=controller.is_complete if serves else controller.all_ready,
            serves=serves,
            text=text,
        )

    def end_all(self) -> None:
        """Ends all workers; the cluster ends."""
        for generation in self.running.values():
            generation.end("the cluster ends")


def now_s() -> float:
    """The time by which generations live."""
    return time.monotonic()


def needs_generation(changes: Sequence[Change]) -> str:
    """That some changes need a new generation, in words."""
    return f"needs a new generation: {'; '.join(change.values for change in changes)}"
