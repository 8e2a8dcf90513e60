"""The kernels for a GPU. They read integer weights as stored, and sum in float32.

    gpu_matmul      linear, and the grouped product under the experts
    gpu_experts     sorting of tokens by expert, and the two kernels of an expert
    gpu_attention   attention through the block table
    gpu_rows        norm and gate with a fixed order of summation
    gpu_tiles       tile sizes and masked loads

All are Pallas kernels for its Triton backend. On a CPU they are interpreted, which is correct but
slow.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from milliways.model.kv_cache import scatter_rows
from milliways.model.ops import gpu_attention, gpu_experts, gpu_matmul, gpu_rows
from milliways.model.ops.gpu_tiles import choose_tile
from milliways.model.ops.interface import HalfOps
from milliways.model.ops.pure import RMS_EPSILON, rope_rows, weigh_rows
from milliways.model.params import ExpertParams, Matrix
from milliways.model.sampling import RowSummary, gumbel_noise, summarize_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOps:
    """`Ops` for one GPU.

    `attention` always gives a row the same bits in any batch. Products, norm and gate do so if
    `deterministic` is set: products then have the same tile for every number of rows, and norm and
    gate have kernels of their own. By default the tile depends on the number of rows, so the bits
    of a product are equal only for numbers of rows with the same tile. Norm and gate are left to
    XLA, which chooses the order of their sums. In `rope` and `weigh` no order of a sum can depend
    on the number of rows, so XLA computes them in both cases.

    `interpret` runs the kernels without a GPU. None means: if JAX computes on the CPU.
    """

    deterministic: bool = False
    interpret: bool | None = None

    @property
    def min_rows(self) -> int:
        return 1

    @property
    def fuses_steps(self) -> bool:
        return True

    @property
    def halves(self) -> HalfOps | None:
        return None

    def rms_norm(
        self, hidden_TD: Float[Array, "T D"], scale_D: Float[Array, " D"]
    ) -> Float[Array, "T D"]:
        if self.deterministic:
            return gpu_rows.rms_norm(hidden_TD, scale_D, interpret=self._interpret())
        hidden_TD = hidden_TD.astype(jnp.float32)
        mean_square_T1 = jnp.mean(jnp.square(hidden_TD), axis=-1, keepdims=True)
        return hidden_TD * lax.rsqrt(mean_square_T1 + RMS_EPSILON) * scale_D[None, :]

    def linear(
        self, rows_TK: Float[Array, "T K"], matrix: Matrix, multiplier: float = 1.0
    ) -> Float[Array, "T N"]:
        tile = choose_tile(rows_TK.shape[0], rows_TK.dtype, deterministic=self.deterministic)
        rows_TN = gpu_matmul.matmul(
            rows_TK, gpu_matmul.plain(matrix), tile=tile, interpret=self._interpret()
        )
        return rows_TN * multiplier

    def rope(
        self, heads_THK: Float[Array, "T H K"], positions_T: Int[Array, " T"]
    ) -> Float[Array, "T H K"]:
        return rope_rows(heads_THK, positions_T)

    def gate(
        self, hidden_TD: Float[Array, "T D"], gate_DE: Float[Array, "D E"], num_selected: int
    ) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
        if self.deterministic:
            probabilities_TE = gpu_rows.gate_probabilities(
                hidden_TD, gate_DE, interpret=self._interpret()
            )
        else:
            # HIGHEST: with TF32, near ties would choose other experts.
            logits_TE = jnp.dot(
                hidden_TD.astype(jnp.float32), gate_DE, precision=lax.Precision.HIGHEST
            )
            probabilities_TE = jax.nn.softmax(logits_TE, axis=-1)
        return gpu_rows.choose_best(probabilities_TE, num_selected)

    def expert_ffn(
        self,
        hidden_TD: Float[Array, "T D"],
        expert_ids_TA: Int[Array, "T A"],
        experts: ExpertParams,
    ) -> Float[Array, "T A D"]:
        rows_per_expert = -(-expert_ids_TA.size // experts.num_experts)
        tile = choose_tile(rows_per_expert, hidden_TD.dtype, deterministic=self.deterministic)
        return gpu_experts.expert_ffn(
            hidden_TD, expert_ids_TA, experts, tile=tile, interpret=self._interpret()
        )

    def weigh(
        self, outputs_TAD: Float[Array, "T A D"], gate_weights_TA: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        return weigh_rows(outputs_TAD, gate_weights_TA)

    def gumbel(self, key_2: UInt32[Array, " 2"], num_places: int) -> Float[Array, " V"]:
        return gumbel_noise(key_2, num_places)

    def summarize_rows(self, logits_BV: Float[Array, "B V"]) -> RowSummary:
        return summarize_rows(logits_BV)

    def write_rows(
        self,
        blocks_NPRK: Float[Array, "N P R K"],
        rows_TRK: Float[Array, "T R K"],
        places_T: Int[Array, " T"],
    ) -> Float[Array, "N P R K"]:
        return scatter_rows(blocks_NPRK, rows_TRK, places_T)

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
        return gpu_attention.attention(
            query_THK,
            keys_NPRK,
            values_NPRK,
            visible_NP,
            block_tables_TM,
            positions_T,
            logit_scale,
            interpret=self._interpret(),
        )

    def _interpret(self) -> bool:
        return jax.default_backend() == "cpu" if self.interpret is None else self.interpret
