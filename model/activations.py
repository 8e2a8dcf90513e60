"""In which numbers activations meet the weights, and the output head that goes with each choice."""

from enum import Enum

import numpy as np
from jaxtyping import Float, Integer

QUANT_BLOCK = 32
# A block whose largest input is below it counts as zeros: 127 over it would not be finite.
LEAST_BLOCK = 1e-30
_HEAD_CHUNK_ROWS = 4096


class Activations(Enum):
    """What is multiplied with int8 weights.

    EXACT keeps activations as they are. INT8 rounds each run of `QUANT_BLOCK` inputs of a row to
    whole numbers of 1/127 of its largest: sums of products are then whole numbers, and cheap.
    """

    EXACT = "exact"
    INT8 = "int8"


def quantise_head(
    embedding_VD: Float[np.ndarray, "V D"], activations: Activations
) -> tuple[Integer[np.ndarray, "D V"], Float[np.ndarray, "G V"]]:
    """The tied embedding as a matrix [D, V] to multiply with, and its scale rows.

    The released table is float32, and reading it whole would be most of the bytes of a token in a
    small model. EXACT rounds each token's row to int16, 2^-16 of its largest entry, 1/256 of what
    bfloat16 (in which the reference multiplies) loses. INT8 rounds runs of `QUANT_BLOCK` entries.
    """
    num_tokens, width = embedding_VD.shape
    is_exact = activations is Activations.EXACT
    block = width if is_exact or width % QUANT_BLOCK else QUANT_BLOCK
    largest, dtype = (32767, np.int16) if is_exact else (127, np.int8)
    weight_DV = np.empty((width, num_tokens), dtype)
    scales_GV = np.empty((width // block, num_tokens), np.float32)
    for start in range(0, num_tokens, _HEAD_CHUNK_ROWS):
        rows = embedding_VD[start : start + _HEAD_CHUNK_ROWS]
        blocks = rows.reshape(len(rows), -1, block)
        scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(largest)
        # A row of zeros has any scale; a NaN stays one in the scale.
        scales = np.where(scales == 0, np.float32(1), scales)
        with np.errstate(invalid="ignore"):
            whole = np.rint(np.nan_to_num(blocks / scales))
        weight_DV[:, start : start + len(rows)] = whole.reshape(len(rows), width).T
        scales_GV[:, start : start + len(rows)] = scales[:, :, 0].T
    return weight_DV, scales_GV
