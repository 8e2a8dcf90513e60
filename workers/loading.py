"""Reads a worker's shards from the checkpoint: its own bytes, a layer at a time, and no others."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from cluster.placement import ExpertId, ShardPlan
from model.checkpoint import Checkpoint
from model.decoder import Decoder
from model.params import AttentionParams, Loader, load_attention, load_ends, load_experts
from model.runner import CacheSize
from workers.attention import AttentionShard
from workers.experts import ExpertGroup, ExpertShard


class ShardLoader:
    """Loads what plans ask for; `on_progress` hears of the bytes read so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        loader: Loader,
        on_progress: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder
        # Mapped experts live as long as their loader.
        self._loader = loader
        self._on_progress = on_progress

    @property
    def bytes_read(self) -> int:
        return self._checkpoint.bytes_read

    def load_attention(
        self, plan: ShardPlan, experts: ExpertShard, cache_size: CacheSize
    ) -> AttentionShard | None:
        """The attention shard of a plan; None where it has none."""
        if not plan.has_attention:
            return None
        ends = load_ends(self._checkpoint, self._loader) if plan.has_ends else None
        self._report()
        layers = range(plan.first_layer, plan.first_layer + plan.num_layers)
        attention: list[AttentionParams] = []
        for layer in layers:
            attention.append(load_attention(self._checkpoint, layer, self._loader))
            self._report()
        return AttentionShard(
            self._decoder, plan.first_layer, tuple(attention), ends, cache_size, experts.whole_layer
        )

    def load_experts(self, wanted: Iterable[ExpertId]) -> dict[int, ExpertGroup]:
        """Experts by layer, those of a layer in one stack."""
        by_layer: defaultdict[int, list[int]] = defaultdict(list)
        for expert_id in sorted(wanted):
            by_layer[expert_id.layer].append(expert_id.expert)
        groups: dict[int, ExpertGroup] = {}
        for layer, expert_ids in by_layer.items():
            params = load_experts(self._checkpoint, layer, self._loader, expert_ids)
            groups[layer] = ExpertGroup(tuple(expert_ids), params)
            self._report()
        return groups

    def _report(self) -> None:
        self._on_progress(self._checkpoint.bytes_read)
