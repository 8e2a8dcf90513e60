"""The least that a step must read and compute, and how fast the machine could do that.

Counted are every weight that the step uses, once, at one byte (the release and the main contestants
have 8-bit weights), and two operations for each weight and token. Scales, norms, the gate, the KV
cache and attention are not counted: together they are a few percent at these lengths. So a ceiling
is a little too high, never too low, for 8-bit weights and float32 arithmetic. With int8 arithmetic,
an arithmetic-bound workload may be faster than its ceiling.
"""

from dataclasses import dataclass
from enum import Enum

from milliways.benchmarks.speed.workload import Kind, Workload
from milliways.model.config import ModelConfig

BYTES_PER_WEIGHT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """The measured rates of this machine's memory and arithmetic."""

    read_bytes_per_s_1_thread: float
    read_bytes_per_s: float
    flops_per_s_1_thread: float
    flops_per_s: float


class Bound(Enum):
    """The limit of the machine that a workload reaches first."""

    MEMORY = "memory"
    ARITHMETIC = "arithmetic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step of a workload: all tokens of a prefill, or one token of each sequence."""

    num_tokens: int
    read_bytes: float
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The speed that no implementation with 8-bit weights and float32 sums can exceed."""

    tokens_per_s: float
    bound: Bound


def work_of(config: ModelConfig, workload: Workload) -> Work:
    """The least that one step of a workload reads and computes."""
    num_tokens = workload.size
    # A prefill needs the logits of its last token only.
    num_logits = num_tokens if workload.kind is Kind.DECODE else 1
    expert_weights = config.num_layers * 3 * config.emb_size * config.ffn_size
    attention_weights = config.num_layers * 2 * config.emb_size * (config.q_size + config.kv_size)
    head_weights = config.vocab_size * config.emb_size
    num_read = (
        attention_weights + head_weights + expert_weights * distinct_experts(config, num_tokens)
    )
    num_used = num_tokens * (attention_weights + expert_weights * config.num_selected_experts)
    return Work(
        num_tokens=num_tokens,
        read_bytes=num_read * BYTES_PER_WEIGHT,
        flops=2.0 * (num_used + num_logits * head_weights),
    )


def distinct_experts(config: ModelConfig, num_tokens: int) -> float:
    """The expected number of experts of a layer that are chosen, if all are equally likely."""
    idle_share = 1 - config.num_selected_experts / config.num_experts
    return config.num_experts * (1 - idle_share**num_tokens)


def ceiling(work: Work, limits: MachineLimits) -> Ceiling:
    """The ceiling of a step: reading and computing overlap completely."""
    read_s = work.read_bytes / limits.read_bytes_per_s
    compute_s = work.flops / limits.flops_per_s
    bound = Bound.MEMORY if read_s >= compute_s else Bound.ARITHMETIC
    return Ceiling(tokens_per_s=work.num_tokens / max(read_s, compute_s), bound=bound)
