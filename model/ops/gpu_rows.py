"""Norm and gate on a GPU with a fixed order of every sum: one program for each row.

XLA chooses how to reduce a row by the number of rows, and by the operations that it fuses with the
sum. These two kernels fix the order instead.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from milliways.model.ops.gpu_tiles import Span, load, padded, store
from milliways.model.ops.pure import RMS_EPSILON

NORM_STEP = 1024
GATE_STEP = 256


def rms_norm(
    hidden_TD: Float[Array, "T D"], scale_D: Float[Array, " D"], *, interpret: bool
) -> Float[Array, "T D"]:
    """Implements `Ops.rms_norm`."""
    return pl.pallas_call(
        partial(_norm_kernel, width=hidden_TD.shape[1]),
        grid=(hidden_TD.shape[0],),
        out_shape=jax.ShapeDtypeStruct(hidden_TD.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rms_norm",
    )(hidden_TD, scale_D)


def gate_probabilities(
    hidden_TD: Float[Array, "T D"], gate_DE: Float[Array, "D E"], *, interpret: bool
) -> Float[Array, "T E"]:
    """softmax(hidden @ gate) of each row, all in float32: no tensor cores, no TF32."""
    (num_rows, width), num_experts = hidden_TD.shape, gate_DE.shape[1]
    return pl.pallas_call(
        partial(_gate_kernel, width=width, num_experts=num_experts),
        grid=(num_rows,),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_experts), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="gate",
    )(hidden_TD, gate_DE)


def choose_best(
    probabilities_TE: Float[Array, "T E"], num_selected: int
) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
    """The best experts of each row, best first; of equal ones the lowest id, as in argmax."""
    ids, weights = [], []
    left_TE = probabilities_TE
    for _ in range(num_selected):
        best_T = jnp.argmax(left_TE, axis=1).astype(jnp.int32)
        ids.append(best_T)
        weights.append(jnp.take_along_axis(probabilities_TE, best_T[:, None], axis=1)[:, 0])
        is_best_TE = jnp.arange(left_TE.shape[1])[None, :] == best_T[:, None]
        left_TE = jnp.where(is_best_TE, -1.0, left_TE)
    return jnp.stack(ids, axis=1), jnp.stack(weights, axis=1)


def _norm_kernel(hidden_ref: Any, scale_ref: Any, out_ref: Any, *, width: int) -> None:
    row = pl.program_id(0)
    num_steps = pl.cdiv(width, NORM_STEP)

    def step_span(step: Any) -> Span:
        return Span(step * NORM_STEP, NORM_STEP, width, width % NORM_STEP != 0)

    def add_squares(step: Any, squares: jax.Array) -> jax.Array:
        hidden = load(hidden_ref, row, step_span(step)).astype(jnp.float32)
        return squares + hidden * hidden

    squares = lax.fori_loop(0, num_steps, add_squares, jnp.zeros(NORM_STEP, jnp.float32))
    factor = lax.rsqrt(jnp.sum(squares) / width + RMS_EPSILON)

    def write(step: Any, nothing: Any) -> Any:
        span = step_span(step)
        hidden = load(hidden_ref, row, span).astype(jnp.float32)
        store(out_ref, hidden * factor * load(scale_ref, span), row, span)
        return nothing

    lax.fori_loop(0, num_steps, write, jnp.int32(0))


def _gate_kernel(
    hidden_ref: Any, gate_ref: Any, out_ref: Any, *, width: int, num_experts: int
) -> None:
    row, size = pl.program_id(0), padded(num_experts)
    experts = Span(0, size, num_experts, size != num_experts)

    def add_step(step: Any, sums: jax.Array) -> jax.Array:
        inputs = Span(step * GATE_STEP, GATE_STEP, width, width % GATE_STEP != 0)
        hidden = load(hidden_ref, row, inputs).astype(jnp.float32)
        return sums + hidden[:, None] * load(gate_ref, inputs, experts)

    zeros = jnp.zeros((GATE_STEP, size), jnp.float32)
    logits = jnp.sum(lax.fori_loop(0, pl.cdiv(width, GATE_STEP), add_step, zeros), axis=0)
    is_expert = experts.inside
    weights = jnp.where(is_expert, jnp.exp(logits - _max_where(is_expert, logits)), 0.0)
    store(out_ref, weights / jnp.sum(weights), row, experts)


def _max_where(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.max(jnp.where(mask, values, -jnp.inf))
