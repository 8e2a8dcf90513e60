"""Runs `Tasks` inside an asyncio loop: for shells whose libraries speak asyncio."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from milliways.runtime.clock import SystemClock
from milliways.runtime.tasks import Pending, Tasks

T = TypeVar("T")


class AsyncTasks:
    """Owns `Tasks`, and gives them a turn whenever something was resolved or is due.

    Used from the loop's thread only.
    """

    def __init__(self) -> None:
        self.tasks = Tasks(SystemClock())
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_kicked = False
        # Event loops hold their tasks weakly.
        self._running: set[asyncio.Task[Any]] = set()

    def kick(self) -> None:
        """Has the tasks run soon."""
        if not self._is_kicked:
            self._is_kicked = True
            self._loop.call_soon(self._turn)

    def pending(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        """What a coroutine of asyncio comes to, as tasks wait for it."""
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
        """What something of the tasks comes to, as asyncio waits for it."""
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
        self.tasks.run_ready()
        next_s = self.tasks.next_timer_s()
        if next_s is not None:
            delay_s = max(0.0, next_s - self.tasks.clock.now_s())
            self._timer = self._loop.call_later(delay_s, self.kick)
