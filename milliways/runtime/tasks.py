"""Coroutines without an event loop: the step loop in production and in simulation.

A `Task` runs a coroutine until it awaits a `Pending` that has no result yet. The owner of the
`Tasks` resolves what arrived, then calls `run_ready`; nothing here knows threads, sockets or real
time. asyncio would add 0.2 ms and a thread to each hop. It could not run all processes of a
simulation in one thread, in one order, under a fake clock.

    tasks = Tasks(clock)
    reply = Pending()                   # a link resolves it when the message arrives
    task = tasks.start(step(reply))
    reply.resolve(rows)
    tasks.run_ready()
"""

import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from itertools import count
from typing import Any, Generic, TypeVar

from milliways.runtime.clock import Clock

T = TypeVar("T")


class Cancelled(BaseException):
    """Raised in a task that is cancelled; no Exception, so that `except Exception` misses it."""


class Pending(Generic[T]):
    """A value or an error that comes later, once.

    Invariant: `is_done` is set once; callbacks are called once, then forgotten.
    """

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []
        self._value: T | None = None
        self._error: BaseException | None = None
        self.is_done = False

    @property
    def error(self) -> BaseException | None:
        """The error, if it failed."""
        return self._error

    def resolve(self, value: T) -> None:
        """Sets the value; without effect if it is done."""
        if not self.is_done:
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Sets the error; without effect if it is done."""
        if not self.is_done:
            self._error = error
            self._finish()

    def result(self) -> T:
        """The value; raises the error if it failed."""
        assert self.is_done
        if self._error is not None:
            raise self._error
        return self._value  # pyright: ignore[reportReturnType]

    def when_done(self, callback: Callable[[], None]) -> None:
        """Calls back when it is done; at once if it is done already."""
        if self.is_done:
            callback()
        else:
            self._callbacks.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Does not call back; without effect if the callback is not registered."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def _finish(self) -> None:
        self.is_done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def __await__(self) -> Generator["Pending[T]", None, T]:
        if not self.is_done:
            yield self
        return self.result()


class Task(Pending[T]):
    """A running coroutine; done when it returns, raises or is cancelled."""

    def __init__(self, coroutine: Coroutine[Pending[Any], None, T], ready: deque[Any]) -> None:
        super().__init__()
        self._coroutine = coroutine
        self._ready = ready
        self._awaited: Pending[Any] | None = None
        self._is_cancelled = False
        ready.append(self)

    def cancel(self) -> None:
        """Raises `Cancelled` where the task waits, when it runs next."""
        if not self.is_done and not self._is_cancelled:
            self._is_cancelled = True
            self._awaited = None
            self._ready.append(self)

    def go_on(self) -> None:
        """Runs to the next wait; called by `Tasks` only."""
        # A task that was woken and cancelled is in the queue twice, and may wait again by now.
        if self.is_done or self._awaited is not None:
            return
        try:
            if self._is_cancelled:
                awaited = self._coroutine.throw(Cancelled())
            else:
                awaited = self._coroutine.send(None)
        except StopIteration as stop:
            self.resolve(stop.value)
        except BaseException as error:
            self.fail(error)
        else:
            self._is_cancelled = False
            self._awaited = awaited
            awaited.when_done(lambda: self._wake(awaited))

    def _wake(self, awaited: Pending[Any]) -> None:
        # A cancelled task does not wait for this any more.
        if self._awaited is awaited:
            self._awaited = None
            self._ready.append(self)


class Timer:
    """A call at a later time."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Prevents the call."""
        self._call = None

    def fire(self) -> None:
        """Makes the call, unless it was cancelled."""
        call, self._call = self._call, None
        if call is not None:
            call()

    @property
    def is_waiting(self) -> bool:
        return self._call is not None


