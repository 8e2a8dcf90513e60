"""Counts what JAX compiles in this process, in any thread.

A program that comes from the cache on disk counts too: the thread that asks for it waits, and a
machine with an empty cache would compile it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Gives a list that gets the name of each program, where JAX says it, as it is compiled."""
    names: list[str] = []

    def note(event: str, duration_s: float, **details: Any) -> None:
        if event == _EVENT:
            names.append(str(details.get("fun_name", "?")))

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        monitoring.unregister_event_duration_listener(note)
