"""The kernels in C++ for CPUs (model/ops/native/), called through XLA custom calls.

At loading, a matrix is copied once into panels, which the kernels read sequentially. JAX owns that
copy; there is no other. Experts may stay in their mapped files instead. Every element of a result
is summed in one fixed order, with any batch, number of threads and instruction set.
"""

import dataclasses
import mmap
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from milliways.model.activations import Activations
from milliways.model.kv_cache import LayerCache, StepBatch
from milliways.model.ops.interface import AttentionResult, HalfOps, HalfSizes
from milliways.model.ops.native_layers import HeldLayers, can_hold, pass_layers
from milliways.model.ops.native_library import kernel_set as kernel_set
from milliways.model.ops.native_library import library as library
from milliways.model.ops.native_library import num_threads as num_threads
from milliways.model.ops.native_library import set_num_threads as set_num_threads
from milliways.model.ops.native_library import sources as sources
from milliways.model.ops.native_library import to_bfloat16 as to_bfloat16
from milliways.model.ops.native_library import use_kernel_set as use_kernel_set
from milliways.model.ops.pure import rope_frequencies
from milliways.model.params import (
    AttentionParams,
    ExpertParams,
    HostMatrix,
    MappedMatrix,
    Matrix,
    PackedMatrix,
)
from milliways.model.sampling import RowSummary

PANEL_COLUMNS = 32
EXACT_INT8, EXACT_INT16, PAIRS = 0, 1, 2

_ALIGNMENT = 64
# Larger arrays get pages of 2 MiB. Each token reads all weights, and with small pages the
# processor's TLB would be too small.
_HUGE_PAGE_BYTES = 2 * 1024 * 1024


class NativeLoader:
    """Packs matrices for the kernels. Plain arrays are copied unchanged."""

    maps_experts = False

    def __init__(self, activations: Activations = Activations.EXACT) -> None:
        self.activations = activations
        library()

    def array(self, host: np.ndarray) -> Array:
        # An aligned copy: JAX takes it over without another copy, and the file can be unmapped.
        own = _aligned_empty(host.shape, host.dtype)
        own[...] = host
        return _hand_over(own)

    def matrix(self, weight: np.ndarray, scales: np.ndarray) -> Matrix:
        stack = _pack([(weight, scales)], 1, self._kind)
        return dataclasses.replace(stack, panels=stack.panels[0], scales=stack.scales[0])

    def stack(self, parts: Iterable[HostMatrix], count: int) -> Matrix:
        return _pack(parts, count, self._kind)

    def _kind(self, weight: np.ndarray) -> int:
        if weight.dtype == np.int16:
            assert self.activations is Activations.EXACT
            return EXACT_INT16
        return EXACT_INT8 if self.activations is Activations.EXACT else PAIRS


class MappedLoader(NativeLoader):
    """Leaves experts in their mapped files, for models that are larger than memory.

    The kernels pack an expert on every use, so each token reads its experts from the disk or from
    the page cache.

    Invariant: while the loader exists, the kernels know the regions in `_numbers`, and `_views`
    keeps their files mapped.
    """

    maps_experts = True

    def __init__(self, activations: Activations = Activations.EXACT) -> None:
        super().__init__(activations)
        self._numbers: list[int] = []
        self._views: list[np.ndarray] = []
        weakref.finalize(self, _unmap, self._numbers, self._views)

    def stack(self, parts: Iterable[HostMatrix], count: int) -> Matrix:
        weights, scales = zip(*parts, strict=True)
        num_in, num_out = weights[0].shape
        return MappedMatrix(
            regions=jnp.asarray(np.asarray([self._register(w) for w in weights], np.int32)),
            scales=_padded_scales(scales),
            kind=self._kind(weights[0]),
            num_in=num_in,
            num_out=num_out,
        )

    def _register(self, weight: np.ndarray) -> int:
        assert weight.dtype == np.int8 and weight.flags.c_contiguous
        number = library().mw_map(weight.ctypes.data, weight.nbytes)
        self._numbers.append(number)
        # The view keeps its file mapped.
        self._views.append(weight)
        return number


