"""The interface of the numerical kernels."""

from typing import Protocol

from jaxtyping import Array, Bool, Float, Int, UInt32

from milliways.model.params import ExpertParams, Matrix
from milliways.model.sampling import RowSummary


class Ops(Protocol):
    """Kernels over any number of rows T. Float inputs are float32 or bfloat16.

    Implementations are hashable and have no state, so that they can be static arguments of a jit.
    """

    @property
    def min_rows(self) -> int:
        """A step has at least this many rows, a power of two: fewer would take as long."""
        ...

    @property
    def fuses_steps(self) -> bool:
        """Whether a whole step should be compiled as one program, because that is quick."""
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
        """Rotary embedding of two halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

        Angles are position * 10000^(-2i/K), in float32.
        """
        ...

    def gate(
        self, hidden_TD: Float[Array, "T D"], gate_DE: Float[Array, "D E"], num_selected: int
    ) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
        """Softmax over all experts in float32; returns the best A, not renormalised.

        The best expert comes first. Of equal ones, the expert with the lower id comes first.
        """
        ...

    def expert_ffn(
        self,
        hidden_TD: Float[Array, "T D"],
        expert_ids_TA: Int[Array, "T A"],
        experts: ExpertParams,
    ) -> Float[Array, "T A D"]:
        """down(gelu(x @ gate) * (x @ up)) of each token's chosen experts, in float32.

        The results are not multiplied with the gate's weights. Ids are indices into the stack of
        `experts`. An id outside it belongs to another shard and gives 0. The weights of experts
        that no token chose are not read.
        """
        ...

    def weigh(
        self, outputs_TAD: Float[Array, "T A D"], gate_weights_TA: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        """The weighted float32 sum over the chosen experts, in the order of the gate's ranking."""
        ...

    def gumbel(self, key_2: UInt32[Array, " 2"], num_places: int) -> Float[Array, " V"]:
        """Noise -log(-log(1 - u)). Entry v depends only on the threefry key and on v."""
        ...

    def summarize_rows(self, logits_BV: Float[Array, "B V"]) -> RowSummary:
        """The highest logit of each row, the lowest id that has it, and the softmax's total."""
        ...

    def write_rows(
        self,
        blocks_NPRK: Float[Array, "N P R K"],
        rows_TRK: Float[Array, "T R K"],
        places_T: Int[Array, " T"],
    ) -> Float[Array, "N P R K"]:
        """The blocks, with each row written to its place: n * P + p is position p of block n.

        A row is dropped if its place is N * P or more. The write is in place if the blocks are
        donated.
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
        """Attention of each row to the visible keys at positions up to its own.

        Logits are capped by 30 * tanh(logit / 30). A row at position -1 is padding. A row that sees
        no key gets zeros.
        """
        ...
