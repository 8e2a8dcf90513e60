"""Reads parts of the model out of a worker's memory, for workers that cannot read their files."""

from collections.abc import Callable

import numpy as np

from milliways.model.checkpoint import TensorSpec, tensor_specs
from milliways.model.config import ModelConfig
from milliways.model.released import released_arrays
from milliways.workers.attention import AttentionShard
from milliways.workers.experts import ExpertShard


class HeldParts:
    """What a worker can give away. Any thread may call it: parameters never change."""

    def __init__(
        self,
        config: ModelConfig,
        experts: ExpertShard,
        attention: Callable[[], AttentionShard | None],
    ) -> None:
        self._specs: dict[str, TensorSpec] = {spec.name: spec for spec in tensor_specs(config)}
        self._experts = experts
        self._attention = attention

    def read(self, tensor: str, expert_id: int | None) -> list[np.ndarray]:
        """The arrays of a tensor, or of one expert of it, as in its file; empty if not held."""
        spec = self._specs.get(tensor)
        if spec is None or spec.role.is_expert != (expert_id is not None):
            return []
        if expert_id is not None:
            assert spec.layer is not None
            found = self._experts.find(spec.layer, expert_id)
            return [] if found is None else released_arrays(found[0].params, spec.role, found[1])
        attention = self._attention()
        params = None if attention is None else attention.params_of(spec.layer)
        return [] if params is None else released_arrays(params, spec.role)
