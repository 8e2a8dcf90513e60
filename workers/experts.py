"""The experts that a worker holds, and their computation.

Experts come in groups, as they were loaded: what a placement gives at first, and what a later one
adds, on each device. A group is a stack; a call goes to each group that holds experts it wants, and
groups on several devices compute at the same time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np

from milliways.model.decoder import Decoder
from milliways.model.params import ExpertParams
from milliways.model.runner import bucket, jitted_parts, padded_rows
from milliways.wire.calls import Refusal, RunExperts
from milliways.wire.errors import RefusalReason
from milliways.wire.placement import ExpertId
from milliways.workers.devices import Device


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Some experts of one layer, in the order of their stack."""

    expert_ids: tuple[int, ...]
    params: ExpertParams
    device: Device


class ExpertShard:
    """Owns a worker's experts. Groups may be added and dropped between calls."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._config = decoder.config
        self._groups: dict[int, list[ExpertGroup]] = {}
        self._whole_layers: dict[int, tuple[ExpertGroup, ...]] = {}
        self._is_spread = False
        self._expert_half = jitted_parts(decoder).expert_half

    @property
    def held(self) -> frozenset[ExpertId]:
        return frozenset(
            ExpertId(layer, expert)
            for layer, groups in self._groups.items()
            for group in groups
            for expert in group.expert_ids
        )

    def held_on(self, device: Device) -> frozenset[ExpertId]:
        """What lies on one device."""
        return frozenset(
            ExpertId(layer, expert)
            for layer, groups in self._groups.items()
            for group in groups
            if group.device == device
            for expert in group.expert_ids
        )

    def add(self, layer: int, groups: Sequence[ExpertGroup]) -> None:
        """Takes in experts that are not held yet, of one layer, as they were loaded."""
        self._groups.setdefault(layer, []).extend(groups)
        if sum(len(group.expert_ids) for group in groups) == self._config.num_experts:
            self._whole_layers[layer] = tuple(groups)
        devices = {group.device for groups in self._groups.values() for group in groups}
        self._is_spread = self._is_spread or len(devices) > 1

    def keep_only(self, wanted: Iterable[ExpertId]) -> None:
        """Drops groups of which nothing is wanted any more; a stack goes as a whole or not."""
        wanted = frozenset(wanted)
        for layer, groups in list(self._groups.items()):
            kept = [
                group
                for group in groups
                if any(ExpertId(layer, expert) in wanted for expert in group.expert_ids)
            ]
            if len(kept) < len(groups):
                self._whole_layers.pop(layer, None)
            if kept:
                self._groups[layer] = kept
            else:
                del self._groups[layer]

    def examples(self) -> list[tuple[int, int]]:
        """A (layer, expert) of each size of stack on each device: they run every program."""
        by_size = {
            (group.device, len(group.expert_ids)): (layer, group.expert_ids[0])
            for layer, groups in self._groups.items()
            for group in groups
        }
        return list(by_size.values())

    def whole_layer(self, layer: int) -> tuple[ExpertGroup, ...] | None:
        """The groups of a layer of which all experts were loaded at once.

        One that became whole by taking over from the dead is none: the programs that run it were
        not compiled when this worker warmed up.
        """
        return self._whole_layers.get(layer)

    def fault_of(self, call: RunExperts) -> Refusal | None:
        """Why a call cannot be computed here, if it cannot."""
        shapes = (call.rows_TD.shape, call.expert_ids_TA.shape)
        width = self._config.emb_size
        is_sound = (
            call.rows_TD.ndim == 2
            and call.expert_ids_TA.ndim == 2
            and shapes[0][1] == width
            and shapes[0][0] == shapes[1][0] > 0
            and call.rows_TD.dtype == self._decoder.dtype
        )
        if not is_sound:
            message = (
                f"rows {shapes[0]} of {call.rows_TD.dtype} with ids {shapes[1]}: rows of width"
            )
            return Refusal(RefusalReason.MALFORMED, f"{message} {width} are computed here")
        wanted = {int(expert) for expert in np.unique(call.expert_ids_TA)} - {-1}
        missing = wanted - {
            e for group in self._groups.get(call.layer, []) for e in group.expert_ids
        }
        if missing:
            message = f"experts {sorted(missing)} of layer {call.layer} are not here"
            return Refusal(RefusalReason.NOT_HELD, message)
        return None

    def run(self, call: RunExperts) -> np.ndarray:
        """Outputs [N, D] of the activation type, a row for each id that is not -1."""
        num_rows, num_selected = call.expert_ids_TA.shape
        padded = bucket(num_rows, self._decoder.ops.min_rows)
        rows_TD = padded_rows(call.rows_TD, padded)
        ids_TA = padded_rows(call.expert_ids_TA, padded, -1)
        is_wanted = ids_TA >= 0
        started: list[tuple[np.ndarray, jax.Array]] = []
        for group in self._groups[call.layer]:
            places_TA = places_in(group.expert_ids, self._config.num_experts)[ids_TA]
            if (places_TA >= 0).any():
                rows = (rows_TD, places_TA)
                if self._is_spread:
                    # As they come from other devices: one program for both.
                    rows = jax.device_put(rows, group.device)
                computing = self._expert_half(group.params, *rows)
                started.append((places_TA >= 0, computing))
        # Not before all have begun: each device has its own to compute, and its own to send.
        if len(started) > 1:
            for _, computing in started:
                computing.copy_to_host_async()
        outputs_TAD: np.ndarray | None = None
        for is_here, computing in started:
            computed = np.asarray(computing)
            if outputs_TAD is None and np.array_equal(is_here, is_wanted):
                outputs_TAD = computed
            else:
                shape = (padded, num_selected, self._config.emb_size)
                outputs_TAD = (
                    np.zeros(shape, computed.dtype) if outputs_TAD is None else outputs_TAD
                )
                outputs_TAD[is_here] = computed[is_here]
        assert outputs_TAD is not None
        return outputs_TAD[is_wanted]


@lru_cache(maxsize=1024)
def places_in(expert_ids: tuple[int, ...], num_experts: int) -> np.ndarray:
    """Where in a stack each expert lies [E + 1]; -1 for those elsewhere, and for the id -1."""
    # The last entry answers for the id -1.
    table = np.full(num_experts + 1, -1, np.int32)
    table[list(expert_ids)] = np.arange(len(expert_ids), dtype=np.int32)
    return table
