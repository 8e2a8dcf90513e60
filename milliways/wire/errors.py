"""Every error that the cluster raises for faults outside its code, and the code of each.

ClusterError
├── ConfigError            a setting names table, field, value and limit
├── PlacementError         the workers cannot hold the model; says how much is missing
├── ChangeRefusedError     a running cluster cannot take these settings; says which, and why
├── StartupError           the cluster did not start; says which actor waits for which resource
├── RayGoneError           Ray's own processes ended or are silent; says which and how
├── UnknownModelError      a request names a model that is not served here
├── OverloadedError        a bounded queue is full; `retry_after_s`
├── UnavailableError       nothing can serve the request now; `retry_after_s`
│   └── LeavingError           this server stops; another goes on with the request
├── DeadlineError          the request's deadline passed
├── PoisonedRequestError   several workers died with the request; it is not tried again
├── ModelFaultError        the logits were not finite
└── PeerError              a worker did not answer a router, which acts on the type, not on the text
    ├── PeerLostError          the stream broke, or the worker is gone
    ├── PeerSilentError        no reply within the step's deadline
    └── RefusedError           the worker refused the message; `reason`

`CODES` maps the errors that may reach a client to AIP-193's canonical codes and HTTP statuses.
"""

from dataclasses import dataclass
from enum import Enum

from milliways.model.errors import InvalidRequestError, PicklableError


class ClusterError(PicklableError):
    """Root of the tree above."""


class ConfigError(ClusterError):
    """An invalid setting; names field, value and limit."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field} = {value!r}: must be {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class PlacementError(ClusterError):
    """The workers cannot hold the model as configured."""


class ChangeRefusedError(ClusterError):
    """A running cluster cannot take these settings; everything stays as it was."""


class StartupError(ClusterError):
    """The cluster did not start in time; says which actor waits for which resource."""


class RayGoneError(ClusterError):
    """The Ray cluster under a running Milliways is gone; says which of its processes, and how."""


class UnknownModelError(ClusterError):
    """A request names a model that is not served here."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"model = {name!r}: must be {served!r}, the model served here")
        self.field = "model"


class RetryLaterError(ClusterError):
    """Root of the errors after which a client may retry, after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(RetryLaterError):
    """A bounded queue is full."""


class UnavailableError(RetryLaterError):
    """Nothing can serve the request now."""


class LeavingError(UnavailableError):
    """This server stops before the request has ended; another server can go on with it.

    `cursor` says what was sent: the request's id and how many tokens of each sample. It is empty if
    nothing was sent.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0, *, cursor: str = "") -> None:
        super().__init__(message, retry_after_s)
        self.cursor = cursor


class DeadlineError(ClusterError):
    """The request's deadline passed before its last token."""


class PoisonedRequestError(ClusterError):
    """Several workers died computing it; it is not sent to the remaining ones."""


class ModelFaultError(ClusterError):
    """The model computed logits that are not finite, so no token can be drawn."""


class PeerError(ClusterError):
    """A worker did not do what a router asked; another worker may."""

    def __init__(self, worker_id: str, message: str) -> None:
        super().__init__(f"{worker_id}: {message}")
        self.worker_id = worker_id


class PeerLostError(PeerError):
    """The connection to the worker broke, or the worker is gone."""


class PeerSilentError(PeerError):
    """The worker did not answer before the step's deadline: it is frozen, or far too slow."""


class RefusalReason(Enum):
    """Why a worker refuses a call; the values are those of the wire."""

    STALE_EPOCH = 1
    STALE_INCARNATION = 2
    NOT_HELD = 3
    EXPIRED = 4
    OVERLOADED = 5
    MALFORMED = 6
    UNKNOWN_BATCH = 7
    FAULT = 8


class RefusedError(PeerError):
    """The worker answered with a refusal."""

    def __init__(self, worker_id: str, reason: RefusalReason, message: str) -> None:
        super().__init__(worker_id, f"{reason.name}: {message}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Code:
    """An error's code in gRPC and HTTP; `kind` is OpenAI's `error.type`."""

    grpc: str
    http: int
    kind: str


# The first class that an error is an instance of counts.
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
    """The code that a client gets; an error that is not in the table is a bug of ours."""
    return next((code for kind, code in CODES if isinstance(error, kind)), _OURS)
