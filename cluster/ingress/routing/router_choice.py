"""Which router gets a request: the least busy, and of those one that knows the prompt's beginning.

What was begun elsewhere goes to whoever has copies of its keys and values, however busy.

A pure object; times are given.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

# Prompts are compared in runs of so many tokens, from the beginning on.
_RUN_TOKENS = 32
_MAX_RUNS_PER_PROMPT = 256
_MAX_RUNS_PER_ROUTER = 8192


class RouterInfo(NamedTuple):
    """A router that takes requests; `load_hint` is what others have running there."""

    worker_id: str
    address: str
    load_hint: float = 0.0


class RouterDirectory(Protocol):
    """The routers that there are; the set changes as workers come and go."""

    def routers(self) -> Sequence[RouterInfo]:
        """Those that take requests now."""
        ...

    async def changed(self) -> None:
        """Returns when the set differs from what it is now."""
        ...


class RouterChoice:
    """Remembers what was sent where, within bounds."""

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
        """The router for a prompt; None if there is none. Changes nothing.

        One that has copies of the request's keys and values comes before those that are less busy;
        those that are silent come last.
        """
        if len(routers) < 2:
            return routers[0] if routers else None
        runs = list(_chained_runs(prompt_ids))
        return min(routers, key=self._cost(runs, now_s, standby_id, silent))

    def begin(self, worker_id: str, prompt_ids: Sequence[int]) -> None:
        """Notes that a request goes to a router; `end` has to follow."""
        self._num_running[worker_id] = self.num_running(worker_id) + 1
        known = self._runs.setdefault(worker_id, OrderedDict())
        for run in _chained_runs(prompt_ids):
            known[run] = None
            known.move_to_end(run)
        while len(known) > _MAX_RUNS_PER_ROUTER:
            known.popitem(last=False)

    def end(self, worker_id: str) -> None:
        """Notes that a request is no longer at a router."""
        self._num_running[worker_id] -= 1
        assert self._num_running[worker_id] >= 0

    def suspect(self, worker_id: str, until_s: float) -> None:
        """A stream to it broke: others are asked first for a while."""
        self._suspect_until_s[worker_id] = until_s

    def forget(self, worker_id: str) -> None:
        """Drops what is known of a router that is gone."""
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
    """A name for each beginning of the prompt that is a whole number of runs long."""
    name = 0
    num_tokens = min(len(prompt_ids), _RUN_TOKENS * _MAX_RUNS_PER_PROMPT)
    for start in range(0, num_tokens - _RUN_TOKENS + 1, _RUN_TOKENS):
        name = hash((name, *prompt_ids[start : start + _RUN_TOKENS]))
        yield name
