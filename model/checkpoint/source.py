"""Where the parameters of a model come from: what the loaders of `model/params.py` ask for."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from milliways.model.checkpoint.layout import TensorRole, TensorSpec
from milliways.model.config import ModelConfig


class TensorSource(Protocol):
    """Gives the arrays of a model's tensors; `Checkpoint` and `CheckedTensors` are sources."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def bytes_read(self) -> int:
        """The bytes of all arrays handed out so far."""
        ...

    def find(self, role: TensorRole, layer: int | None = None) -> TensorSpec:
        """The tensor of a role."""
        ...

    def plain(self, tensor: TensorSpec) -> np.ndarray:
        """A whole float32 tensor."""
        ...

    def quantized(self, tensor: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
        """The whole int8 weights [K, N] and bfloat16 scales [G, N] of a tensor without experts."""
        ...

    def expect(self, layer: int, role: TensorRole, expert_ids: Sequence[int]) -> None:
        """Says that these experts are asked for next, so that a disk can begin to read."""
        ...

    def expert(
        self, layer: int, role: TensorRole, expert_id: int, *, stays_mapped: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The weights [K, N] and scales [G, N] of one expert of one layer.

        With `stays_mapped`, the caller computes from the returned view, and copies nothing.
        """
        ...

    def release_maps(self) -> None:
        """Says that the arrays handed out so far have been copied."""
        ...
