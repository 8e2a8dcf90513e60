"""Streams of one request, by several routers at a time: whoever has the next token gives it.

Which one it is makes no difference to the tokens. The queue between is short, so that a slow client
slows its router down.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.router_connection import RouterConnection
from milliways.v1 import router_pb2

_MAX_UNREAD = 8


class StreamBrokenError(Exception):
    """A stream ended before the request did; another router can carry it on."""


class RouterSilentError(Exception):
    """A router gives no sign of life; its stream stands."""


@dataclass(eq=False, slots=True)
class Attempt:
    """A stream by one router; `since_s` is when it was asked, or gave its last token."""

    router: RouterInfo
    connection: RouterConnection
    since_s: float


News = router_pb2.RouteResponse | Exception


class Race:
    """Streams that run, and what comes of them, in the order in which it comes.

    To be closed, whatever happens: `contextlib.aclosing`.
    """

    def __init__(self) -> None:
        self._unread: asyncio.Queue[tuple[Attempt, News]] = asyncio.Queue(_MAX_UNREAD)
        self._tasks: dict[Attempt, asyncio.Task[None]] = {}

    @property
    def attempts(self) -> list[Attempt]:
        """Those that run, in the order in which they began."""
        return list(self._tasks)

    def begin(
        self,
        attempt: Attempt,
        message: router_pb2.RouteRequest,
        timeout_s: float,
        when_over: Callable[[], None],
    ) -> None:
        """Asks a router."""
        task = asyncio.create_task(self._pump(attempt, message, timeout_s))
        task.add_done_callback(lambda _: when_over())
        self._tasks[attempt] = task

    async def next(self) -> tuple[Attempt, News]:
        """A response, RouterSilentError, or how a stream ended: then it is no longer of the race.

        A stream that ended by itself has StreamBrokenError.
        """
        while True:
            attempt, news = await self._unread.get()
            # What was left of one that lost.
            if attempt not in self._tasks:
                continue
            if isinstance(news, Exception) and not isinstance(news, RouterSilentError):
                del self._tasks[attempt]
            return attempt, news

    async def drop(self, attempt: Attempt) -> None:
        """Cancels a stream; nothing more is heard of it."""
        await self._cancel([attempt])

    async def keep_only(self, winner: Attempt) -> None:
        """Cancels all the others."""
        if len(self._tasks) > 1:
            first, *_ = self.attempts
            if winner is first:
                winner.connection.hedged_too_early()
            await self._cancel([attempt for attempt in self.attempts if attempt is not winner])

    async def aclose(self) -> None:
        await self._cancel(self.attempts)

    async def _cancel(self, attempts: Sequence[Attempt]) -> None:
        # All of them before any is waited for, should the waiting be cancelled too.
        tasks = [self._tasks.pop(attempt) for attempt in attempts if attempt in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, attempt: Attempt, message: router_pb2.RouteRequest, timeout_s: float
    ) -> None:
        def on_silence() -> None:
            # Where it is full, the client is slow.
            if not self._unread.full():
                self._unread.put_nowait((attempt, RouterSilentError()))

        connection = attempt.connection
        # Not before: a task that is cancelled at once does not begin.
        call = connection.route(message, timeout=timeout_s)
        connection.begin(on_silence)
        end: Exception = StreamBrokenError("the stream ended before the request")
        try:
            async for response in call:
                connection.heard()
                await self._unread.put((attempt, response))
        except asyncio.CancelledError:
            # Of this task, or of the call under it because its channel was closed?
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
