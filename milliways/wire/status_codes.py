"""Errors as gRPC statuses and back, so that an error keeps its type from a router to a client.

The canonical code says what to do about an error; trailing metadata say the rest: its type, the
field, value and limit of a bad request, when to try again. Codes go by their names here, so that
nothing that only decides has to import gRPC.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import (
    ClusterError,
    DeadlineError,
    ModelFaultError,
    OverloadedError,
    PeerError,
    PoisonedRequestError,
    RetryLaterError,
    UnavailableError,
    UnknownModelError,
    code_of,
)

KIND_KEY = "milliways-error"
FIELD_KEY = "milliways-field"
VALUE_KEY = "milliways-value"
LIMIT_KEY = "milliways-limit"
RETRY_AFTER_KEY = "milliways-retry-after-ms"
# In a router's initial metadata, sent as soon as it admits a request: whoever sees a stream break
# can tell a router that died with the request from one that never had it.
ACCEPTED_KEY = "milliways-accepted"

# gRPC refuses metadata beyond 8 KiB, and nobody reads more than this of a bad value.
_MAX_VALUE_CHARS = 120
_MAX_MESSAGE_CHARS = 1000

# What a message alone makes anew.
_BY_MESSAGE: dict[str, type[ClusterError]] = {
    kind.__name__: kind for kind in (DeadlineError, PoisonedRequestError, ModelFaultError)
}
_RETRY_LATER: dict[str, type[RetryLaterError]] = {
    kind.__name__: kind for kind in (OverloadedError, UnavailableError)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcStatus:
    """What a gRPC call ends with; `code` is the name of a `grpc.StatusCode`."""

    code: str
    message: str
    trailing_metadata: tuple[tuple[str, str], ...] = ()


class Verbatim(str):
    """A value already written out, which no second `repr` may dress in quotes again."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def status_of(error: Exception) -> GrpcStatus:
    """How an error ends a call. What is no error of ours tells nothing of its inside."""
    metadata: list[tuple[str, str]] = []
    if _is_told(error):
        metadata.append((KIND_KEY, _kind_of(error)))
    if isinstance(error, InvalidRequestError):
        metadata += [
            (FIELD_KEY, _ascii(error.field)),
            (VALUE_KEY, _ascii(abridged(error.value))),
            (LIMIT_KEY, _ascii(error.limit)),
        ]
    elif isinstance(error, UnknownModelError):
        metadata.append((FIELD_KEY, error.field))
    elif isinstance(error, RetryLaterError):
        metadata.append((RETRY_AFTER_KEY, str(round(error.retry_after_s * 1000))))
    return GrpcStatus(
        code=code_of(error).grpc, message=describe(error), trailing_metadata=tuple(metadata)
    )


def error_of(message: str, trailing_metadata: Mapping[str, str]) -> Exception | None:
    """The error that a call ended with; None if its peer did not name one of ours.

    Without a name the peer broke, or something between: what to do then is the caller's choice.
    """
    kind = trailing_metadata.get(KIND_KEY, "")
    if kind == InvalidRequestError.__name__:
        return InvalidRequestError(
            trailing_metadata.get(FIELD_KEY, ""),
            Verbatim(trailing_metadata.get(VALUE_KEY, "")),
            trailing_metadata.get(LIMIT_KEY, ""),
        )
    if kind in _RETRY_LATER:
        return _RETRY_LATER[kind](message, _retry_after_s(trailing_metadata))
    return _BY_MESSAGE[kind](message) if kind in _BY_MESSAGE else None


def describe(error: Exception) -> str:
    """An error in words for a client, of bounded length."""
    if isinstance(error, InvalidRequestError):
        return f"{error.field} = {abridged(error.value)}: must be {error.limit}"
    if not _is_told(error):
        return "internal error"
    return str(error)[:_MAX_MESSAGE_CHARS]


def abridged(value: object) -> Verbatim:
    """A value as Python writes it, or its beginning and end. Twice is as good as once."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = _MAX_VALUE_CHARS
    return Verbatim(brief.repr(value)[: 4 * _MAX_VALUE_CHARS])


def _is_told(error: Exception) -> bool:
    return isinstance(error, InvalidRequestError | ClusterError)


def _kind_of(error: Exception) -> str:
    """The name under which the other side knows the error."""
    if isinstance(error, InvalidRequestError):
        return InvalidRequestError.__name__
    if isinstance(error, PeerError):
        # A client cannot act on which worker it was.
        return UnavailableError.__name__
    return type(error).__name__


def _retry_after_s(trailing_metadata: Mapping[str, str]) -> float:
    text = trailing_metadata.get(RETRY_AFTER_KEY, "")
    return int(text) / 1000 if text.isdecimal() else 1.0


def _ascii(text: str) -> str:
    """Metadata are printable ASCII."""
    escaped = text.encode("ascii", "backslashreplace").decode("ascii")
    return "".join(char if char.isprintable() else " " for char in escaped)
