"""The interfaces between routers and workers, whatever carries the bytes."""

from collections.abc import Callable
from typing import Protocol

from milliways.runtime.tasks import Pending
from milliways.wire.calls import Call, Fence, Result


class WorkerLink(Protocol):
    """A connection to one incarnation of a worker. Used in the router's thread; never blocks it."""

    @property
    def transport(self) -> str:
        """What carries the calls: `direct`, or a name of `wire.transports`."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether the worker's core is in this process, so that calls are not copied."""
        ...

    @property
    def exchange_link(self) -> int:
        """The link's number in the router's exchange node, if it has a ring; else 0."""
        ...

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        """Sends a call. The result may be a Refusal.

        The only error is PeerLostError: the connection broke. The caller watches the time; a
        result that arrives after the caller stopped waiting is dropped.
        """
        ...

    def close(self) -> None:
        """Closes the connection; unanswered calls fail with PeerLostError."""
        ...


class CallSink(Protocol):
    """A worker's core, as its transports see it. Used in the thread that computes."""

    def submit(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        """Queues a call, or refuses it at once; `reply` is called once, now or later."""
        ...

    def router_gone(self, router_id: str) -> None:
        """A router has no connection any more: nobody waits for results of its calls."""
        ...
