"""Every error `model` raises for the world's faults (our own bugs are assertions).

ModelError
├── ModelConfigError            a field of config.json is missing, mistyped or impossible
├── CheckpointError        names the file and the reason
│   ├── UnsafePickleError      an opcode or global outside the allow-list; nothing was executed
│   ├── CorruptTensorError     truncated, malformed, or bytes that do not add up
│   ├── TensorLayoutError      missing or extra file, wrong shape or dtype
│   └── TensorValueError       NaN, infinite or non-positive scale (found by --verify)
├── TokenizerError         the tokenizer file is missing, unreadable or of another vocabulary
├── InvalidRequestError    names field, value and limit
│   └── PromptTooLongError     says both numbers
├── NonFiniteLogitsError   the model computed NaN or infinity: no token can be drawn
├── OutOfBlocksError       the KV block pool is empty
└── KernelsMissingError    no kernels here can compute what was asked for
"""

from pathlib import Path


class ModelError(Exception):
    """Root of the tree above."""


class ModelConfigError(ModelError):
    """A configuration that cannot describe a model; names field and value, and the file if any."""

    def __init__(self, field: str, value: object, reason: str, path: Path | None = None) -> None:
        place = f"{path}: " if path else ""
        super().__init__(f"{place}config field {field!r} = {value!r}: {reason}")
        self.field = field
        self.value = value
        self.reason = reason


class CheckpointError(ModelError):
    """A checkpoint that cannot be read; names the file and the reason."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


class UnsafePickleError(CheckpointError):
    """The file asks for code we do not run: a foreign global or opcode."""


class CorruptTensorError(CheckpointError):
    """The file is truncated, malformed, or its byte counts do not add up."""


class TensorLayoutError(CheckpointError):
    """A tensor is missing, superfluous, or not of the shape and dtype its place asks for."""


class TensorValueError(CheckpointError):
    """A tensor holds values no sane model has (NaN, infinities, scales <= 0)."""


class TokenizerError(ModelError):
    """The tokenizer is absent, unreadable, or does not fit the model's vocabulary."""


class InvalidRequestError(ModelError):
    """A request asks for something impossible; names field, value and limit."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field} = {value!r}: must be {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class PromptTooLongError(InvalidRequestError):
    """The prompt does not fit the context. The reference cuts it silently; we say both numbers."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__("prompt", f"{num_tokens} tokens", f"at most {max_tokens} tokens")
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


class NonFiniteLogitsError(ModelError):
    """The logits hold NaN or infinities, so that no token can be drawn from them."""

    def __init__(self) -> None:
        super().__init__("the model computed logits that are not finite; see inspect --verify")


class OutOfBlocksError(ModelError):
    """No free KV block is left and none can be evicted."""

    def __init__(self, num_needed: int, num_free: int) -> None:
        super().__init__(f"needs {num_needed} KV blocks, {num_free} are free")
        self.num_needed = num_needed
        self.num_free = num_free


class KernelsMissingError(ModelError):
    """No kernels here can compute what was asked for; says why."""
