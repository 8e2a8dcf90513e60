"""Fields of OpenAI's API that this server does not support.

Fields that do not change the output are ignored. Fields that would change it are refused by name,
unless their value asks for the output that the client gets anyway. If they were ignored, the client
would get another output than it asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from milliways.model.errors import InvalidRequestError
from milliways.wire.status_codes import abridged

# These label, bill, store or speed up a request. The tokens are the same.
IGNORED = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The values, besides null, that a refused field may have, and why others are refused."""

    accepted: tuple[Any, ...] = ()
    why: str = "it is not supported"


REFUSED: Mapping[str, Unsupported] = {
    "suffix": Unsupported(("",), "the model only continues a text"),
    "tools": Unsupported(([],), "tools are not supported"),
    "tool_choice": Unsupported(("none", "auto"), "tools are not supported"),
    "functions": Unsupported(([],), "functions are not supported"),
    "function_call": Unsupported(("none", "auto"), "functions are not supported"),
    "response_format": Unsupported(({"type": "text"},), "only text is supported"),
    "modalities": Unsupported((["text"],), "only text is supported"),
    "audio": Unsupported((), "only text is supported"),
    "web_search_options": Unsupported(),
    "reasoning_effort": Unsupported(("none",), "the model has no separate reasoning"),
    "verbosity": Unsupported(),
}


def drop_foreign_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without the fields above.

    Raises:
        InvalidRequestError: a field asks for something that is not supported.
    """
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name in REFUSED:
            _check_harmless(name, value, REFUSED[name])
        elif name not in IGNORED:
            kept[name] = value
    return kept


def _check_harmless(name: str, value: object, unsupported: Unsupported) -> None:
    if value is not None and value not in unsupported.accepted:
        raise InvalidRequestError(name, abridged(value), f"left out: {unsupported.why}")
