"""Rounds float matrices to the released form, int8 weights with bfloat16 scales, in NumPy."""

import ml_dtypes
import numpy as np

INT8_MAX = 127
# The scale of a column of zeros. Any positive scale is right for it; readers refuse zero.
SCALE_MIN = 2.0**-40


def quantise(weight_f32: np.ndarray, num_scale_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [..., K, N] and bfloat16 scales [..., G, N]: one scale per output column and row block.

    The weights are divided by the scale as it is stored, which is already rounded to bfloat16.
    """
    *stack, num_rows, num_columns = weight_f32.shape
    assert num_rows % num_scale_rows == 0, (weight_f32.shape, num_scale_rows)
    blocks = weight_f32.reshape(*stack, num_scale_rows, -1, num_columns)
    scales = np.maximum(np.abs(blocks).max(axis=-2) / INT8_MAX, SCALE_MIN)
    scales = scales.astype(ml_dtypes.bfloat16)
    steps = np.rint(blocks / scales.astype(np.float32)[..., None, :])
    steps = np.clip(steps, -INT8_MAX, INT8_MAX).astype(np.int8)
    return steps.reshape(weight_f32.shape), scales


def dequantise(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix that weights and scales represent."""
    *stack, _, num_columns = weight.shape
    blocks = weight.reshape(*stack, scales.shape[-2], -1, num_columns).astype(np.float32)
    return (blocks * scales.astype(np.float32)[..., None, :]).reshape(weight.shape)