@dataclass(frozen=True, slots=True)
class NativeOps:
    """`Ops` with the kernels in C++. The matrices must come from a `NativeLoader`.

    Its `activations` decided how the matrices were packed, and so whether activations are rounded.
    """

    @property
    def min_rows(self) -> int:
        return 1

    @property
    def fuses_steps(self) -> bool:
        return True

    @property
    def halves(self) -> HalfOps | None:
        return self

    def attention_half(
        self,
        params: AttentionParams,
        hidden_TD: Float[Array, "T D"],
        batch: StepBatch,
        cache: LayerCache,
        visible_NP: Array,
        sizes: HalfSizes,
    ) -> AttentionResult:
        keys, values = cache.keys_NPRK, cache.values_NPRK
        shape_TA = (hidden_TD.shape[0], sizes.num_selected)
        rows = jax.ShapeDtypeStruct(hidden_TD.shape, jnp.float32)
        outputs = (
            rows,
            rows,
            jax.ShapeDtypeStruct(shape_TA, jnp.int32),
            jax.ShapeDtypeStruct(shape_TA, jnp.float32),
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        )
        matrices = (params.query, params.key, params.value, params.out)
        arguments = (
            hidden_TD,
            params.attention_norm_D,
            params.attention_post_norm_D,
            params.expert_norm_D,
            *(part for matrix in matrices for part in _weights_and_scales(_packed(matrix))),
            params.gate_DE,
            jnp.asarray(rope_frequencies(keys.shape[-1])),
            keys,
            values,
        )
        aliases = {len(arguments) - 2: 4, len(arguments) - 1: 5}
        compute = _target("attention_half", outputs, input_output_aliases=aliases)
        hidden_TD, input_TD, ids_TA, weights_TA, keys, values = compute(
            *arguments,
            visible_NP,
            batch.block_tables_BM.astype(jnp.int32),
            batch.slots_T.astype(jnp.int32),
            batch.positions_T.astype(jnp.int32),
            kind=np.int64(_packed(params.query).kind),
            num_heads=np.int64(sizes.num_heads),
            logit_scale=np.float32(sizes.logit_scale),
        )
        cache = LayerCache(keys_NPRK=keys, values_NPRK=values)
        return AttentionResult(hidden_TD, input_TD, ids_TA, weights_TA, cache)

    def hold_layers(
        self,
        attention_L: Sequence[AttentionParams],
        experts_L: Sequence[ExpertParams],
        sizes: HalfSizes,
    ) -> HeldLayers | None:
        return HeldLayers(attention_L, experts_L, sizes) if can_hold(experts_L) else None

    def pass_layers(
        self,
        number_1: Int[Array, " 1"],
        hidden_TD: Float[Array, "T D"],
        batch: StepBatch,
        layers_L: tuple[LayerCache, ...],
        visible_NP: Array,
    ) -> tuple[Float[Array, "T D"], tuple[LayerCache, ...]]:
        return pass_layers(number_1, hidden_TD, batch, layers_L, visible_NP)

    def combine(
        self,
        params: AttentionParams,
        hidden_TD: Float[Array, "T D"],
        outputs_TAD: Float[Array, "T A D"],
        gate_weights_TA: Float[Array, "T A"],
    ) -> Float[Array, "T D"]:
        outputs_TAD, norm_D = _float32(outputs_TAD), params.expert_post_norm_D
        return _call("combine", hidden_TD.shape, hidden_TD, outputs_TAD, gate_weights_TA, norm_D)

    def rms_norm(
        self, hidden_TD: Float[Array, "T D"], scale_D: Float[Array, " D"]
    ) -> Float[Array, "T D"]:
        return _call("rms_norm", hidden_TD.shape, _float32(hidden_TD), scale_D)

    def linear(
        self, rows_TK: Float[Array, "T K"], matrix: Matrix, multiplier: float = 1.0
    ) -> Float[Array, "T N"]:
        packed = _packed(matrix)
        return _call(
            "linear",
            (rows_TK.shape[0], packed.num_out),
            _float32(rows_TK),
            packed.panels,
            packed.scales,
            kind=np.int64(packed.kind),
            num_in=np.int64(packed.num_in),
            num_out=np.int64(packed.num_out),
            multiplier=np.float32(multiplier),
        )

    def rope(
        self, heads_THK: Float[Array, "T H K"], positions_T: Int[Array, " T"]
    ) -> Float[Array, "T H K"]:
        frequencies_K = jnp.asarray(rope_frequencies(heads_THK.shape[-1]))
        positions_T = positions_T.astype(jnp.int32)
        return _call("rope", heads_THK.shape, _float32(heads_THK), positions_T, frequencies_K)

    def gate(
        self, hidden_TD: Float[Array, "T D"], gate_DE: Float[Array, "D E"], num_selected: int
    ) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
        shape = (hidden_TD.shape[0], num_selected)
        outputs = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))
        expert_ids_TA, gate_weights_TA = _target("gate", outputs)(_float32(hidden_TD), gate_DE)
        return expert_ids_TA, gate_weights_TA

    def expert_ffn(
        self,
        hidden_TD: Float[Array, "T D"],
        expert_ids_TA: Int[Array, "T A"],
        experts: ExpertParams,
    ) -> Float[Array, "T A D"]:
        matrices = (experts.gate_proj, experts.up_proj, experts.down_proj)
        is_mapped = isinstance(experts.gate_proj, MappedMatrix)
        return _call(
            "expert_ffn_mapped" if is_mapped else "expert_ffn",
            (*expert_ids_TA.shape, hidden_TD.shape[1]),
            _float32(hidden_TD),
            expert_ids_TA.astype(jnp.int32),
            *(part for matrix in matrices for part in _weights_and_scales(matrix)),
            kind=np.int64(_native(experts.gate_proj).kind),
            num_hidden=np.int64(_native(experts.gate_proj).num_out),
            num_experts=np.int64(experts.num_experts),
        )

    def weigh(
        self, outputs_TAD: Float[Array, "T A D"], gate_weights_TA: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        num_rows, _, width = outputs_TAD.shape
        return _call("weigh", (num_rows, width), _float32(outputs_TAD), gate_weights_TA)

    def gumbel(self, key_2: UInt32[Array, " 2"], num_places: int) -> Float[Array, " V"]:
        return _call("gumbel", (num_places,), key_2)

    def summarize_rows(self, logits_BV: Float[Array, "B V"]) -> RowSummary:
        floats = jax.ShapeDtypeStruct(logits_BV.shape[:1], jnp.float32)
        ids = jax.ShapeDtypeStruct(logits_BV.shape[:1], jnp.int32)
        return RowSummary(*_target("summarize_rows", (floats, ids, floats))(logits_BV))

    def write_rows(
        self,
        blocks_NPRK: Float[Array, "N P R K"],
        rows_TRK: Float[Array, "T R K"],
        places_T: Int[Array, " T"],
    ) -> Float[Array, "N P R K"]:
        # XLA's own scatter would copy the whole cache, although it is allowed to overwrite it.
        outputs = jax.ShapeDtypeStruct(blocks_NPRK.shape, blocks_NPRK.dtype)
        write = _target("write_rows", outputs, input_output_aliases={0: 0})
        return write(blocks_NPRK, rows_TRK, places_T.astype(jnp.int32))

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
        return _call(
            "attention",
            query_THK.shape,
            _float32(query_THK),
            keys_NPRK,
            values_NPRK,
            visible_NP,
            block_tables_TM.astype(jnp.int32),
            positions_T.astype(jnp.int32),
            logit_scale=np.float32(logit_scale),
        )


def exchange(
    rows_TD: Float[Array, "T D"],
    expert_ids_TA: Int[Array, "T A"],
    where_2: Int[Array, " 2"],
    layer: int,
) -> Float[Array, "T A D"]:
    """The outputs of each row's chosen experts, wherever they are; zeros for an id of -1.

    `where_2` has the number of an exchange node and that of a program's first layer, from which
    `layer` counts. Nodes are not part of the program, so one program serves every placement. It
    blocks until all outputs are there, or the node's batch is given up.

    For XLA it is a function of its arguments, which it is: if it were declared to have a side
    effect, XLA would copy the KV cache in every layer.
    """
    shape = (*expert_ids_TA.shape, rows_TD.shape[1])
    outputs = jax.ShapeDtypeStruct(shape, rows_TD.dtype)
    ask = _target("exchange", outputs)
    return ask(rows_TD, expert_ids_TA.astype(jnp.int32), where_2, layer=np.int64(layer))


def _target(name: str, outputs: Any, **options: Any) -> Callable[..., Any]:
    library()
    return jax.ffi.ffi_call(f"milliways_{name}", outputs, **options)


def _call(name: str, shape: tuple[int, ...], *arrays: Array, **attributes: np.generic) -> Array:
    """Calls a kernel that has one float32 result."""
    return _target(name, jax.ShapeDtypeStruct(shape, jnp.float32))(*arrays, **attributes)


def _float32(array: Array) -> Array:
    """The array as float32, the only input dtype of the kernels. bfloat16 is exact in it."""
    return array.astype(jnp.float32)


def _packed(matrix: Matrix) -> PackedMatrix:
    assert isinstance(matrix, PackedMatrix), "not packed for the CPU kernels"
    return matrix


def _native(matrix: Matrix) -> PackedMatrix | MappedMatrix:
    return matrix if isinstance(matrix, MappedMatrix) else _packed(matrix)


def _weights_and_scales(matrix: Matrix) -> tuple[Array, Array]:
    if isinstance(matrix, MappedMatrix):
        return matrix.regions, matrix.scales
    return _packed(matrix).panels, _packed(matrix).scales


def _pack(
    parts: Iterable[HostMatrix], count: int, kind_of: Callable[[np.ndarray], int]
) -> PackedMatrix:
    """Copies matrices of the same shape into panels, one after the other."""
    panels: np.ndarray | None = None
    all_scales: list[np.ndarray] = []
    kind = num_in = num_out = 0
    for weight, scales in parts:
        if panels is None:
            kind, (num_in, num_out) = kind_of(weight), weight.shape
            panel_bytes = library().mw_panel_bytes(kind, num_in, len(scales))
            assert panel_bytes > 0, (kind, num_in, len(scales))
            num_panels = -(-num_out // PANEL_COLUMNS)
            panels = _aligned_empty((count, num_panels, panel_bytes), np.dtype(np.uint8))
        contiguous = np.ascontiguousarray(weight)
        place = panels[len(all_scales)].ctypes.data
        library().mw_pack(contiguous.ctypes.data, kind, num_in, num_out, len(scales), place)
        all_scales.append(scales)
    assert panels is not None and len(all_scales) == count
    return PackedMatrix(
        panels=_hand_over(panels),
        scales=_padded_scales(all_scales),
        kind=kind,
        num_in=num_in,
        num_out=num_out,
    )


def _padded_scales(parts: Sequence[np.ndarray]) -> Array:
    """The float32 scales of a stack, padded to a multiple of the panel width."""
    num_groups, num_out = parts[0].shape
    padded = -(-num_out // PANEL_COLUMNS) * PANEL_COLUMNS
    scales = _aligned_empty((len(parts), num_groups, padded), np.dtype(np.float32))
    scales[...] = 0
    for one, part in zip(scales, parts, strict=True):
        one[:, :num_out] = part
    return _hand_over(scales)


def _unmap(numbers: list[int], views: list[np.ndarray]) -> None:
    """Unregisters the regions first, so that no kernel uses a file after it is unmapped."""
    for number in numbers:
        library().mw_unmap(number)
    views.clear()


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX can take over without a copy."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if num_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A kernel without such pages refuses the advice. That only costs speed.
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, dtype).reshape(shape)
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _hand_over(array: np.ndarray) -> Array:
    return jax.device_put(array, may_alias=True)
