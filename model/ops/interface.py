"""What an implementation of the numerical kernels must offer."""

from typing import Protocol

from jaxtyping import Array, Bool, Float, Int, UInt32

from milliways.model.params import ExpertParams, Matrix
from milliways.model.sampling import RowSummary


class Ops(Protocol):
    """Kernels over rows. T is any number of rows; float inputs are float32 or bfloat16.

    Implementations are hashable and stateless, so that they can be static arguments of a jit.
    """

    @property
    def min_rows(self) -> int:
        """Fewer rows cost as much as these, so a step is padded to them; a power of two."""
        ...

    @property
    def fuses_steps(self) -> bool:
        """Whether a whole step is quick to compile as one program."""
        ...

    def rms_norm(
        self, hidden_TD: Float[Array, "T D"], scale_D: Float[Array, " D"]
    ) -> Float[Array, "T D"]:
        """x * rsqrt(mean(x^2) + 1e-5) * scale, in float32."""
        ...

    def linear(self, rows_TK: Float[Array, "T K"], matrix: Matrix) -> Float[Array, "T N"]:
        """rows @ W with W = weight * scales, summed in float32 and returned in float32."""
        ...

    def rope(
        self, heads_THK: Float[Array, "T H K"], positions_T: Int[Array, " T"]
    ) -> Float[Array, "T H K"]:
        """Rotary embedding, halves layout: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

        Angles are position * 10000^(-2i/K), in float32.
        """
        ...

    def gate(
        self, hidden_TD: Float[Array, "T D"], gate_DE: Float[Array, "D E"], num_selected: int
    ) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
        """Softmax over all experts in float32, then the best A, not renormalised.

        Ties go to the lower expert id. Columns stand in the order of the gate's ranking.
        """
        ...

    def expert_ffn(
        self,
        hidden_TD: Float[Array, "T D"],
        expert_ids_TA: Int[Array, "T A"],
        experts: ExpertParams,
    ) -> Float[Array, "T A D"]:
        """down(gelu(x @ gate) * (x @ up)) of each token's chosen experts, unweighted, in float32.

        Ids index the stack of `experts`; an id outside it belongs to another shard and yields 0.
        Only chosen experts are read.
        """
        ...

    def weigh(
        self, outputs_TAD: Float[Array, "T A D"], gate_weights_TA: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        """Float32 sum over the chosen experts, in the gate's ranking, never that of arrival."""
        ...

    def gumbel(self, key_2: UInt32[Array, " 2"], num_places: int) -> Float[Array, " V"]:
        """Noise -log(-log(1 - u)); entry v is a function of the threefry key and v alone."""
        ...

    def summarize_rows(self, logits_BV: Float[Array, "B V"]) -> RowSummary:
        """Highest logit, the lowest id that has it, and the soft-max total of each row."""
        ...

    def write_rows(
        self,
        blocks_NPRK: Float[Array, "N P R K"],
        rows_TRK: Float[Array, "T R K"],
        places_T: Int[Array, " T"],
    ) -> Float[Array, "N P R K"]:
        """The blocks with each row written to its place, position p of block n being n * P + p.

        A place of N * P or more drops its row. In place where the blocks are donated.
        """
        ...

    def attention(
        self,
        query_THK: Float[Array, "T H K"],
        keys_NPRK: Float[Array, "N P R K"],
        values_NPRK: Float[Array, "N P R K"],
        visible_NP: Bool[Array, "N P"],
        block_tables_TM: Int[Array, "T M"],
        positions_T: Int[Array, " T"],
        logit_scale: float,
    ) -> Float[Array, "T H K"]:
        """Each row over the visible keys at positions <= its own; 30 * tanh(logit / 30) caps.

        A row at position -1 is padding. A row that sees no key gets zeros.
        """
        ...
