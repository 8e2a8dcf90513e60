"""A thread that waits for everything at once: files, timers, what other threads hand over.

    reactor = Reactor(SystemClock())
    reactor.start()                       # or `run()`, to lend it the calling thread
    reactor.post(link.close)              # the one way in from another thread
    reactor.close()

Each turn: calls that were posted, then tasks and timers that are due, then sleep until a file is
ready. What belongs to a reactor is used in its thread alone, and so needs no lock
(docs/ARCHITECTURE.md, Threads).

A reactor may host an event loop, which is how gRPC's asyncio lives in the same thread: the loop is
made with the reactor's selector, and its wait is a turn. What gRPC resolves then wakes a task, and
what a task asks goes to gRPC, with no other thread between them.
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
    """An event loop that waits by the selector it was made with."""

    def run_forever(self) -> None: ...

    def stop(self) -> None:
        """Has `run_forever` return; called in its thread."""
        ...

    def create_task(self, coro: Coroutine[Any, Any, Any]) -> Any: ...

    def finish(self) -> None:
        """Ends what still runs, and closes the loop."""
        ...


class _Watch:
    """What is called when a file is ready; told apart from a hosted loop's by its type."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[int], None]) -> None:
        self.callback = callback


class Reactor:
    """Owns a selector, tasks and a way to wake the thread that runs both."""

    def __init__(
        self,
        clock: Clock,
        *,
        make_loop: Callable[[BaseSelector], HostedLoop] | None = None,
        on_fault: Callable[[BaseException], None] | None = None,
        name: str = "reactor",
    ) -> None:
        """`on_fault` hears of errors that a callback let out, after they are logged."""
        self.tasks = Tasks(clock)
        self.loop: HostedLoop | None = None
        self._clock = clock
        self._on_fault = on_fault
        # Event loops hold their tasks weakly.
        self._loop_tasks: set[Any] = set()
        self._closers: set[Callable[[], None]] = set()
        self._posted: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Set while the thread sleeps or is about to: only then does a post have to wake it.
        self._may_sleep = False
        self._is_stopping = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._name = name
        self._selector.register(self._wake_fd, EVENT_READ, _Watch(self._on_wake))
        if make_loop is not None:
            self.loop = make_loop(_LoopSelector(self._selector, self._turn))

    def post(self, call: Callable[[], None]) -> None:
        """Has a call made in the reactor's thread, soon; from any thread.

        After `close` it is dropped.
        """
        self._posted.append(call)
        if self._may_sleep and not self._is_closed:
            os.eventfd_write(self._wake_fd, 1)

    def ask(self, make: Callable[[], Pending[T]], timeout_s: float) -> T:
        """What a pending value comes to that is made in the reactor's thread; from another one.

        Raises:
            TimeoutError: it did not come in time.
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
        """What a function returns in the reactor's thread; from another one."""

        def make() -> Pending[T]:
            pending = Pending[T]()
            pending.resolve(function())
            return pending

        return self.ask(make, timeout_s)

    def run_in_loop(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        """Has the hosted loop run a coroutine of its own kind; in the reactor's thread."""
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
        """Runs what a callback or the hosted loop has just made ready, instead of next turn."""
        self._run_due()

    def register(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Has `callback` called with the events (EVENT_READ, EVENT_WRITE) that a file is ready for.

        In the reactor's thread, like `modify` and `unregister`.
        """
        self._selector.register(fd, events, _Watch(callback))

    def modify(self, fd: int, events: int) -> None:
        """Waits for other events of a registered file."""
        self._selector.modify(fd, events, self._selector.get_key(fd).data)

    def unregister(self, fd: int) -> None:
        """Waits for a file no more; before it is closed."""
        self._selector.unregister(fd)

    def start(self) -> None:
        """Runs in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name=self._name, daemon=True)
        self._thread.start()

    def add_closer(self, close: Callable[[], None]) -> None:
        """Has `close` called when the reactor stops, unless it is removed before."""
        self._closers.add(close)

    def remove_closer(self, close: Callable[[], None]) -> None:
        """What it would close is closed already."""
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
        """Has `run` return after its turn; from any thread."""
        self.post(self._stop)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops its own thread, if it has one, and lets go of its files; from another thread."""
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
        """Does what there is to do, or waits for it; returns what is ready for the hosted loop."""
        if self._run_due():
            # It may have given the loop something to do, which only the loop knows.
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
        # Those posted meanwhile wait for the next turn: files have their turn as well.
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
    """The reactor's selector as a hosted loop sees it: its wait is the reactor's turn."""

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
