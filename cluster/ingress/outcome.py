"""The result of an HTTP request, for metrics and logs."""

import logging
from dataclasses import dataclass

from starlette.types import Scope

logger = logging.getLogger(__name__)

_KEY = "milliways.outcome"


@dataclass(slots=True)
class Outcome:
    """`code` replaces the sent status in the metrics: a stream can fail after status 200."""

    # The request's name, for answers and logs.
    request_id: str
    model: str = ""
    code: str = ""

    def fail(self, error: Exception, status: int) -> None:
        """Records an error that came after the status was sent."""
        self.code = str(status)
        log_error(error, status, self.request_id)


def put_outcome(scope: Scope, outcome: Outcome) -> None:
    scope[_KEY] = outcome


def outcome_of(scope: Scope) -> Outcome:
    """The outcome of a request, for its handler to fill in."""
    return scope[_KEY]


def log_error(error: Exception, status: int, request_id: str) -> None:
    """Logs the server's errors, bugs with a traceback; mistakes of clients are not logged."""
    if status >= 500:
        is_bug = status == 500
        logger.error("request %s: %s", request_id, error, exc_info=error if is_bug else None)
