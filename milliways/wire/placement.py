"""Experts, attention shards and their sizes: the terms of a placement."""

from dataclasses import dataclass

BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """One expert of one layer."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """The memory that the parts of a model need.

    `end_bytes` are those of the embedding, which also computes the logits, and of the final norm.
    """

    num_layers: int
    num_experts: int
    expert_bytes: int
    attention_layer_bytes: int
    end_bytes: int
    kv_layer_bytes_per_token: int
    # The model's context length, in tokens; a plan with a size of its own does not need it.
    sequence_len: int = 0

    @property
    def attention_bytes(self) -> int:
        return self.num_layers * self.attention_layer_bytes

    @property
    def all_experts_bytes(self) -> int:
        return self.num_layers * self.num_experts * self.expert_bytes

    @property
    def total_bytes(self) -> int:
        return self.all_experts_bytes + self.attention_bytes + self.end_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRange:
    """Consecutive layers, perhaps none, and whether embedding and logits are in the same shard."""

    first_layer: int
    num_layers: int
    has_ends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """What a worker has to load."""

    first_layer: int
    num_layers: int
    has_ends: bool
    experts: frozenset[ExpertId]

    @property
    def has_attention(self) -> bool:
        return self.num_layers > 0 or self.has_ends
