"""What became of an HTTP request, for its metrics and its log line."""

import logging
from dataclasses import dataclass

from starlette.types import Scope

logger = logging.getLogger(__name__)

_KEY = "milliways.outcome"


@dataclass(slots=True)
class Outcome:
    """`code` overrides the status that went out: a stream may fail after its 200."""

    request_id: str
    model: str = ""
    code: str = ""

    def fail(self, error: Exception, status: int) -> None:
        """Notes an error that the status could not tell any more."""
        self.code = str(status)
        log_error(error, status, self.request_id)


def put_outcome(scope: Scope, outcome: Outcome) -> None:
    scope[_KEY] = outcome


def outcome_of(scope: Scope) -> Outcome:
    """The outcome to be filled in by whoever handles the request."""
    return scope[_KEY]


def log_error(error: Exception, status: int, request_id: str) -> None:
    """A fault of ours with its trace; what a client did wrong is the client's to know."""
    if status >= 500:
        is_bug = status == 500
        logger.error("request %s: %s", request_id, error, exc_info=error if is_bug else None)