class Tasks:
    """Owns tasks and timers, and runs those that are ready, in order.

    Invariant: `_alive` has exactly the tasks that have not ended. Each of them waits for a Pending,
    runs, or is in `_ready`.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._ready: deque[Task[Any]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._alive: set[Task[Any]] = set()
        self._faults: list[BaseException] = []

    @property
    def num_alive(self) -> int:
        """Tasks that have not ended; 0 after a clean stop."""
        return len(self._alive)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Task[T]:
        """Starts a coroutine; it runs at the next `run_ready`."""
        task = Task(coroutine, self._ready)
        self._alive.add(task)
        task.when_done(lambda: self._alive.discard(task))
        return task

    def start_service(self, coroutine: Coroutine[Any, Any, None]) -> Task[None]:
        """Starts a coroutine that must not fail: `run_ready` raises its error."""
        task = self.start(coroutine)

        def look() -> None:
            if task.error is not None and not isinstance(task.error, Cancelled):
                self._faults.append(task.error)

        task.when_done(look)
        return task

    def close(self) -> None:
        """Cancels all tasks and forgets all timers."""
        for task in list(self._alive):
            task.cancel()
        while self._ready:
            self._ready.popleft().go_on()
        self._timers.clear()
        self._faults.clear()

    def run_ready(self) -> bool:
        """Fires timers that are due and runs tasks until all wait; whether anything ran."""
        has_run = self._fire_timers()
        while self._ready:
            has_run = True
            self._ready.popleft().go_on()
            if self._faults:
                raise self._faults.pop()
        return has_run

    def next_timer_s(self) -> float | None:
        """When the next timer is due; None if there is none."""
        while self._timers and not self._timers[0][2].is_waiting:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def call_at(self, time_s: float, call: Callable[[], None]) -> Timer:
        """Calls at a time of the clock."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time_s, next(self._order), timer))
        return timer

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Calls after a delay."""
        return self.call_at(self.clock.now_s() + delay_s, call)

    async def sleep(self, delay_s: float) -> None:
        """Waits for a time."""
        time_is_up: Pending[None] = Pending()
        timer = self.call_later(delay_s, lambda: time_is_up.resolve(None))
        try:
            await time_is_up
        finally:
            timer.cancel()

    async def gather(self, coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """Runs all at the same time; returns results in order. An error cancels the others."""
        tasks = [self.start(coroutine) for coroutine in coroutines]
        failed_or_all_done: Pending[None] = Pending()

        def look() -> None:
            if all(task.is_done for task in tasks) or any(task.error for task in tasks):
                failed_or_all_done.resolve(None)

        for task in tasks:
            task.when_done(look)
        try:
            if tasks:
                await failed_or_all_done
            failed = [task for task in tasks if task.error]
            return [task.result() for task in failed or tasks]
        finally:
            for task in tasks:
                task.cancel()

    async def wait_for(self, pending: Pending[Any], timeout_s: float) -> bool:
        """Whether it was done within the time; its error is not raised."""
        timed_out: Pending[None] = Pending()
        timer = self.call_later(timeout_s, lambda: timed_out.resolve(None))
        try:
            await self.first_done((pending, timed_out))
        finally:
            timer.cancel()
        return pending.is_done

    async def first_done(self, pendings: Iterable[Pending[Any]]) -> None:
        """Waits until at least one of them is done."""
        changed: Pending[None] = Pending()

        def look() -> None:
            changed.resolve(None)

        awaited = tuple(pendings)
        for pending in awaited:
            pending.when_done(look)
        try:
            await changed
        finally:
            # Some of them may be awaited many times before they are done.
            for pending in awaited:
                pending.forget(look)

    def _fire_timers(self) -> bool:
        has_fired = False
        now_s = self.clock.now_s()
        while self._timers and self._timers[0][0] <= now_s:
            heapq.heappop(self._timers)[2].fire()
            has_fired = True
        return has_fired


class Signal:
    """An event that happens many times; tasks wait for the next time."""

    def __init__(self) -> None:
        self._next: Pending[None] = Pending()

    def notify(self) -> None:
        """Wakes all tasks that wait."""
        happened, self._next = self._next, Pending()
        happened.resolve(None)

    def wait(self) -> Pending[None]:
        """To be awaited: done at the next `notify`."""
        return self._next
