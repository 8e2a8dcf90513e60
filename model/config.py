"""The sizes and constants of a model, checked once and never changed.

The fields are those of the reference's configuration (xai-org/grok-1, run.py). A model directory
may have its own values in `config.json`. Without that file, Grok-1's constants are used.
"""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from milliways.model.errors import ModelConfigError

CONFIG_FILE = "config.json"

# Sizes are used as int32 indices, multipliers as float32.
_LARGEST_SIZE = 2**31 - 1
_LARGEST_MULTIPLIER = 3.4e38
# Grok-1 has 64. A typing error must not make us list the files of a million layers.
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a model. All sizes count elements, not bytes.

    Raises:
        ModelConfigError: a field has the wrong type, is out of range, or contradicts another one.
    """

    emb_size: int
    key_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    vocab_size: int
    ffn_size: int
    num_experts: int
    num_selected_experts: int
    sequence_len: int
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    # Despite its name it scales the attention logits, not the output.
    attn_output_multiplier: float
    pad_token: int = 0
    eos_token: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number(field.name, getattr(self, field.name), whole=field.type is int)
        if self.num_q_heads % self.num_kv_heads:
            raise ModelConfigError(
                "num_q_heads",
                self.num_q_heads,
                f"must be a multiple of num_kv_heads = {self.num_kv_heads}",
            )
        if self.num_selected_experts > self.num_experts:
            raise ModelConfigError(
                "num_selected_experts",
                self.num_selected_experts,
                f"must be at most num_experts = {self.num_experts}",
            )
        if self.key_size % 2:
            raise ModelConfigError(
                "key_size", self.key_size, "must be even, for the rotary embedding"
            )
        for name in ("pad_token", "eos_token"):
            if getattr(self, name) >= self.vocab_size:
                raise ModelConfigError(
                    name, getattr(self, name), f"must be below vocab_size = {self.vocab_size}"
                )

    @property
    def q_size(self) -> int:
        """Width of all query heads together, H * K (need not equal emb_size)."""
        return self.num_q_heads * self.key_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together, R * K."""
        return self.num_kv_heads * self.key_size


def ffn_size(emb_size: int, widening_factor: float) -> int:
    """The reference's expert width: 2/3 of the widened size, rounded up to a multiple of 8."""
    size = int(widening_factor * emb_size) * 2 // 3
    return size + (8 - size) % 8


def load_config(model_dir: Path) -> ModelConfig:
    """The configuration of a model directory; Grok-1's if the directory has no `config.json`.

    Raises:
        ModelConfigError: the file is not a JSON object, or a field is missing or impossible. The
            message names the file.
    """
    path = model_dir / CONFIG_FILE
    if not path.is_file():
        return GROK_1
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelConfigError(
            CONFIG_FILE, str(path), f"cannot be read: {error.strerror}"
        ) from error
    return parse_config(content, path)


def parse_config(content: bytes, path: Path) -> ModelConfig:
    """The configuration in the content of a file.

    Raises:
        ModelConfigError: as `load_config`.
    """
    raw = _parse_object(content, path)
    try:
        return config_from_dict(raw)
    except ModelConfigError as error:
        raise ModelConfigError(error.field, error.value, error.reason, path) from None


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(CONFIG_FILE, str(path), f"is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelConfigError(CONFIG_FILE, str(path), "is not a JSON object")
    return raw


def config_from_dict(raw: dict[str, Any]) -> ModelConfig:
    """Reads the known fields and ignores others. `widening_factor` may stand for `ffn_size`.

    Raises:
        ModelConfigError: a field is missing or impossible.
    """
    values = {field.name: raw[field.name] for field in fields(ModelConfig) if field.name in raw}
    if "ffn_size" not in values and "widening_factor" in raw:
        _check_number("emb_size", raw.get("emb_size"), whole=True)
        _check_number("widening_factor", raw["widening_factor"], whole=False)
        values["ffn_size"] = ffn_size(raw["emb_size"], raw["widening_factor"])
    for field in fields(ModelConfig):
        if field.name not in values and field.default is MISSING:
            raise ModelConfigError(field.name, None, "missing")
    return ModelConfig(**values)


def _check_number(name: str, value: object, *, whole: bool) -> None:
    """Checks type and range: token ids may be 0, every other number must be above 0.

    A float field accepts an int.
    """
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        reason = "must be a whole number" if whole else "must be a number"
        raise ModelConfigError(name, value, reason)
    lowest = 0 if name.endswith("_token") else 1 if whole else 0.0
    largest = _largest(name, whole=whole)
    # Every comparison with NaN is false, so NaN is out of range.
    if not lowest <= value <= largest or (not whole and value == 0):
        least = "at least" if whole else "above"
        raise ModelConfigError(name, value, f"must be {least} {lowest} and at most {largest}")


def _largest(name: str, *, whole: bool) -> int | float:
    if name == "num_layers":
        return MAX_LAYERS
    return _LARGEST_SIZE if whole else _LARGEST_MULTIPLIER


GROK_1 = ModelConfig(
    emb_size=6144,
    key_size=128,
    num_q_heads=48,
    num_kv_heads=8,
    num_layers=64,
    vocab_size=131072,
    ffn_size=32768,
    num_experts=8,
    num_selected_experts=2,
    sequence_len=8192,
    embedding_multiplier_scale=78.38367176906169,
    output_multiplier_scale=0.5773502691896257,
    attn_output_multiplier=0.08838834764831845,
)
