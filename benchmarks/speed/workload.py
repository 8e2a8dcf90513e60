"""What is measured: decoding at a batch size, or the prefill of a prompt."""

import math
from dataclasses import dataclass
from enum import Enum

# The length of every sequence's prompt. It is computed before decoding is timed.
PROMPT_TOKENS = 64
MAX_STEPS = 32
_MIN_STEPS = 8


class Kind(Enum):
    """What a step does. Memory usually limits decoding, arithmetic usually limits prefill."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Workload:
    """`size` is the batch of a decode, or the length of the one prompt of a prefill."""

    kind: Kind
    size: int

    @property
    def title(self) -> str:
        return f"{self.kind.value} {self.size}"

    @property
    def num_steps(self) -> int:
        """Decode steps to time. Large batches have fewer steps, so that a round stays short."""
        if self.kind is Kind.PREFILL:
            return 1
        return max(_MIN_STEPS, MAX_STEPS // math.isqrt(self.size))

    @property
    def num_context_tokens(self) -> int:
        """The number of positions that one sequence needs."""
        return self.size if self.kind is Kind.PREFILL else PROMPT_TOKENS + self.num_steps

    def to_request(self) -> dict[str, int | str]:
        """The request that a contestant's program reads."""
        return {
            "kind": self.kind.value,
            "size": self.size,
            "prompt_tokens": PROMPT_TOKENS,
            "steps": self.num_steps,
        }


def workloads_of(batches: tuple[int, ...], prefills: tuple[int, ...]) -> tuple[Workload, ...]:
    """All decodes, then all prefills, in the given order; duplicates are dropped."""
    decodes = [Workload(Kind.DECODE, batch) for batch in batches]
    return tuple(dict.fromkeys([*decodes, *(Workload(Kind.PREFILL, size) for size in prefills)]))
