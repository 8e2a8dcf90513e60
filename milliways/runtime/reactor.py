"""A thread that waits for files, timers and calls of other threads at once.

    reactor = Reactor(SystemClock())
    reactor.start()                       # or `run()`, to lend it the calling thread
    reactor.post(link.close)              # how another thread has something done here
    reactor.close()

Each turn runs the posted calls, then the tasks and timers that are due, then waits until a file is
ready. All of it runs in the reactor's thread. An object of a reactor is used in that thread only,
so it needs no locks (docs/ARCHITECTURE.md, Threads).

A reactor may host an event loop. That is how gRPC's asyncio runs in the same thread: the loop is
made with the reactor's selector, and each wait of the loop is a turn of the reactor. So results of
gRPC wake tasks, and tasks call gRPC, without a second thread.
"""

import logging
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from selectors import EVENT_READ, BaseSelector, SelectorKey
from typing import Any, Protocol, TypeVar

from milliways.runtime.clock import Clock
from milliways.runtime.tasks import Pending, Tasks

logger = logging.getLogger(__name__)

T = TypeVar("T")


class HostedLoop(Protocol):
    """An event loop that waits with the selector with which it was made."""

    def run_forever(self) -> None: ...

    def stop(self) -> None:
        """Makes `run_forever` return; called in its thread."""
        ...

    def create_task(self, coro: Coroutine[Any, Any, Any]) -> Any: ...

    def finish(self) -> None:
        """Cancels the tasks that still run, and closes the loop."""
        ...


