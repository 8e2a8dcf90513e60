"""The errors that the API raises, for `except` clauses.

ModelError
├── InvalidRequestError         names field, value and limit
│   └── PromptTooLongError
├── CheckpointError, ModelConfigError, TokenizerError
├── KernelsMissingError         like those above: the model cannot be used
└── NonFiniteLogitsError        the model computed NaN or infinity
ClusterError
├── ConfigError                 an option of a client names field, value and limit
├── RetryLaterError             has `retry_after_s`
│   ├── OverloadedError         the server's queue is full
│   └── UnavailableError        no server could be reached, or none can serve now
├── DeadlineError               the time limit of the call passed
├── PoisonedRequestError, ModelFaultError   the servers could not compute the request
├── CallRefusedError            the server refused for another reason; `code`
└── StreamChangedError          another server went on with another model or other tokens
"""

from milliways.model.errors import (
    CheckpointError,
    InvalidRequestError,
    KernelsMissingError,
    ModelConfigError,
    ModelError,
    NonFiniteLogitsError,
    PromptTooLongError,
    TokenizerError,
)
from milliways.wire.errors import (
    ClusterError,
    ConfigError,
    DeadlineError,
    ModelFaultError,
    OverloadedError,
    PoisonedRequestError,
    RetryLaterError,
    UnavailableError,
)

__all__ = [
    "CallRefusedError",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DeadlineError",
    "InvalidRequestError",
    "KernelsMissingError",
    "ModelConfigError",
    "ModelError",
    "ModelFaultError",
    "NonFiniteLogitsError",
    "OverloadedError",
    "PoisonedRequestError",
    "PromptTooLongError",
    "RetryLaterError",
    "StreamChangedError",
    "TokenizerError",
    "UnavailableError",
]


class CallRefusedError(ClusterError):
    """A server refused a call and named no error of ours; `code` is that of gRPC."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class StreamChangedError(ClusterError):
    """The server that goes on has another model, or other tokens, than the one that broke off."""
