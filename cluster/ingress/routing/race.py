"""Runs one request on several routers at once, and returns what they send in order of arrival.

All routers compute the same tokens. So the caller keeps the first router that sends a new token,
and cancels the others. The queue is short: if the client reads slowly, the routers must wait.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from milliways.cluster.ingress.routing.router_choice import Assignment, RouterInfo
from milliways.cluster.ingress.routing.router_connection import RouterConnection
from milliways.v1 import router_pb2

_MAX_UNREAD = 8


class StreamBrokenError(Exception):
    """A stream ended before the request was complete; another router can continue the request."""


class RouterSilentError(Exception):
    """A router has been silent for too long; its stream is still open."""


@dataclass(eq=False, slots=True)
class Attempt:
    """A stream from one router. `since_s` is the time of its last token, or of its beginning."""

    router: RouterInfo
    connection: RouterConnection
    assignment: Assignment
    since_s: float


StreamItem = router_pb2.RouteResponse | Exception


class Race:
    """The open streams of one request, and the queue of what they send.

    The caller must close it, after an error too: use `contextlib.aclosing`.

    *Invariant:* a stream is in `attempts` until it is cancelled or `next` returns its end. `next`
    returns no item of a stream that is not in `attempts`.
    """

    def __init__(self) -> None:
        self._unread: asyncio.Queue[tuple[Attempt, StreamItem]] = asyncio.Queue(_MAX_UNREAD)
        self._tasks: dict[Attempt, asyncio.Task[None]] = {}

    @property
    def attempts(self) -> list[Attempt]:
        """The open streams, in the order in which they began."""
        return list(self._tasks)

    def begin(
        self,
        attempt: Attempt,
        message: router_pb2.RouteRequest,
        timeout_s: float,
        on_end: Callable[[], None],
    ) -> None:
        """Opens a stream from a router. `on_end` is called when it has ended or was cancelled."""
        task = asyncio.create_task(self._pump(attempt, message, timeout_s))
        task.add_done_callback(lambda _: on_end())
        self._tasks[attempt] = task

    async def next(self) -> tuple[Attempt, StreamItem]:
        """Waits for the next item of any stream: a response, or an exception. Raises none of them.

        After a RouterSilentError the stream is still open. Any other exception says why the stream
        ended, and removes it from `attempts`. That is a StreamBrokenError if the router reported no
        error: a caller that has the complete answer does not ask for the next item.
        """
        while True:
            attempt, item = await self._unread.get()
            # The stream was cancelled after this item was queued.
            if attempt not in self._tasks:
                continue
            if isinstance(item, Exception) and not isinstance(item, RouterSilentError):
                del self._tasks[attempt]
            return attempt, item

    async def cancel(self, attempt: Attempt) -> None:
        """Cancels a stream. `next` returns no more of its items."""
        await self._cancel([attempt])

    async def keep_only(self, winner: Attempt) -> None:
        """Cancels all other streams."""
        if len(self._tasks) > 1:
            first, *_ = self.attempts
            if winner is first:
                winner.connection.hedged_too_early()
            await self._cancel([attempt for attempt in self.attempts if attempt is not winner])

    async def aclose(self) -> None:
        await self._cancel(self.attempts)

    async def _cancel(self, attempts: Sequence[Attempt]) -> None:
        # Cancel all tasks first, then wait: if the wait is cancelled, no task goes on.
        tasks = [self._tasks.pop(attempt) for attempt in attempts if attempt in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, attempt: Attempt, message: router_pb2.RouteRequest, timeout_s: float
    ) -> None:
        def on_silence() -> None:
            # If the queue is full, routers wait for the client: this is not the router's silence.
            if not self._unread.full():
                self._unread.put_nowait((attempt, RouterSilentError()))

        connection = attempt.connection
        # Not in `begin`: a task that is cancelled before it runs could not cancel the call.
        call = connection.route(message, timeout=timeout_s)
        connection.begin(on_silence)
        end: Exception = StreamBrokenError("the stream ended before the request")
        try:
            async for response in call:
                connection.received()
                await self._unread.put((attempt, response))
        except asyncio.CancelledError:
            # Either this task was cancelled, or gRPC cancelled the call of a closed channel.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            end = StreamBrokenError("the channel was closed")
        except Exception as error:
            end = error
        finally:
            connection.end(on_silence)
            call.cancel()
        await self._unread.put((attempt, end))
