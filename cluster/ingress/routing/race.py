"""Runs one request on several routers at once and yields what arrives first.

All routers compute the same tokens, so the first to send the next token wins. The caller then
cancels the others. The queue is short: a slow client slows its router down.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.router_connection import RouterConnection
from milliways.v1 import router_pb2

_MAX_UNREAD = 8


class StreamBrokenError(Exception):
    """A stream ended before its request did; another router can continue the request."""


class RouterSilentError(Exception):
    """A router has been silent for too long; its stream is still open."""


@dataclass(eq=False, slots=True)
class Attempt:
    """A stream from one router; `since_s` is when it began or sent its last token."""

    router: RouterInfo
    connection: RouterConnection
    since_s: float


StreamItem = router_pb2.RouteResponse | Exception


class Race:
    """The open streams of one request, and the queue of what they send.

    The caller must close it in any case: use `contextlib.aclosing`.

    *Invariant:* `attempts` are the streams that are open and neither lost nor ended. `next` returns
    items of these only.
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
        """Opens a stream from a router; `on_end` is called when it has ended."""
        task = asyncio.create_task(self._pump(attempt, message, timeout_s))
        task.add_done_callback(lambda _: on_end())
        self._tasks[attempt] = task

    async def next(self) -> tuple[Attempt, StreamItem]:
        """Waits for the next item of any stream: a response, a RouterSilentError, or how it ended.

        A stream that ended is no longer among `attempts`. If the router ended it without an error,
        the item is a StreamBrokenError.
        """
        while True:
            attempt, item = await self._unread.get()
            # An item of a stream that was cancelled since.
            if attempt not in self._tasks:
                continue
            if isinstance(item, Exception) and not isinstance(item, RouterSilentError):
                del self._tasks[attempt]
            return attempt, item

    async def cancel(self, attempt: Attempt) -> None:
        """Cancels a stream; `next` returns nothing more of it."""
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
        # Cancels all before it waits for any, because the waiting can be cancelled too.
        tasks = [self._tasks.pop(attempt) for attempt in attempts if attempt in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, attempt: Attempt, message: router_pb2.RouteRequest, timeout_s: float
    ) -> None:
        def on_silence() -> None:
            # If the queue is full, the client is slow, not the router.
            if not self._unread.full():
                self._unread.put_nowait((attempt, RouterSilentError()))

        connection = attempt.connection
        # Here and not in `begin`: a task that is cancelled at once never runs, nor cleans up.
        call = connection.route(message, timeout=timeout_s)
        connection.begin(on_silence)
        end: Exception = StreamBrokenError("the stream ended before the request")
        try:
            async for response in call:
                connection.received()
                await self._unread.put((attempt, response))
        except asyncio.CancelledError:
            # Was this task cancelled, or the call below it, because its channel was closed?
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