class _Watch:
    """A callback for a file. Its type distinguishes it from the entries of a hosted loop."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[int], None]) -> None:
        self.callback = callback


class Reactor:
    """Owns a selector and tasks, and wakes the thread that runs both.

    Invariant: whenever the thread sleeps, `_may_sleep` is set and `_posted` was empty after it was
    set, so no posted call waits for another event.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        make_loop: Callable[[BaseSelector], HostedLoop] | None = None,
        on_fault: Callable[[BaseException], None] | None = None,
        name: str = "reactor",
    ) -> None:
        """`on_fault` is called with each error that a callback raised, after it is logged."""
        self.tasks = Tasks(clock)
        self.loop: HostedLoop | None = None
        self._clock = clock
        self._on_fault = on_fault
        # Kept here, because event loops refer to their tasks weakly.
        self._loop_tasks: set[Any] = set()
        self._closers: set[Callable[[], None]] = set()
        self._posted: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Set while the thread sleeps or is about to sleep: only then `post` has to wake it.
        self._may_sleep = False
        self._is_stopping = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._name = name
        self._selector.register(self._wake_fd, EVENT_READ, _Watch(self._on_wake))
        if make_loop is not None:
            self.loop = make_loop(_LoopSelector(self._selector, self._turn))

    def post(self, call: Callable[[], None]) -> None:
        """Runs a call soon in the reactor's thread; from any thread. Dropped after `close`."""
        self._posted.append(call)
        if self._may_sleep and not self._is_closed:
            os.eventfd_write(self._wake_fd, 1)

    def ask(self, make: Callable[[], Pending[T]], timeout_s: float) -> T:
        """Runs `make` in the reactor's thread and waits for its result; from another thread.

        Raises:
            TimeoutError: there was no result in time.
        """
        assert threading.current_thread() is not self._thread
        done = threading.Event()
        box: list[Pending[T]] = []

        def begin() -> None:
            try:
                pending = make()
            except Exception as error:
                pending = Pending[T]()
                pending.fail(error)
            box.append(pending)
            pending.when_done(done.set)

        self.post(begin)
        if not done.wait(timeout_s):
            raise TimeoutError(f"{self._name}: no answer within {timeout_s:g} s")
        return box[0].result()

    def call(self, function: Callable[[], T], timeout_s: float = 30.0) -> T:
        """Runs a function in the reactor's thread and returns its result; from another thread."""

        def make() -> Pending[T]:
            pending = Pending[T]()
            pending.resolve(function())
            return pending

        return self.ask(make, timeout_s)

    def run_in_loop(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        """Starts a coroutine in the hosted loop; in the reactor's thread."""
        assert self.loop is not None, "this reactor hosts no event loop"
        pending = Pending[T]()

        def settle(task: Any) -> None:
            self._loop_tasks.discard(task)
            try:
                pending.resolve(task.result())
            except BaseException as error:
                pending.fail(error)

        task = self.loop.create_task(coroutine)
        self._loop_tasks.add(task)
        task.add_done_callback(settle)
        return pending

    def run_due(self) -> None:
        """Runs at once what a callback or the hosted loop made ready, not in the next turn."""
        self._run_due()

    def register(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls `callback` with EVENT_READ, EVENT_WRITE or both when a file is ready for them.

        Used in the reactor's thread, like `modify` and `unregister`.
        """
        self._selector.register(fd, events, _Watch(callback))

    def modify(self, fd: int, events: int) -> None:
        """Waits for other events of a registered file."""
        self._selector.modify(fd, events, self._selector.get_key(fd).data)

    def unregister(self, fd: int) -> None:
        """Stops waiting for a file; called before the file is closed."""
        self._selector.unregister(fd)

    def start(self) -> None:
        """Runs in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name=self._name, daemon=True)
        self._thread.start()

    def add_closer(self, close: Callable[[], None]) -> None:
        """Calls `close` when the reactor stops, unless it is removed before."""
        self._closers.add(close)

    def remove_closer(self, close: Callable[[], None]) -> None:
        """Does not call `close`, because it was done already."""
        self._closers.discard(close)

    def run(self) -> None:
        """Runs in the calling thread until `stop`."""
        if self.loop is not None:
            self.loop.run_forever()
            self.loop.finish()
            return
        while not self._is_stopping:
            self._turn(None)

    def stop(self) -> None:
        """Makes `run` return after the present turn; from any thread."""
        self.post(self._stop)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops its own thread, if it has one, and closes its files; from another thread."""
        if self._is_closed:
            return
        if self._thread is not None:
            self.stop()
            self._thread.join(timeout_s)
            assert not self._thread.is_alive(), f"{self._name} does not stop"
        elif self.loop is not None and not self._is_stopping:
            self.loop.finish()
        self._is_closed = True
        self._selector.close()
        os.close(self._wake_fd)

    def _stop(self) -> None:
        self._is_stopping = True
        for close in tuple(self._closers):
            self._guarded(close)
        if self.loop is not None:
            self.loop.stop()

    def _turn(self, limit_s: float | None) -> list[tuple[SelectorKey, int]]:
        """Runs what is due, then waits for files; returns those that belong to the hosted loop."""
        if self._run_due():
            # It may have given the hosted loop something to do, so the loop must not wait.
            limit_s = 0.0
        if limit_s is None or limit_s > 0:
            limit_s = self._shortened(limit_s)
        self._may_sleep = True
        if self._posted:
            limit_s = 0.0
        ready = self._selector.select(limit_s)
        self._may_sleep = False
        for_loop: list[tuple[SelectorKey, int]] = []
        for entry in ready:
            watch = entry[0].data
            if type(watch) is _Watch:
                self._guarded(watch.callback, entry[1])
            else:
                for_loop.append(entry)
        if self.loop is not None and len(for_loop) < len(ready):
            self._run_due()
        return for_loop

    def _run_due(self) -> bool:
        has_run = bool(self._posted)
        # Calls that are posted meanwhile wait for the next turn, so that files are served too.
        for _ in range(len(self._posted)):
            self._guarded(self._posted.popleft())
        try:
            return self.tasks.run_ready() or has_run
        except Exception as error:
            self._report(error)
            return True

    def _shortened(self, limit_s: float | None) -> float | None:
        timer_s = self.tasks.next_timer_s()
        if timer_s is None:
            return limit_s
        until_timer_s = max(timer_s - self._clock.now_s(), 0.0)
        return until_timer_s if limit_s is None else min(limit_s, until_timer_s)

    def _guarded(self, callback: Callable[..., None], *args: int) -> None:
        try:
            callback(*args)
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        logger.error("%s: a callback failed", self._name, exc_info=error)
        if self._on_fault is not None:
            self._on_fault(error)

    def _on_wake(self, events: int) -> None:
        os.eventfd_read(self._wake_fd)


class _LoopSelector(BaseSelector):
    """The reactor's selector as a hosted loop sees it: each wait is a turn of the reactor."""

    def __init__(
        self,
        selector: BaseSelector,
        turn: Callable[[float | None], list[tuple[SelectorKey, int]]],
    ) -> None:
        self._selector = selector
        self._turn = turn

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> SelectorKey:
        return self._selector.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        return self._selector.modify(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        return self._turn(timeout)

    def get_map(self) -> Mapping[Any, SelectorKey]:
        return self._selector.get_map()

    def close(self) -> None:
        """Nothing: the reactor closes it."""
