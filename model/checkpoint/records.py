"""The places of the arrays of a tensor file: the result of a scan, which reads no payload."""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
INT8 = np.dtype(np.int8)


@dataclass(frozen=True, slots=True)
class ArrayRecord:
    """An array in a file: `num_bytes` bytes from `offset` on, in C order, little-endian."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def describe(self) -> str:
        return describe_array(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainArray:
    """A file that holds one numpy array."""

    path: Path
    num_file_bytes: int
    num_scanned_bytes: int
    array: ArrayRecord

    @property
    def arrays(self) -> tuple[ArrayRecord, ...]:
        return (self.array,)

    def describe(self) -> str:
        return f"plain {self.array.describe()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedArray:
    """A file that holds 8-bit weights and their scales."""

    path: Path
    num_file_bytes: int
    num_scanned_bytes: int
    weight: ArrayRecord
    scales: ArrayRecord

    @property
    def arrays(self) -> tuple[ArrayRecord, ...]:
        return (self.weight, self.scales)

    def describe(self) -> str:
        return f"quantised {self.weight.describe()} with scales {self.scales.describe()}"


TensorRecord = PlainArray | QuantizedArray


def describe_array(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    """For example `int8 [8, 128, 688]`, for messages."""
    return f"{dtype.name} {list(shape)}"
