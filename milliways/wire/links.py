"""How a router reaches a worker, whatever carries the bytes."""

from collections.abc import Callable
from typing import Protocol

from milliways.runtime.tasks import Pending
from milliways.wire.calls import Call, Fence, Result


class WorkerLink(Protocol):
    """A way to one life of one worker. Used from the router's thread only, and never blocks it."""

    @property
    def transport(self) -> str:
        """`direct`, `shm` or `grpc`."""
        ...

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        """Sends a call. The result may be a Refusal.

        Fails with PeerLostError when the way breaks; on no other account. Time limits are for the
        caller to watch: what comes after it stopped waiting is dropped.
        """
        ...

    def close(self) -> None:
        """Lets go of the way; calls still out fail with PeerLostError."""
        ...


class CallSink(Protocol):
    """A worker's core, as its transports see it. Used from the thread that computes only."""

    def submit(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        """Queues a call, or refuses it at once; `reply` is called once, sooner or later."""
        ...

    def router_gone(self, router_id: str) -> None:
        """The way to a router broke: nobody waits for its calls any more."""
        ...
