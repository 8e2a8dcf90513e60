"""Products of rows and quantised matrices on a GPU. They read the weights as they are stored.

A program loads a tile of integers, converts it in registers, multiplies it on tensor cores, and
multiplies the sum of each scale row with its scales. So dequantised weights exist in registers
only. XLA does not guarantee that. It may fuse the conversion into its own product, but it times
several candidates, and may choose a library's product. Then it writes the converted matrix to
memory first.

Bits: one program sums a row over its inputs in steps of `tile.depth`, in order. The other rows of
the tile are not part of the sum. So with the same tile, a row has the same bits for any number of
rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from milliways.model.ops.gpu_tiles import MatmulTile, Span, dot, load, store
from milliways.model.params import Matrix, QuantizedMatrix

# Takes the scaled float32 sums of each matrix, returns the values to write.
Epilogue = Callable[..., jax.Array]


def only(sums: jax.Array) -> jax.Array:
    """The epilogue of a plain product."""
    return sums


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The epilogue of the first half of an expert."""
    return jax.nn.gelu(gate, approximate=True) * up


def plain(matrix: Matrix) -> QuantizedMatrix:
    """Asserts that the matrix is not packed, and returns it."""
    assert isinstance(matrix, QuantizedMatrix), "packed for the CPU kernels, not for a GPU"
    return matrix


def matmul(
    rows_TK: Float[Array, "T K"], matrix: QuantizedMatrix, *, tile: MatmulTile, interpret: bool
) -> Float[Array, "T N"]:
    """rows @ dequantised matrix, float32."""
    stack = jax.tree.map(lambda leaf: leaf[None], matrix)
    all_the_first = jnp.zeros(pl.cdiv(rows_TK.shape[0], tile.rows), jnp.int32)
    return grouped_matmul(rows_TK, all_the_first, (stack,), tile=tile, interpret=interpret)


def grouped_matmul(
    rows_CK: Float[Array, "C K"],
    tile_experts_I: Int[Array, " I"],
    stacks: tuple[QuantizedMatrix, ...],
    *,
    tile: MatmulTile,
    interpret: bool,
    epilogue: Epilogue = only,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "C N"]:
    """Each tile of `tile.rows` rows times the matrices of its expert, combined by `epilogue`.

    The rows of a tile with expert -1 are not computed and not written: they are arbitrary.
    """
    num_groups = {stack.num_scale_rows for stack in stacks}
    assert len(num_groups) == 1, "matrices that are summed together need equal scale rows"
    # The lowered code computes indices in 32 bits for arrays below 4 GiB.
    assert all(stack.weight.size < 2**31 for stack in stacks)
    (num_rows, num_in), num_out = rows_CK.shape, stacks[0].weight.shape[-1]
    shape = _Shape(num_rows, num_in, num_out, num_groups.pop(), tile)
    return pl.pallas_call(
        partial(_matmul_kernel, shape=shape, epilogue=epilogue),
        grid=(pl.cdiv(num_rows, tile.rows), pl.cdiv(num_out, tile.cols)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), out_dtype or jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="quantized_matmul",
    )(tile_experts_I, rows_CK, *(leaf for stack in stacks for leaf in (stack.weight, stack.scales)))


class _Shape(NamedTuple):
    """The compile-time constants of the kernel: it is compiled for each combination of them."""

    num_rows: int
    num_in: int
    num_out: int
    num_groups: int
    tile: MatmulTile


def _matmul_kernel(
    tile_experts_ref: Any, rows_ref: Any, *refs: Any, shape: _Shape, epilogue: Epilogue
) -> None:
    # Programs of the same column tile run at the same time, to share its weights in the cache.
    row_tile, col_tile = pl.program_id(0), pl.program_id(1)
    tile, out_ref = shape.tile, refs[-1]
    expert = tile_experts_ref[row_tile]
    rows = _span(row_tile, tile.rows, shape.num_rows)
    cols = _span(col_tile, tile.cols, shape.num_out)

    @pl.when(expert >= 0)
    def _compute() -> None:
        sums = _scaled_sums(rows_ref, refs[:-1:2], refs[1:-1:2], (expert, rows, cols), shape)
        store(out_ref, epilogue(*sums).astype(out_ref.dtype), rows, cols)


def _scaled_sums(
    rows_ref: Any,
    weight_refs: tuple[Any, ...],
    scale_refs: tuple[Any, ...],
    where: tuple[Any, Span, Span],
    shape: _Shape,
) -> tuple[jax.Array, ...]:
    """The float32 sum for each matrix: the sum of each scale row is scaled, then added."""
    expert, rows, cols = where
    tile, group_size = shape.tile, shape.num_in // shape.num_groups
    zeros = tuple(jnp.zeros((rows.size, cols.size), jnp.float32) for _ in weight_refs)

    def add_group(group: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        end = (group + 1) * group_size

        def add_step(step: Any, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            start = group * group_size + step * tile.depth
            inputs = Span(start, tile.depth, end, group_size % tile.depth != 0)
            row_tile = load(rows_ref, rows, inputs)
            return tuple(
                part + _product(row_tile, load(weight_ref, expert, inputs, cols))
                for part, weight_ref in zip(parts, weight_refs, strict=True)
            )

        parts = lax.fori_loop(0, pl.cdiv(group_size, tile.depth), add_step, zeros)
        return tuple(
            total + part * load(scale_ref, expert, group, cols).astype(jnp.float32)[None, :]
            for total, part, scale_ref in zip(totals, parts, scale_refs, strict=True)
        )

    return lax.fori_loop(0, shape.num_groups, add_group, zeros)


def _product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Exact products of activations and integer weights, summed in float32.

    bfloat16 represents every int8, but not every int16. So an int16 is split into two parts, which
    bfloat16 represents.
    """
    if weight.dtype == jnp.int8 or rows.dtype == jnp.float32:
        return dot(rows, weight.astype(rows.dtype))
    wide = weight.astype(jnp.int32)
    high = (wide + 128) >> 8
    low = wide - (high << 8)
    return dot(rows, high.astype(rows.dtype)) * 256.0 + dot(rows, low.astype(rows.dtype))


def _span(index: Any, size: int, limit: int) -> Span:
    return Span(index * size, size, limit, limit % size != 0)
