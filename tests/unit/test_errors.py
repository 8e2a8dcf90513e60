"""Every error class of ours crosses processes: pickled, it keeps its text and its fields."""

import importlib
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from milliways.wire.errors import PeerError, RefusalReason
from tests.served_cluster import REPOSITORY

FOLDERS = ("model", "milliways", "router", "workers", "cluster", "benchmarks")
# Only the modules that declare one are imported: others need Ray, or a GPU.
_DECLARATION = re.compile(r"^class (\w+)\((?:\w+\.)?(\w*(?:Error|Exception))\):", re.MULTILINE)
SAMPLES: dict[str, Any] = {
    str(kind): value
    for kind, value in (
        (str, "a text"),
        (object, ("any", 1)),
        (int, 7),
        (float, 2.5),
        (Path, Path("/a/file")),
        (Path | str, Path("/a/file")),
        (Path | None, None),
        (list[str], ["a", "b"]),
        (RefusalReason, RefusalReason.NOT_HELD),
        (PeerError, PeerError("worker-1", "is gone")),
    )
}


def error_classes() -> list[type[Exception]]:
    found: list[type[Exception]] = []
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            if path.is_symlink() or any(parent.is_symlink() for parent in path.parents):
                continue
            names = [name for name, _ in _DECLARATION.findall(path.read_text())]
            if names and "demo" not in path.parts:
                parts = path.relative_to(REPOSITORY).with_suffix("").parts
                parts = parts if parts[0] == "milliways" else ("milliways", *parts)
                module = importlib.import_module(".".join(parts))
                found += [getattr(module, name) for name in names]
    return found


def example(kind: type[Exception]) -> Exception:
    """An error with a value for each parameter of its constructor."""
    makes_itself = next(base for base in kind.__mro__ if "__init__" in vars(base))
    if not makes_itself.__module__.startswith("milliways."):
        return kind("what happened")
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in inspect.signature(makes_itself).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.append("what happened")
            continue
        value = SAMPLES[str(parameter.annotation)]
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = value
        else:
            positional.append(value)
    return kind(*positional, **named)


CLASSES = error_classes()


def test_the_classes_are_found() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert {"CheckpointError", "ConfigError", "RefusedError", "WorkerDiedError"} <= names
    assert len(CLASSES) > 30


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind: type[Exception]) -> None:
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert repr(vars(copy)) == repr(vars(error))
