"""Runs `Tasks` inside an asyncio loop, for programs whose libraries use asyncio."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from milliways.runtime.clock import SystemClock
from milliways.runtime.tasks import Pending, Tasks

T = TypeVar("T")


class AsyncTasks:
    """Owns `Tasks`, and runs them whenever something was resolved or a timer is due.

    Used in the loop's thread. `on_fault` gets the error of a service task that failed; by default
    the error is raised in the loop. The other tasks go on in both cases.
    """

    def __init__(self, on_fault: Callable[[BaseException], None] | None = None) -> None:
        self.tasks = Tasks(SystemClock())
        self._on_fault = on_fault
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_kicked = False
        self._is_closed = False
        # Kept here, because event loops refer to their tasks weakly.
        self._running: set[asyncio.Task[Any]] = set()

    def close(self) -> None:
        """Cancels all tasks, and runs none any more."""
        self._is_closed = True
        self.tasks.close()
        for task in self._running:
            task.cancel()

    def kick(self) -> None:
        """Runs the tasks soon."""
        if not (self._is_kicked or self._is_closed):
            self._is_kicked = True
            self._loop.call_soon(self._turn)

    def pending(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        """Starts an asyncio coroutine; tasks can await the result."""
        pending: Pending[T] = Pending()

        async def run() -> None:
            try:
                pending.resolve(await coroutine)
            except BaseException as error:
                pending.fail(error)
            finally:
                self.kick()

        task = self._loop.create_task(run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return pending

    async def wait(self, pending: Pending[T]) -> T:
        """Waits for a result of the tasks, in an asyncio coroutine."""
        done = asyncio.Event()
        pending.when_done(done.set)
        self.kick()
        await done.wait()
        return pending.result()

    def _turn(self) -> None:
        self._is_kicked = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_closed:
            return
        try:
            self.tasks.run_ready()
        except Exception as error:
            # The tasks that were ready after the one that failed.
            self.kick()
            if self._on_fault is None:
                raise
            self._on_fault(error)
        finally:
            self._arm_timer()

    def _arm_timer(self) -> None:
        next_s = self.tasks.next_timer_s()
        if next_s is not None:
            delay_s = max(0.0, next_s - self.tasks.clock.now_s())
            self._timer = self._loop.call_later(delay_s, self.kick)
