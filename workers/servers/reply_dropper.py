"""Drops replies, to test what routers do when a worker that is alive does not answer."""

from collections.abc import Callable

from milliways.wire.calls import Call, Fence, Result
from milliways.wire.exchange import ExchangeNode
from milliways.wire.links import CallSink
from milliways.workers.servers.intake import RouterSessions


class ReplyDropper:
    """Takes the sessions' calls in place of their core, from `install` to `remove`.

    The core computes every call, but the replies to the next `num_left` calls are dropped. Normally
    there is no dropper, so serving pays nothing for it. Used in the compute thread. With a `node`,
    its answers are dropped instead: nearly all calls are answered there.
    """

    def __init__(
        self, sessions: RouterSessions, count: int, node: ExchangeNode | None = None
    ) -> None:
        self._num_left = count
        self._node = node
        self._sessions = sessions
        self._core: CallSink = sessions.sink

    def install(self) -> None:
        """Begins to drop replies."""
        if self._node is not None:
            self._node.drop_answers(self._num_left)
        else:
            self._sessions.sink = self

    @property
    def num_left(self) -> int:
        """Replies that are still to be dropped; any thread may read it."""
        return self._node.num_to_drop if self._node is not None else self._num_left

    def remove(self) -> int:
        """Stops dropping; returns how many replies were not dropped, as too few calls came."""
        num_left = self.num_left
        if self._node is not None:
            self._node.drop_answers(0)
        else:
            self._sessions.sink = self._core
        return num_left

    def submit(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        if self._num_left:
            self._num_left -= 1
            reply = _drop
        self._core.submit(call, fence, reply)

    def router_gone(self, router_id: str) -> None:
        self._core.router_gone(router_id)


def _drop(result: Result) -> None:
    pass
