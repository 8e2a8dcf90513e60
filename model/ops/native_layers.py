"""All layers of a model for the CPU kernels in one call (native/layers.h).

The library is told once where the parameters are. A step then passes a number, and not a thousand
arrays: with 64 layers, handing those to a compiled program took longer than a token's arithmetic.
"""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from milliways.model.kv_cache import LayerCache, StepBatch
from milliways.model.ops.interface import HalfSizes
from milliways.model.ops.native_library import library
from milliways.model.ops.pure import rope_frequencies
from milliways.model.params import AttentionParams, ExpertParams, Matrix, PackedMatrix


class HeldLayers:
    """Layers that the library knows under a number, until this object is gone.

    Invariant: `_kept` has every array whose address the library has.
    """

    def __init__(
        self,
        attention_L: Sequence[AttentionParams],
        experts_L: Sequence[ExpertParams],
        sizes: HalfSizes,
    ) -> None:
        first, native = attention_L[0], library()
        frequencies_K = jax.block_until_ready(jnp.asarray(rope_frequencies(sizes.key_size)))
        self._kept = (attention_L, experts_L, frequencies_K)
        layers = [_layer(*pair) for pair in zip(attention_L, experts_L, strict=True)]
        native.mw_hold_layers.restype = ctypes.c_int64
        number = native.mw_hold_layers(
            (_Layer * len(layers))(*layers),
            ctypes.c_int64(len(layers)),
            ctypes.byref(
                _Sizes(
                    width=first.attention_norm_D.shape[0],
                    num_heads=sizes.num_heads,
                    num_kv_heads=_packed(first.key).num_out // sizes.key_size,
                    key_size=sizes.key_size,
                    num_experts=experts_L[0].num_experts,
                    num_selected=sizes.num_selected,
                    frequencies=_address(frequencies_K),
                    logit_scale=sizes.logit_scale,
                )
            ),
        )
        self.number_1 = jnp.asarray(np.array([number], np.int32))
        weakref.finalize(self, _drop, number, self._kept)


def can_hold(experts_L: Sequence[ExpertParams]) -> bool:
    """Whether the experts are packed, in memory; mapped ones are looked up at each use."""
    return all(isinstance(experts.gate_proj, PackedMatrix) for experts in experts_L)


def pass_layers(
    number_1: Int[Array, " 1"],
    hidden_TD: Float[Array, "T D"],
    batch: StepBatch,
    layers_L: tuple[LayerCache, ...],
    visible_NP: Array,
) -> tuple[Float[Array, "T D"], tuple[LayerCache, ...]]:
    """The residual stream after all held layers, and their caches, which are written in place."""
    blocks = [array for layer in layers_L for array in (layer.keys_NPRK, layer.values_NPRK)]
    batch_arrays = (batch.block_tables_BM, batch.slots_T, batch.positions_T)
    arguments = (
        hidden_TD,
        number_1,
        visible_NP,
        *(array.astype(jnp.int32) for array in batch_arrays),
    )
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (hidden_TD, *blocks)]
    aliases = {0: 0} | {len(arguments) + i: 1 + i for i in range(len(blocks))}
    library()
    call = jax.ffi.ffi_call("milliways_layers", shapes, input_output_aliases=aliases)
    hidden_TD, *blocks = call(*arguments, *blocks)
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return hidden_TD, tuple(LayerCache(keys_NPRK=keys, values_NPRK=v) for keys, v in pairs)


def _drop(number: int, kept: Any) -> None:
    """Waits for a step that runs; only then the arrays may go."""
    library().mw_drop_layers(ctypes.c_int64(number))
    del kept


def _layer(attention: AttentionParams, experts: ExpertParams) -> "_Layer":
    norms = (
        attention.attention_norm_D,
        attention.attention_post_norm_D,
        attention.expert_norm_D,
        attention.expert_post_norm_D,
    )
    matrices = (attention.query, attention.key, attention.value, attention.out)
    matrices += (experts.gate_proj, experts.up_proj, experts.down_proj)
    return _Layer(
        norms=(ctypes.c_void_p * 4)(*map(_address, norms)),
        gate=_address(attention.gate_DE),
        matrices=(_Matrix * 7)(*map(_matrix, matrices)),
    )


def _matrix(matrix: Matrix) -> "_Matrix":
    packed = _packed(matrix)
    return _Matrix(
        panels=_address(packed.panels),
        scales=_address(packed.scales),
        kind=packed.kind,
        num_in=packed.num_in,
        num_out=packed.num_out,
        num_groups=packed.scales.shape[-2],
    )


def _packed(matrix: Matrix) -> PackedMatrix:
    assert isinstance(matrix, PackedMatrix), "not packed for the CPU kernels"
    return matrix


def _address(array: Array) -> int:
    return jax.block_until_ready(array).unsafe_buffer_pointer()


# The structures of native/layers_ffi.cc.
class _Matrix(ctypes.Structure):
    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "num_in", "num_out", "num_groups")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("norms", ctypes.c_void_p * 4),
        ("gate", ctypes.c_void_p),
        ("matrices", _Matrix * 7),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("width", "num_heads", "num_kv_heads", "key_size")),
        *((name, ctypes.c_int64) for name in ("num_experts", "num_selected")),
        ("frequencies", ctypes.c_void_p),
        ("logit_scale", ctypes.c_float),
    ]
