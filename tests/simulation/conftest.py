"""A simulation has its own clock, and neither waits nor speaks to anybody."""

import socket
import threading
import time

import pytest


class Forbidden(Exception):
    """A simulation left its thread, or its clock."""


@pytest.fixture(autouse=True)
def one_thread_without_network_or_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the machine would not be the same when a seed is run again."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise Forbidden("a socket, a thread or a real sleep in a simulation")

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(time, "sleep", refuse)
