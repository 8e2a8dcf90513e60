"""Errors cross a process and keep their type, and what they know."""

import grpc
import pytest

from milliways.model.errors import InvalidRequestError, PromptTooLongError
from milliways.wire.errors import (
    CODES,
    DeadlineError,
    ModelFaultError,
    OverloadedError,
    PeerLostError,
    PoisonedRequestError,
    UnavailableError,
    UnknownModelError,
)
from milliways.wire.status_codes import abridged, describe, error_of, status_of

ERRORS = [
    InvalidRequestError("stop", ["a", 5], "strings"),
    PromptTooLongError(600, 512),
    OverloadedError("full", retry_after_s=2.5),
    UnavailableError("no router", retry_after_s=0.1),
    DeadlineError("late"),
    PoisonedRequestError("twice"),
    ModelFaultError("NaN"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_comes_back_as_it_went(error: Exception) -> None:
    status = status_of(error)
    back = error_of(status.message, dict(status.trailing_metadata))
    assert back is not None
    assert isinstance(error, type(back))
    assert str(back) == str(error)
    for name in ("field", "limit", "retry_after_s"):
        assert getattr(back, name, None) == getattr(error, name, None)
    # And once more: a value that was written out is not dressed again.
    assert status_of(back) == status


def test_every_code_is_one_of_grpc() -> None:
    assert {code.grpc for _, code in CODES} <= set(grpc.StatusCode.__members__)


def test_worker_that_was_lost_is_only_unavailable_to_others() -> None:
    status = status_of(PeerLostError("w1", "gone"))
    assert status.code == "UNAVAILABLE"
    assert type(error_of(status.message, dict(status.trailing_metadata))) is UnavailableError


def test_unknown_model_names_its_field() -> None:
    status = status_of(UnknownModelError("x", "demo"))
    assert (status.code, dict(status.trailing_metadata)["milliways-field"]) == (
        "NOT_FOUND",
        "model",
    )


def test_fault_of_ours_tells_nothing_of_its_inside() -> None:
    status = status_of(RuntimeError("the key is 123"))
    assert (status.code, status.message, status.trailing_metadata) == (
        "INTERNAL",
        "internal error",
        (),
    )
    assert error_of(status.message, {}) is None


@pytest.mark.parametrize("value", ["ü\n" * 100_000, ["x" * 1000] * 1000, 10**4000, {"a": {}}])
def test_metadata_are_short_printable_ascii(value: object) -> None:
    status = status_of(InvalidRequestError("prompt", value, "größer\x00"))
    for _, text in status.trailing_metadata:
        assert text.isascii() and text.isprintable() and len(text) < 4000
    assert len(status.message) < 2000


def test_abridging_twice_is_abridging_once() -> None:
    assert abridged(abridged("'" * 500)) == abridged("'" * 500)
    assert repr(abridged("a")) == "'a'"
    assert describe(InvalidRequestError("n", "5", "a number")) == "n = '5': must be a number"


@pytest.mark.parametrize("text", ["", "x", "-5", "²"])
def test_strange_retry_after_is_a_second(text: str) -> None:
    metadata = {"milliways-error": "OverloadedError", "milliways-retry-after-ms": text}
    error = error_of("full", metadata)
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 1.0
