"""Chooses the router for a request.

The least busy router wins; among equally busy ones, the one whose prefix cache covers most of the
prompt, and then chance. A request that began on another router goes to the router with copies of
its KV blocks, however busy that is.

Several ingress replicas share the routers. How busy a router is consists of two parts, which do not
overlap: what this ingress has there, which it knows at any moment, and what all others have there,
which the router reports. Chance is needed because replicas that see the same loads would all choose
the same router.

Pure: times and the generator of random numbers are arguments.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from milliways.wire.load import Load

# Prompts are compared from the beginning, in runs of this many tokens.
_RUN_TOKENS = 32
_MAX_RUNS_PER_PROMPT = 256
_MAX_RUNS_PER_ROUTER = 8192
# Routers repeat a report every second. One that is older fades: its weight halves in this time.
_FRESH_S = 2.0
_HALVED_AFTER_S = 2.0


class RouterInfo(NamedTuple):
    """A router that accepts requests."""

    worker_id: str
    address: str


class RouterDirectory(Protocol):
    """Lists the routers; the list changes as workers start and stop."""

    def routers(self) -> Sequence[RouterInfo]:
        """The routers that accept requests now."""
        ...

    async def changed(self) -> None:
        """Returns when the list has changed."""
        ...


@dataclass(eq=False, slots=True)
class Assignment:
    """A request on a router; `load` is what is left of it. Only `RouterChoice` changes it."""

    worker_id: str
    load: Load
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class _Report:
    """What other ingresses have on a router, as the router said at `at_s`."""

    others: Load
    at_s: float


class RouterChoice:
    """Knows how busy each router is, and which prompts went to which router, within limits.

    *Invariant:* `_own` of a router is the sum of the loads of its assignments, those of `begin`
    without their `end`; `_num_running` is their number.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._num_running: dict[str, int] = {}
        self._own: dict[str, Load] = {}
        self._reports: dict[str, _Report] = {}
        self._runs: dict[str, OrderedDict[int, None]] = {}
        self._suspect_until_s: dict[str, float] = {}

    def num_running(self, worker_id: str) -> int:
        """Requests of this ingress on a router."""
        return self._num_running.get(worker_id, 0)

    def weight(self, worker_id: str, now_s: float) -> float:
        """How busy a router is, in sequences."""
        weight = self._own.get(worker_id, Load()).weight
        report = self._reports.get(worker_id)
        if report is not None:
            too_old_s = max(0.0, now_s - report.at_s - _FRESH_S)
            weight += report.others.weight * 0.5 ** (too_old_s / _HALVED_AFTER_S)
        return weight

    def try_pick(
        self,
        routers: Sequence[RouterInfo],
        prompt_ids: Sequence[int],
        now_s: float,
        standby_id: str = "",
        silent: Collection[str] = (),
    ) -> RouterInfo | None:
        """Picks the router for a prompt; None if the list is empty. Records nothing.

        `standby_id` names the router that holds copies of the request's KV blocks; it is preferred
        to less busy ones. Routers in `silent`, and suspects, are chosen last.
        """
        if len(routers) < 2:
            return routers[0] if routers else None
        runs = list(_chained_runs(prompt_ids))
        return min(routers, key=self._cost(runs, now_s, standby_id, silent))

    def begin(self, worker_id: str, prompt_ids: Sequence[int], load: Load) -> Assignment:
        """Records that a request goes to a router; `end` must follow."""
        assignment = Assignment(worker_id, load)
        self._num_running[worker_id] = self.num_running(worker_id) + 1
        self._own[worker_id] = self._own.get(worker_id, Load()) + load
        known = self._runs.setdefault(worker_id, OrderedDict())
        for run in _chained_runs(prompt_ids):
            known[run] = None
            known.move_to_end(run)
        while len(known) > _MAX_RUNS_PER_ROUTER:
            known.popitem(last=False)
        return assignment

    def progressed(self, assignment: Assignment, load: Load) -> None:
        """Records what is left of a request; without effect if it has left its router."""
        # The last tokens of a stream may be read after its end.
        if not assignment.has_ended:
            self._own[assignment.worker_id] += load - assignment.load
            assignment.load = load

    def end(self, assignment: Assignment) -> None:
        """Records that a request has left its router."""
        self.progressed(assignment, Load())
        assignment.has_ended = True
        self._num_running[assignment.worker_id] -= 1
        assert self._num_running[assignment.worker_id] >= 0

    def report(self, worker_id: str, others: Load, now_s: float) -> None:
        """A router said what the other ingresses have there."""
        self._reports[worker_id] = _Report(others, now_s)

    def suspect(self, worker_id: str, until_s: float) -> None:
        """A stream of this router broke: prefer other routers until then."""
        self._suspect_until_s[worker_id] = until_s

    def forget(self, worker_id: str) -> None:
        """Drops the state of a router that has left and has no request of this ingress."""
        for known in (
            *(self._num_running, self._own, self._reports),
            *(self._runs, self._suspect_until_s),
        ):
            known.pop(worker_id, None)

    def _cost(
        self, runs: Sequence[int], now_s: float, standby_id: str, silent: Collection[str]
    ) -> Callable[[RouterInfo], tuple[bool, bool, float, int, float]]:
        def cost(router: RouterInfo) -> tuple[bool, bool, float, int, float]:
            worker_id = router.worker_id
            is_suspect = now_s < self._suspect_until_s.get(worker_id, now_s)
            is_suspect |= worker_id in silent
            has_no_copies = worker_id != standby_id
            shared = self._num_shared(worker_id, runs)
            weight = self.weight(worker_id, now_s)
            return is_suspect, has_no_copies, weight, -shared, self._random.random()

        return cost

    def _num_shared(self, worker_id: str, runs: Sequence[int]) -> int:
        known = self._runs.get(worker_id, OrderedDict[int, None]())
        num_shared = 0
        while num_shared < len(runs) and runs[num_shared] in known:
            num_shared += 1
        return num_shared


def _chained_runs(prompt_ids: Sequence[int]) -> Iterator[int]:
    """A hash of each prefix of the prompt that is a whole number of runs long."""
    chained = 0
    num_tokens = min(len(prompt_ids), _RUN_TOKENS * _MAX_RUNS_PER_PROMPT)
    for start in range(0, num_tokens - _RUN_TOKENS + 1, _RUN_TOKENS):
        chained = hash((chained, *prompt_ids[start : start + _RUN_TOKENS]))
        yield chained
