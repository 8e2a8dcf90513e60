"""Gives the arrays of a tensor back as they were in its file, from the parameters in memory.

The kernels keep weights in another order, with padding, and scales in float32. Both can be undone
exactly, so a worker can give a part of the model to another one that cannot read its file.
"""

import ml_dtypes
import numpy as np

from milliways.model.checkpoint import TensorRole
from milliways.model.ops.native import EXACT_INT8, PAIRS, PANEL_COLUMNS
from milliways.model.params import (
    AttentionParams,
    EndParams,
    ExpertParams,
    MappedMatrix,
    Matrix,
    PackedMatrix,
    QuantizedMatrix,
)

_EXPERT_FIELDS = {
    TensorRole.EXPERT_LINEAR: "gate_proj",
    TensorRole.EXPERT_LINEAR_V: "up_proj",
    TensorRole.EXPERT_LINEAR_1: "down_proj",
}
_ATTENTION_FIELDS = {
    TensorRole.PRE_ATTENTION_NORM: "attention_norm_D",
    TensorRole.POST_ATTENTION_NORM: "attention_post_norm_D",
    TensorRole.PRE_MOE_NORM: "expert_norm_D",
    TensorRole.POST_MOE_NORM: "expert_post_norm_D",
    TensorRole.QUERY: "query",
    TensorRole.KEY: "key",
    TensorRole.VALUE: "value",
    TensorRole.ATTENTION_OUT: "out",
    TensorRole.GATE: "gate_DE",
}
_END_FIELDS = {TensorRole.EMBEDDING: "embedding_VD", TensorRole.FINAL_NORM: "final_norm_D"}
_FIELDS = {
    ExpertParams: _EXPERT_FIELDS,
    AttentionParams: _ATTENTION_FIELDS,
    EndParams: _END_FIELDS,
}


def released_arrays(
    params: ExpertParams | AttentionParams | EndParams, role: TensorRole, place: int | None = None
) -> list[np.ndarray]:
    """The arrays of a tensor in the order of its file: one, or weights and scales.

    `place` is that of an expert in its stack. The result is empty if the arrays are not in memory.
    """
    value: Matrix | np.ndarray = getattr(params, _FIELDS[type(params)][role])
    if isinstance(value, MappedMatrix):
        return []
    if isinstance(value, PackedMatrix):
        return _unpacked(value, place)
    if isinstance(value, QuantizedMatrix):
        at = ... if place is None else place
        scales = np.asarray(value.scales[at]).astype(ml_dtypes.bfloat16)
        return [np.asarray(value.weight[at]), scales]
    return [np.asarray(value)]


def _unpacked(matrix: PackedMatrix, place: int | None) -> list[np.ndarray]:
    """int8 [K, N] and bfloat16 [G, N] of a matrix in panels, as model/ops/native/kernels.h says."""
    at = ... if place is None else place
    # A CPU's arrays are views; slicing them before would compile a program.
    panels, scales_GN = np.asarray(matrix.panels)[at], np.asarray(matrix.scales)[at]
    num_in, num_out, num_groups = matrix.num_in, matrix.num_out, len(scales_GN)
    bytes_PB = panels.view(np.int8)
    num_panels = len(bytes_PB)
    if matrix.kind == EXACT_INT8:
        rows_PKC = bytes_PB.reshape(num_panels, num_in, PANEL_COLUMNS)
    else:
        assert matrix.kind == PAIRS
        group_rows = num_in // num_groups
        pairs = bytes_PB.reshape(num_panels, num_groups, -1, PANEL_COLUMNS, 2)
        # A group with an odd number of rows has a row of padding at its end.
        rows = pairs.swapaxes(3, 4).reshape(num_panels, num_groups, -1, PANEL_COLUMNS)
        rows_PKC = rows[:, :, :group_rows].reshape(num_panels, num_in, PANEL_COLUMNS)
    weight_KN = rows_PKC.swapaxes(0, 1).reshape(num_in, -1)[:, :num_out]
    scales = scales_GN[:, :num_out].astype(ml_dtypes.bfloat16)
    return [np.ascontiguousarray(weight_KN), np.ascontiguousarray(scales)]
