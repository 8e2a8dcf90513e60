"""Turns exceptions into OpenAI's error objects and HTTP status codes."""

import math
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from milliways.model.errors import InvalidRequestError, PromptTooLongError
from milliways.wire.errors import LeavingError, RetryLaterError, UnknownModelError, code_of
from milliways.wire.status_codes import describe

# `error.code` for the errors that have one; all but the last are OpenAI's.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (PromptTooLongError, "context_length_exceeded"),
    (InvalidRequestError, "invalid_value"),
    (UnknownModelError, "model_not_found"),
    (LeavingError, "server_leaving"),
)


def error_body(error: Exception) -> dict[str, Any]:
    """The JSON body of an error, as OpenAI's clients expect it."""
    if isinstance(error, HTTPException):
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return _body(str(error.detail), kind, None, None)
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    field = getattr(error, "field", None)
    return _body(describe(error), code_of(error).kind, field, code)


def error_response(error: Exception) -> JSONResponse:
    """The complete response to an error: status, headers and body."""
    return JSONResponse(error_body(error), http_status(error), headers=_headers(error))


def http_status(error: Exception) -> int:
    return error.status_code if isinstance(error, HTTPException) else code_of(error).http


def refusal(status: HTTPStatus, message: str) -> HTTPException:
    """The error for a wrong path, method, body size or content type."""
    return HTTPException(status.value, message)


def _headers(error: Exception) -> dict[str, str]:
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
    elif isinstance(error, RetryLaterError):
        # In whole seconds. With 0 all clients would retry at once.
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return headers


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
