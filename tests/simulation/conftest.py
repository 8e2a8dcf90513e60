"""Simulations use a fake clock; real sleeping, threads and sockets are forbidden."""

import socket
import threading
import time

import pytest


class Forbidden(Exception):
    """A simulation used a thread, a socket or real time."""


@pytest.fixture(autouse=True)
def one_thread_without_network_or_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """These would make two runs of one seed differ."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise Forbidden("a socket, a thread or a real sleep in a simulation")

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(time, "sleep", refuse)
