"""The errors that `model` raises for faults of the world. Our own bugs are assertions.

ModelError
├── ModelConfigError       a field of config.json is missing, has a wrong type, or is impossible
├── CheckpointError        a file cannot be read or written; names the file and the reason
│   ├── UnsafePickleError      an opcode or global outside the allow-list; nothing was executed
│   ├── CorruptTensorError     truncated, malformed, or with sizes that contradict each other
│   ├── TensorLayoutError      a missing or extra file, a wrong shape or dtype
│   ├── TensorValueError       NaN, infinity, or a scale that is not positive (found by --verify)
│   ├── OtherModelError        the bytes are not those of the model that is served
│   └── ChangeableFileError    a mapped file may be changed by others while it is in use
├── ManifestError          a manifest of digests cannot be read, or is none
├── TokenizerError         the tokenizer is missing, unreadable, or has another vocabulary size
├── InvalidRequestError    names field, value and limit
│   └── PromptTooLongError     names both numbers of tokens
├── NonFiniteLogitsError   the model computed NaN or infinity: no token can be drawn
├── OutOfBlocksError       the KV block pool is empty
└── KernelsMissingError    no kernels here can compute what was asked for
"""

from pathlib import Path
from typing import Any


class PicklableError(Exception):
    """An error that keeps its message and its fields when it is pickled, as Ray does.

    Python pickles an exception as a call of its class with `args`, which is the message alone. That
    call fails, or gives other fields, for a class whose constructor takes something else.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[PicklableError], args: tuple[Any, ...], fields: dict[str, Any]
) -> PicklableError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class ModelError(PicklableError):
    """Root of the tree above."""


class ModelConfigError(ModelError):
    """A configuration that is invalid; names field and value, and the file if there is one."""

    def __init__(self, field: str, value: object, reason: str, path: Path | None = None) -> None:
        place = f"{path}: " if path else ""
        super().__init__(f"{place}config field {field!r} = {value!r}: {reason}")
        self.field = field
        self.value = value
        self.reason = reason


class CheckpointError(ModelError):
    """A checkpoint that cannot be read or written; names the file and the reason."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


class UnsafePickleError(CheckpointError):
    """The file has a global or an opcode that is not allowed. Nothing of it was executed."""


class CorruptTensorError(CheckpointError):
    """The file is truncated or malformed, or its sizes contradict each other."""


class TensorLayoutError(CheckpointError):
    """A tensor is missing or extra, or does not have the expected shape and dtype."""


class TensorValueError(CheckpointError):
    """A tensor holds a value that no model may have: NaN, infinity, or a scale <= 0."""


class OtherModelError(CheckpointError):
    """The bytes of a tensor or a file differ from those of the model that is served."""

    def __init__(self, path: Path | str, part: str, found: str, wanted: str) -> None:
        reason = f"{part} is not that of the model that is served: its digest is {found}"
        super().__init__(path, f"{reason}, and not {wanted}")
        self.part = part


class ChangeableFileError(CheckpointError):
    """A file that stays mapped could be overwritten while tokens are computed from it."""


class ManifestError(ModelError):
    """A file that should have a manifest of digests; names the file and what is wrong."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"manifest {path}: {reason}")
        self.path = path
        self.reason = reason


class TokenizerError(ModelError):
    """The tokenizer is missing or unreadable, or does not have the model's vocabulary size."""


class InvalidRequestError(ModelError):
    """A field of a request has an impossible value; names field, value and limit."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field} = {value!r}: must be {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class PromptTooLongError(InvalidRequestError):
    """The prompt is longer than the context. The reference cuts it silently; we refuse it."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__("prompt", f"{num_tokens} tokens", f"at most {max_tokens} tokens")
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


class NonFiniteLogitsError(ModelError):
    """The logits hold NaN or infinity, so that no token can be drawn from them."""

    def __init__(self) -> None:
        super().__init__(
            "the model computed logits that are not finite (NaN or infinity);"
            " `milliways inspect --verify` checks its weights"
        )


class OutOfBlocksError(ModelError):
    """No free KV block is left and none can be evicted."""

    def __init__(self, num_needed: int, num_free: int) -> None:
        super().__init__(f"{num_needed} KV blocks are needed, but only {num_free} are available")
        self.num_needed = num_needed
        self.num_free = num_free


class KernelsMissingError(ModelError):
    """No kernels on this machine can compute what was asked for; the message says why."""
