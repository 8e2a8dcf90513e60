"""Errors as gRPC statuses and back, so that an error keeps its type from a router to a client.

The canonical code says what a client can do about an error. Trailing metadata have the rest: its
type, the field, value and limit of a bad request, when to retry. Codes are strings here, so that
modules without I/O need not import gRPC.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import (
    ClusterError,
    DeadlineError,
    LeavingError,
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
# What was sent of a request whose server stops: its id, and how many tokens of each sample.
CURSOR_KEY = "milliways-cursor"
# In a router's initial metadata, sent when it admits a request: if the stream breaks later, this
# shows that the router had the request.
ACCEPTED_KEY = "milliways-accepted"

# gRPC refuses metadata of more than 8 KiB, and nobody reads more than this of a bad value.
_MAX_VALUE_CHARS = 120
_MAX_MESSAGE_CHARS = 1000

# Errors that have nothing but a message.
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
    """A value that is text already: its `repr` adds no quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def status_of(error: Exception) -> GrpcStatus:
    """The status of an error. An error that is not ours becomes "internal error"."""
    metadata: list[tuple[str, str]] = []
    if _is_public(error):
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
        if isinstance(error, LeavingError) and error.cursor:
            metadata.append((CURSOR_KEY, error.cursor))
    return GrpcStatus(
        code=code_of(error).grpc, message=describe(error), trailing_metadata=tuple(metadata)
    )


def error_of(message: str, trailing_metadata: Mapping[str, str]) -> Exception | None:
    """The error that a call ended with; None if the status names none of ours.

    Without a name, the peer or the connection broke, and the caller decides what to do.
    """
    kind = trailing_metadata.get(KIND_KEY, "")
    if kind == InvalidRequestError.__name__:
        return InvalidRequestError(
            trailing_metadata.get(FIELD_KEY, ""),
            Verbatim(trailing_metadata.get(VALUE_KEY, "")),
            trailing_metadata.get(LIMIT_KEY, ""),
        )
    if kind == LeavingError.__name__:
        cursor = trailing_metadata.get(CURSOR_KEY, "")
        return LeavingError(message, _retry_after_s(trailing_metadata), cursor=cursor)
    if kind in _RETRY_LATER:
        return _RETRY_LATER[kind](message, _retry_after_s(trailing_metadata))
    return _BY_MESSAGE[kind](message) if kind in _BY_MESSAGE else None


def describe(error: Exception) -> str:
    """An error in words for a client, of bounded length."""
    if isinstance(error, InvalidRequestError):
        return f"{error.field} = {abridged(error.value)}: must be {error.limit}"
    if not _is_public(error):
        return "internal error"
    return str(error)[:_MAX_MESSAGE_CHARS]


def abridged(value: object) -> Verbatim:
    """A value's `repr`, or its start and end. An abridged value stays the same."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = _MAX_VALUE_CHARS
    return Verbatim(brief.repr(value)[: 4 * _MAX_VALUE_CHARS])


def _is_public(error: Exception) -> bool:
    return isinstance(error, InvalidRequestError | ClusterError)


def _kind_of(error: Exception) -> str:
    """The error's name on the wire."""
    if isinstance(error, InvalidRequestError):
        return InvalidRequestError.__name__
    if isinstance(error, PeerError):
        # It does not help a client to know which worker it was.
        return UnavailableError.__name__
    return type(error).__name__


def _retry_after_s(trailing_metadata: Mapping[str, str]) -> float:
    text = trailing_metadata.get(RETRY_AFTER_KEY, "")
    return int(text) / 1000 if text.isdecimal() else 1.0


def _ascii(text: str) -> str:
    """Text for metadata, which has to be printable ASCII."""
    escaped = text.encode("ascii", "backslashreplace").decode("ascii")
    return "".join(char if char.isprintable() else " " for char in escaped)
