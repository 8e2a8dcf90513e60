"""How busy a router is: what ingress replicas compare routers by, and what routers report.

What makes a new request wait is counted: sequences, and prompt tokens that are still to be
computed. Requests are not counted, because a request may have 64 samples. Each sequence takes a row
of every step and one of the `max_running` places, whether it runs or waits for a place. Prompt
tokens share the steps with these rows, so a long prompt delays later ones by several steps. Tokens
that will be drawn are not counted: nobody knows how many there will be before a stop.
"""

from dataclasses import dataclass

# So many prompt tokens delay a new request about as much as one sequence: half of what a step
# computes by default. With an eighth of that, or without prompt tokens, the slowest hundredth of
# the requests in tests/simulation/replicas.py waited longer.
PROMPT_TOKENS_PER_SEQUENCE = 64


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that run or wait, and prompt tokens that are still to be computed for them."""

    num_sequences: int = 0
    num_prompt_tokens: int = 0

    @property
    def weight(self) -> float:
        """One number to compare routers by, in sequences."""
        return self.num_sequences + self.num_prompt_tokens / PROMPT_TOKENS_PER_SEQUENCE

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.num_sequences + other.num_sequences,
            self.num_prompt_tokens + other.num_prompt_tokens,
        )

    def __sub__(self, other: "Load") -> "Load":
        return Load(
            self.num_sequences - other.num_sequences,
            self.num_prompt_tokens - other.num_prompt_tokens,
        )
