"""Attention over KV blocks on a GPU: one kernel program for each row and key/value head.

A row is one token's query. A program finds the blocks of its row in the block table, and goes
through their keys and values in chunks of `CHUNK` positions (online softmax). Each chunk begins at
a multiple of `CHUNK` in the sequence, and a program reads no other row's query. So other rows,
padding and the split of a prefill cannot change the bits of a row.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from milliways.model.ops.gpu_tiles import Span, dot, load, padded, store
from milliways.model.ops.pure import LOGIT_CAP, MASKED

CHUNK = 64


def attention(
    query_THK: Float[Array, "T H K"],
    keys_NPRK: Float[Array, "N P R K"],
    values_NPRK: Float[Array, "N P R K"],
    visible_NP: Bool[Array, "N P"],
    block_tables_TM: Int[Array, "T M"],
    positions_T: Int[Array, " T"],
    logit_scale: float,
    *,
    interpret: bool,
) -> Float[Array, "T H K"]:
    """Implements `Ops.attention`."""
    num_rows, num_heads, key_size = query_THK.shape
    block_size, num_kv_heads = keys_NPRK.shape[1:3]
    shape = _Shape(num_heads // num_kv_heads, key_size, block_size, logit_scale)
    return pl.pallas_call(
        partial(_attention_kernel, shape=shape),
        grid=(num_rows, num_kv_heads),
        out_shape=jax.ShapeDtypeStruct(query_THK.shape, jnp.float32),
        # float32 needs twice the shared memory of bfloat16, so we keep fewer loads in flight.
        compiler_params=plgpu.CompilerParams(
            num_warps=4, num_stages=2 if keys_NPRK.dtype.itemsize == 2 else 1
        ),
        interpret=interpret,
        name="block_attention",
    )(
        positions_T + 1,
        block_tables_TM,
        query_THK,
        keys_NPRK.reshape(-1, num_kv_heads, key_size),
        values_NPRK.reshape(-1, num_kv_heads, key_size),
        visible_NP.reshape(-1),
    )


class _Shape(NamedTuple):
    """The compile-time constants of the kernel: it is compiled for each combination of them."""

    heads_per_kv_head: int
    key_size: int
    block_size: int
    logit_scale: float


class _Folded(NamedTuple):
    """The online softmax of a program's query heads, after some chunks of keys."""

    top_H: jax.Array
    total_H: jax.Array
    mixed_HK: jax.Array


def _attention_kernel(
    num_keys_ref: Any,
    tables_ref: Any,
    query_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    visible_ref: Any,
    out_ref: Any,
    *,
    shape: _Shape,
) -> None:
    row, kv_head = pl.program_id(0), pl.program_id(1)
    num_heads = shape.heads_per_kv_head
    heads = Span(
        kv_head * num_heads,
        padded(num_heads),
        (kv_head + 1) * num_heads,
        padded(num_heads) != num_heads,
    )
    widths = Span(
        0, padded(shape.key_size), shape.key_size, padded(shape.key_size) != shape.key_size
    )
    query_HK = load(query_ref, row, heads, widths)
    num_keys = num_keys_ref[row]

    def fold(chunk: Any, folded: _Folded) -> _Folded:
        positions_S = chunk * CHUNK + lax.iota(jnp.int32, CHUNK)
        places_S, seen_S = _find(positions_S, num_keys, (tables_ref, visible_ref), row, shape)
        # What another sequence left in a block is not read: it may be NaN.
        keys_SK, values_SK = (
            _gather(ref, places_S, kv_head, widths, seen_S) for ref in (keys_ref, values_ref)
        )
        scores_HS = dot(query_HK, keys_SK, transpose_right=True) * shape.logit_scale
        return _fold_scores(folded, scores_HS, seen_S, values_SK)

    nothing = _Folded(
        jnp.full(heads.size, MASKED, jnp.float32),
        jnp.zeros(heads.size, jnp.float32),
        jnp.zeros((heads.size, widths.size), jnp.float32),
    )
    folded = lax.fori_loop(0, (num_keys + CHUNK - 1) // CHUNK, fold, nothing)
    # A row that sees no key (padding) has a total of 0. Its output is 0 / 1, not NaN.
    total_H = jnp.where(folded.total_H > 0, folded.total_H, 1.0)
    store(out_ref, folded.mixed_HK / total_H[:, None], row, heads, widths)


def _find(
    positions_S: jax.Array, num_keys: Any, refs: tuple[Any, Any], row: Any, shape: _Shape
) -> tuple[jax.Array, jax.Array]:
    """The index in the cache of each of these positions, and whether the row sees its key."""
    tables_ref, visible_ref = refs
    exists_S = positions_S < num_keys
    blocks_S = plgpu.load(
        tables_ref.at[row, positions_S // shape.block_size], mask=exists_S, other=_zero(tables_ref)
    )
    places_S = blocks_S * shape.block_size + positions_S % shape.block_size
    visible_S = plgpu.load(visible_ref.at[places_S], mask=exists_S, other=_zero(visible_ref))
    return places_S, exists_S & visible_S


def _gather(
    ref: Any, places_S: jax.Array, kv_head: Any, widths: Span, seen_S: jax.Array
) -> jax.Array:
    """Keys or values at the given places; zeros for those that are not seen."""
    size = (places_S.shape[0], widths.size)
    places_SK = jnp.broadcast_to(places_S[:, None], size)
    widths_SK = jnp.broadcast_to(lax.iota(jnp.int32, widths.size)[None, :], size)
    seen_SK = jnp.broadcast_to(seen_S[:, None], size)
    if widths.overhangs:
        seen_SK &= widths.inside[None, :]
    return plgpu.load(ref.at[places_SK, kv_head, widths_SK], mask=seen_SK, other=_zero(ref))


def _fold_scores(
    folded: _Folded, scores_HS: jax.Array, seen_S: jax.Array, values_SK: jax.Array
) -> _Folded:
    """Adds a chunk to the softmax. A key that the row does not see changes no bit of the result."""
    seen_HS = jnp.broadcast_to(seen_S[None, :], scores_HS.shape)
    scores_HS = jnp.where(seen_HS, LOGIT_CAP * jnp.tanh(scores_HS / LOGIT_CAP), MASKED)
    top_H = jnp.maximum(folded.top_H, jnp.max(scores_HS, axis=1))
    weights_HS = jnp.where(seen_HS, jnp.exp(scores_HS - top_H[:, None]), 0.0)
    correction_H = jnp.exp(folded.top_H - top_H)
    return _Folded(
        top_H,
        folded.total_H * correction_H + jnp.sum(weights_HS, axis=1),
        folded.mixed_HK * correction_H[:, None]
        + dot(weights_HS.astype(values_SK.dtype), values_SK),
    )


def _zero(ref: Any) -> jax.Array:
    return jnp.zeros((), ref.dtype)
