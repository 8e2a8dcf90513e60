"""Chooses the router for a request.

The least busy router wins; among equally busy ones, the one whose prefix cache covers most of the
prompt. A request that began on another router goes to the router with copies of its KV blocks,
however busy that is.

Pure: times are arguments.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

# Prompts are compared from the beginning, in runs of this many tokens.
_RUN_TOKENS = 32
_MAX_RUNS_PER_PROMPT = 256
_MAX_RUNS_PER_ROUTER = 8192


class RouterInfo(NamedTuple):
    """A router that accepts requests; `load_hint` is the number that other ingresses run there."""

    worker_id: str
    address: str
    load_hint: float = 0.0


class RouterDirectory(Protocol):
    """Lists the routers; the list changes as workers start and stop."""

    def routers(self) -> Sequence[RouterInfo]:
        """The routers that accept requests now."""
        ...

    async def changed(self) -> None:
        """Returns when the list has changed."""
        ...


class RouterChoice:
    """Remembers which prompts went to which router, within limits.

    *Invariant:* `num_running` of a router is the number of `begin` calls without their `end`.
    """

    def __init__(self) -> None:
        self._num_running: dict[str, int] = {}
        self._runs: dict[str, OrderedDict[int, None]] = {}
        self._suspect_until_s: dict[str, float] = {}

    def num_running(self, worker_id: str) -> int:
        return self._num_running.get(worker_id, 0)

    def try_pick(
        self,
        routers: Sequence[RouterInfo],
        prompt_ids: Sequence[int],
        now_s: float,
        standby_id: str = "",
        silent: Collection[str] = (),
    ) -> RouterInfo | None:
        """Picks the router for a prompt; None if the list is empty. Changes no state.

        `standby_id` names the router that holds copies of the request's KV blocks; it is preferred
        to less busy ones. Routers in `silent`, and suspects, are chosen last.
        """
        if len(routers) < 2:
            return routers[0] if routers else None
        runs = list(_chained_runs(prompt_ids))
        return min(routers, key=self._cost(runs, now_s, standby_id, silent))

    def begin(self, worker_id: str, prompt_ids: Sequence[int]) -> None:
        """Records that a request goes to a router; `end` must follow."""
        self._num_running[worker_id] = self.num_running(worker_id) + 1
        known = self._runs.setdefault(worker_id, OrderedDict())
        for run in _chained_runs(prompt_ids):
            known[run] = None
            known.move_to_end(run)
        while len(known) > _MAX_RUNS_PER_ROUTER:
            known.popitem(last=False)

    def end(self, worker_id: str) -> None:
        """Records that a request has left a router."""
        self._num_running[worker_id] -= 1
        assert self._num_running[worker_id] >= 0

    def suspect(self, worker_id: str, until_s: float) -> None:
        """A stream of this router broke: prefer other routers until then."""
        self._suspect_until_s[worker_id] = until_s

    def forget(self, worker_id: str) -> None:
        """Drops the state of a router that has left."""
        for known in (self._num_running, self._runs, self._suspect_until_s):
            known.pop(worker_id, None)

    def _cost(
        self, runs: Sequence[int], now_s: float, standby_id: str, silent: Collection[str]
    ) -> Callable[[RouterInfo], tuple[bool, bool, float, int, str]]:
        def cost(router: RouterInfo) -> tuple[bool, bool, float, int, str]:
            is_suspect = now_s < self._suspect_until_s.get(router.worker_id, now_s)
            is_suspect |= router.worker_id in silent
            load = self.num_running(router.worker_id) + router.load_hint
            shared = self._num_shared(router.worker_id, runs)
            has_no_copies = router.worker_id != standby_id
            return is_suspect, has_no_copies, load, -shared, router.worker_id

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
