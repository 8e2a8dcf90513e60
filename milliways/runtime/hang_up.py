"""How native threads tell Python that a connection of theirs is over: they close a pipe."""

import os
from collections.abc import Callable
from selectors import EVENT_READ

from milliways.runtime.reactor import Reactor


class HangUp:
    """The end of a pipe that Python reads. Used in the reactor's thread.

    Invariant: the reactor watches `_read_fd` exactly while it is not None.
    """

    def __init__(self, reactor: Reactor, on_hang_up: Callable[[], None]) -> None:
        """`on_hang_up` is called once when the other end is closed, unless this is closed first."""
        self._reactor = reactor
        self._on_hang_up = on_hang_up
        # The end for the native thread, which owns it from now on.
        self._read_fd: int | None
        self._read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        reactor.register(self._read_fd, EVENT_READ, self._on_ready)

    def close(self) -> None:
        """Does not wait any more."""
        read_fd, self._read_fd = self._read_fd, None
        if read_fd is not None:
            self._reactor.unregister(read_fd)
            os.close(read_fd)

    def _on_ready(self, events: int) -> None:
        self.close()
        self._on_hang_up()
