"""Parses the arguments that the `bench` commands share."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milliways.benchmarks.speed.bench_model import MODEL_NAMES, ensure_bench_model
from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import resolve_model_dir
from milliways.runtime.user_cache import user_cache_dir


def find_model(name: str) -> Path:
    """The model's directory; `bench` and `deep` are made if the cache does not have them yet."""
    if name not in MODEL_NAMES:
        return resolve_model_dir(name)
    report(f"looking for the {name} model; making it if it is missing")
    return ensure_bench_model(user_cache_dir() / "models", name)


def counts_of(name: str, text: str) -> tuple[int, ...]:
    """Parses whole numbers above 0, separated by commas; an empty text gives no numbers.

    Raises:
        InvalidRequestError: the text is of another form.
    """
    try:
        counts = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        counts = (0,)
    if any(count < 1 for count in counts):
        raise InvalidRequestError(name, text, "whole numbers above 0, separated by commas")
    return counts


def names_of(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Parses names separated by commas; an empty text gives no names.

    Raises:
        InvalidRequestError: a name is not allowed.
    """
    names = tuple(text.split(",")) if text else ()
    if unknown := [part for part in names if part not in allowed]:
        raise InvalidRequestError(name, unknown[0], f"one of {', '.join(allowed)}")
    return names


def check_rounds(name: str, count: int) -> None:
    """Raises InvalidRequestError if the count is below 1."""
    if count < 1:
        raise InvalidRequestError(name, count, "at least 1")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Writes the values to a file; does nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def report(message: str) -> None:
    """Prints progress on standard error."""
    print(message, file=sys.stderr, flush=True)
