"""What the `bench` commands read from their command lines alike."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milliways.benchmarks.speed.bench_model import BENCH_NAME, ensure_bench_model
from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import resolve_model_dir
from milliways.runtime.user_cache import user_cache_dir


def find_model(name: str) -> Path:
    """The model's directory; `bench` is made when it is not there yet."""
    if name != BENCH_NAME:
        return resolve_model_dir(name)
    report("finding or making the bench model")
    return ensure_bench_model(user_cache_dir() / "models")


def counts_of(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas; none of an empty text.

    Raises:
        InvalidRequestError: it says something else.
    """
    try:
        counts = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        counts = (0,)
    if any(count < 1 for count in counts):
        raise InvalidRequestError(name, text, "whole numbers above 0, separated by commas")
    return counts


def names_of(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Names separated by commas; none of an empty text.

    Raises:
        InvalidRequestError: one is not allowed.
    """
    names = tuple(text.split(",")) if text else ()
    if unknown := [part for part in names if part not in allowed]:
        raise InvalidRequestError(name, unknown[0], f"of {', '.join(allowed)}")
    return names


def check_rounds(name: str, count: int) -> None:
    """Raises InvalidRequestError where nothing would be measured."""
    if count < 1:
        raise InvalidRequestError(name, count, "at least 1")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Writes every sample, where it is wanted."""
    if path is not None:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def report(message: str) -> None:
    """Says on standard error how far it is."""
    print(message, file=sys.stderr, flush=True)
