"""The interface of the numerical kernels."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, UInt32

from milliways.model.kv_cache import LayerCache, StepBatch
from milliways.model.params import AttentionParams, ExpertParams, Matrix
from milliways.model.sampling import RowSummary


class AttentionResult(NamedTuple):
    """The results of the attention half: the residual stream, the cache, and the experts' input."""

    hidden_TD: Array
    expert_input_TD: Array
    expert_ids_TA: Array
    gate_weights_TA: Array
    cache: LayerCache


class HalfSizes(NamedTuple):
    """What the halves must know beside their parameters."""

    num_heads: int
    key_size: int
    num_selected: int
    logit_scale: float


class HeldLayers(Protocol):
    """Layers with a number, which is valid while this object exists."""

    @property
    def number_1(self) -> Array: ...


class HalfOps(Protocol):
    """Kernels of a whole half of a layer, with the bits that `Decoder` gets from single ones."""

    def attention_half(
        self,
        params: AttentionParams,
        hidden_TD: Float[Array, "T D"],
        batch: StepBatch,
        cache: LayerCache,
        visible_NP: Array,
        sizes: HalfSizes,
    ) -> AttentionResult:
        """Replaces the body of `Decoder.attention_half`, but for the dtype of the experts' input.

        That is float32, rounded to the dtype of the cache.
        """
        ...

    def combine(
        self,
        params: AttentionParams,
        hidden_TD: Float[Array, "T D"],
        outputs_TAD: Float[Array, "T A D"],
        gate_weights_TA: Float[Array, "T A"],
    ) -> Float[Array, "T D"]:
        """Replaces the body of `Decoder.combine`."""
        ...

    def hold_layers(
        self,
        attention_L: Sequence[AttentionParams],
        experts_L: Sequence[ExpertParams],
        sizes: HalfSizes,
    ) -> HeldLayers | None:
        """Gives all layers a number, under which `pass_layers` computes them; None if it cannot.

        The parameters stay where they are.
        """
        ...

    def pass_layers(
        self,
        number_1: Int[Array, " 1"],
        hidden_TD: Float[Array, "T D"],
        batch: StepBatch,
        layers_L: tuple[LayerCache, ...],
        visible_NP: Array,
    ) -> tuple[Float[Array, "T D"], tuple[LayerCache, ...]]:
        """The residual stream after all layers, with all their experts, and the new caches."""
        ...


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

    @property
    def halves(self) -> HalfOps | None:
        """Kernels of whole halves of a layer, or None if they are composed of the ones below."""
        ...

    def rms_norm(
        self, hidden_TD: Float[Array, "T D"], scale_D: Float[Array, " D"]
    ) -> Float[Array, "T D"]:
        """x * rsqrt(mean(x^2) + 1e-5) * scale, in float32."""
        ...

    def linear(
        self, rows_TK: Float[Array, "T K"], matrix: Matrix, multiplier: float = 1.0
    ) -> Float[Array, "T N"]:
        """rows @ W with W = weight * scales, summed in float32 and returned in float32.

        Each sum is multiplied with `multiplier` at the end.
        """
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
