"""The generations of workers on Ray: finds, starts, and ends them. `Generations` decides."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from milliways.cluster.control.changes import Change, anew, differences, refusal
from milliways.cluster.control.fleet import Existing
from milliways.cluster.control.generations import Generations
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
        # The declaration whose generation was given up last.
        self._given_up_at_s = 0.0
        # One new generation at a time.
        self._starting = asyncio.Lock()

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
        found: list[tuple[RunningGeneration, list[Existing]]] = []
        for generation_number in generations_that_run():
            generation = RunningGeneration(generation_number, config)
            existing = await generation.fleet.find_existing()
            if existing:
                found.append((generation, existing))
        newest = max((generation.number for generation, _ in found), default=0)
        if known.generation > newest:
            # All of its workers died with the controller.
            found.append((RunningGeneration(known.generation, config), []))
        if not found:
            found.append((RunningGeneration(1, config), []))
        # Not earlier: as long as one worker may serve and does not answer, nothing begins.
        for generation, existing in found:
            is_known = known.generation == generation.number
            generation.start(first, existing, known if is_known else EMPTY_VIEW)
            self.running[generation.number] = generation
            was_found = bool(existing or known.members)
            self.lives.add(generation.number, now_s(), was_found=was_found)
            self.refused = self.refused or generation.refused
        # A generation that was about to start may have left some.
        remove_groups(lambda generation_number: generation_number not in self.running)
        if self.of(first.values) is None:
            changes = differences(self.serving.controller.declared.values, first.values)
            self.refused = needs_generation(anew(changes))

    def look(self) -> None:
        """Ends generations that nobody needs, and new ones that will not be complete."""
        for generation_number in self.lives.others(now_s()):
            generation = self.running[generation_number]
            is_new = generation_number > self.serving.number
            if is_new and (reason := generation.hopeless()):
                self._given_up_at_s = generation.controller.declared.at_s
                self.refused = (
                    f"generation {generation_number} was given up, and all is as before: {reason}"
                )
                logger.warning("%s", self.refused)
                self._end(generation_number)
        for generation_number in self.lives.due(now_s()):
            self._end(generation_number)

    def _end(self, generation_number: int) -> None:
        logger.info("generation %d ends", generation_number)
        self.lives.remove(generation_number)
        generation = self.running.pop(generation_number)
        generation.end()
        # Whoever waits for a change of it, or of the one that serves.
        generation.controller.changed.notify()
        self.serving.controller.changed.notify()

    async def prepare(self, declared: Declared, timeout_s: float) -> GenerationStatus:
        """As `ControllerActor.prepare`."""
        until_s = now_s() + timeout_s
        async with self._starting:
            generation = self.of(declared.values) or await self._start_next(declared)
        while generation.number in self.running:
            self.lives.want(generation.number, now_s())
            left_s = until_s - now_s()
            status = self.status_of(generation)
            # Of the one that serves, nobody waits for every worker.
            if status.is_complete or status.serves or left_s <= 0:
                return status
            await generation.changed(min(left_s, 1.0))
        raise ChangeRefusedError(self.refused or "the new generation was given up")

    def abandon(self, values: Mapping[str, Any]) -> None:
        """Ends the generation with these settings, if it does not serve and nobody follows it."""
        generation = self.of(values)
        if generation is None or generation is self.serving:
            return
        if not self.lives.is_followed(generation.number, now_s()):
            self._end(generation.number)

    async def _start_next(self, declared: Declared) -> RunningGeneration:
        if declared.at_s == self._given_up_at_s:
            raise ChangeRefusedError(self.refused)
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
        present = self.serving.controller
        changes = differences(present.declared.values, flat(config))
        reason = refusal(changes, len(present.workers)) or self.busy(changes)
        if reason:
            raise ChangeRefusedError(reason)
        why = needs_generation(anew(changes))
        try:
            sizes = await asyncio.to_thread(check_files, config.model)
            return sizes, room_beside(present, config, sizes)
        except (ModelError, PlacementError) as error:
            raise ChangeRefusedError(f"{why}, and: {error}") from error

    def busy(self, changes: object = True) -> str:
        """Why nothing else can change while generations change; empty if none do."""
        others = self.others()
        if not (changes and others):
            return ""
        return f"the cluster changes to other workers: {'; '.join(others)}"

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
            generation.end()


def now_s() -> float:
    """The time by which generations live."""
    return time.monotonic()


def needs_generation(changes: Sequence[Change]) -> str:
    """That some changes need a new generation, in words."""
    return f"needs a new generation: {'; '.join(change.values for change in changes)}"
