"""Every error the cluster raises for the world's faults, and the canonical code of each.

ClusterError
├── ConfigError            a setting names table, field, value and limit
├── PlacementError         the workers cannot hold the model; says what is needed, there, and short
├── StartupError           the cluster did not come up; says which actor waits for what
├── UnknownModelError      a request names a model that is not served here
├── OverloadedError        a bounded queue is full; `retry_after_s`
├── UnavailableError       nothing can serve the request now; `retry_after_s`
├── DeadlineError          the request's deadline passed
├── PoisonedRequestError   worker after worker died with the request; it is not tried again
├── ModelFaultError        the logits were not finite
└── PeerError              what a router learns of a worker; it acts on the type, never on the text
    ├── PeerLostError          the stream broke, or the worker is gone
    ├── PeerSilentError        no reply within the step's deadline
    └── RefusedError           the worker refused the message; `reason`

`CODES` maps what may reach a client to AIP-193's canonical codes and to HTTP statuses.
"""

from dataclasses import dataclass
from enum import Enum

from milliways.model.errors import InvalidRequestError


class ClusterError(Exception):
    """Root of the tree above."""


class ConfigError(ClusterError):
    """A setting that cannot be; names field, value and limit."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field} = {value!r}: must be {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class PlacementError(ClusterError):
    """The workers cannot hold the model as asked."""


class StartupError(ClusterError):
    """The cluster did not come up in time; says which actor waits for what."""


class UnknownModelError(ClusterError):
    """A request names a model that is not served here."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"model = {name!r}: must be {served!r}, the model served here")
        self.field = "model"


class RetryLaterError(ClusterError):
    """Root of what a client may try again, after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(RetryLaterError):
    """A bounded queue is full."""


class UnavailableError(RetryLaterError):
    """Nothing can serve the request now."""


class DeadlineError(ClusterError):
    """The request's deadline passed before its last token."""


class PoisonedRequestError(ClusterError):
    """Worker after worker died computing it; it is not passed on to kill the rest."""


class ModelFaultError(ClusterError):
    """The model computed logits that are not finite, so that no token can be drawn."""


class PeerError(ClusterError):
    """A worker did not do what a router asked; the message can be asked of another."""

    def __init__(self, worker_id: str, message: str) -> None:
        super().__init__(f"{worker_id}: {message}")
        self.worker_id = worker_id


class PeerLostError(PeerError):
    """The stream to the worker broke, or it is gone."""


class PeerSilentError(PeerError):
    """No reply came within the step's deadline: frozen, or far too slow."""


class RefusalReason(Enum):
    """Why a worker refuses a message of the data plane; the values are those of the wire."""

    STALE_EPOCH = 1
    STALE_INCARNATION = 2
    NOT_HELD = 3
    EXPIRED = 4
    OVERLOADED = 5
    MALFORMED = 6
    UNKNOWN_BATCH = 7
    FAULT = 8


class RefusedError(PeerError):
    """The worker answered, and refused."""

    def __init__(self, worker_id: str, reason: RefusalReason, message: str) -> None:
        super().__init__(worker_id, f"{reason.name}: {message}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Code:
    """How an error shows on the two surfaces; `kind` is OpenAI's `error.type`."""

    grpc: str
    http: int
    kind: str


# The first class that an error is of counts.
CODES: tuple[tuple[type[Exception], Code], ...] = (
    (InvalidRequestError, Code("INVALID_ARGUMENT", 400, "invalid_request_error")),
    (UnknownModelError, Code("NOT_FOUND", 404, "invalid_request_error")),
    (OverloadedError, Code("RESOURCE_EXHAUSTED", 429, "rate_limit_error")),
    (UnavailableError, Code("UNAVAILABLE", 503, "service_unavailable_error")),
    (PeerError, Code("UNAVAILABLE", 503, "service_unavailable_error")),
    (DeadlineError, Code("DEADLINE_EXCEEDED", 504, "timeout_error")),
    (PoisonedRequestError, Code("ABORTED", 500, "server_error")),
    (ModelFaultError, Code("INTERNAL", 500, "server_error")),
)
_OURS = Code("INTERNAL", 500, "server_error")


def code_of(error: Exception) -> Code:
    """How an error is told to a client; what is not in the table is a fault of ours."""
    return next((code for kind, code in CODES if isinstance(error, kind)), _OURS)
