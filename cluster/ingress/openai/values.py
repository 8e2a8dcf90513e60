"""Values of several types, which are parsed by hand: an error names the one place that is wrong.

A validator that tries one type after another would name all types that would have been right.
"""

from collections.abc import Mapping
from typing import cast

from milliways.model.errors import InvalidRequestError
from milliways.wire.status_codes import Verbatim, abridged

MAX_PROMPTS = 64
_TEXT_PARTS = ("text", "input_text", "output_text")


def parse_prompts(value: object) -> list[str | tuple[int, ...]]:
    """The prompts of a completion: a text, a list of token ids, or a list of either.

    Raises:
        InvalidRequestError: an item is invalid; the error names its place in the list.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequestError("prompt", abridged(value), "a string or a list")
    items = cast(list[object], value)
    if items and type(items[0]) is int:
        return [_token_ids("prompt", items)]
    if not 0 < len(items) <= MAX_PROMPTS:
        number = Verbatim(f"{len(items)} prompts")
        raise InvalidRequestError("prompt", number, f"1 to {MAX_PROMPTS} prompts")
    if isinstance(items[0], str):
        return [checked_text(f"prompt.{i}", item) for i, item in enumerate(items)]
    return [_token_ids(f"prompt.{i}", item) for i, item in enumerate(items)]


def parse_stop(value: object) -> tuple[str, ...]:
    """Stop strings, given as none, one, or a list. The request checks their number and length."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InvalidRequestError("stop", abridged(value), "a string or a list of strings")
    items = cast(list[object], value)
    return tuple(checked_text(f"stop.{i}", item) for i, item in enumerate(items))


def parse_content(name: str, value: object) -> str:
    """A message's text, given as a string or as a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(name, abridged(value), "a string or a list of text parts")
    parts = cast(list[object], value)
    return "".join(_part_text(f"{name}.{i}", part) for i, part in enumerate(parts))


def parse_logit_bias(value: Mapping[str, float]) -> dict[int, float]:
    """Biases by token id. In JSON, the token ids are strings."""
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequestError("logit_bias", abridged(key), "keyed by token ids")
        biases[int(key)] = bias
    return biases


def _part_text(name: str, part: object) -> str:
    if not isinstance(part, dict):
        raise InvalidRequestError(name, abridged(part), "an object")
    fields = cast(dict[str, object], part)
    if fields.get("type") not in _TEXT_PARTS:
        raise InvalidRequestError(f"{name}.type", abridged(fields.get("type")), "'text'")
    return checked_text(f"{name}.text", fields.get("text"))


def checked_text(name: str, value: object) -> str:
    """A text; raises InvalidRequestError if the value is none."""
    if not isinstance(value, str):
        raise InvalidRequestError(name, abridged(value), "a string")
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InvalidRequestError(name, abridged(value), "a list of token ids")
    items = cast(list[object], value)
    for i, item in enumerate(items):
        if type(item) is not int:
            raise InvalidRequestError(f"{name}.{i}", abridged(item), "a token id")
    return tuple(cast(list[int], items))


def check_range(name: str, value: int | None, least: int, most: int | None) -> None:
    """Raises unless the value is left out or between both."""
    if value is None or (least <= value and (most is None or value <= most)):
        return
    limit = f"at least {least}" if most is None else f"between {least} and {most}"
    raise InvalidRequestError(name, value, limit)
