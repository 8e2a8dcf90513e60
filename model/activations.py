"""The numbers that activations are rounded to before a product, and the output head to match."""

from enum import Enum

import numpy as np
from jaxtyping import Float, Integer

QUANT_BLOCK = 32
# A block counts as zeros if its largest input is below this: 127 / input would not be finite.
LEAST_BLOCK = 1e-30
_HEAD_CHUNK_ROWS = 4096


class Activations(Enum):
    """The form of the activations that are multiplied with int8 weights.

    EXACT keeps activations as they are. INT8 rounds the activations of a row in blocks of
    `QUANT_BLOCK`, to multiples of 1/127 of the largest in the block. Sums of products are then sums
    of whole numbers, which are cheap.
    """

    EXACT = "exact"
    INT8 = "int8"


def quantise_head(
    embedding_VD: Float[np.ndarray, "V D"], activations: Activations
) -> tuple[Integer[np.ndarray, "D V"], Float[np.ndarray, "G V"]]:
    """Quantises the tied embedding: returns a matrix [D, V] and its scale rows.

    The released table is float32. In a small model, reading it would be most of the bytes that a
    token reads. EXACT rounds the row of each token to int16, with an error of at most 2^-16 of its
    largest entry. That is 1/256 of the error of bfloat16, in which the reference multiplies. INT8
    rounds blocks of `QUANT_BLOCK` entries to int8.
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
        # Any scale is right for a row of zeros. A NaN in a row makes its scale NaN.
        scales = np.where(scales == 0, np.float32(1), scales)
        with np.errstate(invalid="ignore"):
            whole = np.rint(np.nan_to_num(blocks / scales))
        weight_DV[:, start : start + len(rows)] = whole.reshape(len(rows), width).T
        scales_GV[:, start : start + len(rows)] = scales[:, :, 0].T
    return weight_DV, scales_GV
