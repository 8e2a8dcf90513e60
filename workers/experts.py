"""The experts that a worker holds, and their computation.

Experts are in groups, as they were loaded: those of the first placement, and those that a later one
added, on each device. A group is a stack. A call goes to each group that holds experts it needs;
groups on several devices compute at the same time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from milliways.workers.call_runner import ExpertsMissingError
from milliways.workers.devices import Device


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Some experts of one layer, in the order of their stack."""

    expert_ids: tuple[int, ...]
    params: ExpertParams
    device: Device


@dataclass(frozen=True, slots=True)
class _Table:
    """What is held, at one time. Nothing in it ever changes: a new table replaces an old one."""

    groups: Mapping[int, tuple[ExpertGroup, ...]]
    # The groups of layers of which all experts were loaded at once.
    whole_layers: Mapping[int, tuple[ExpertGroup, ...]]
    # Whether there ever were experts on several devices.
    is_spread: bool

    def all_groups(self) -> Iterator[tuple[int, ExpertGroup]]:
        """Each group, with its layer."""
        for layer, groups in self.groups.items():
            for group in groups:
                yield layer, group


class ExpertShard:
    """Owns a worker's experts.

    `add` and `keep_only` belong to one thread. Any thread may call the other methods, each of which
    reads `_table` once.

    Invariant: a layer in `whole_layers` has exactly those groups in `groups`; no expert is in two.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._config = decoder.config
        self._table = _Table({}, {}, False)
        self._expert_half = jitted_parts(decoder).expert_half

    @property
    def held(self) -> frozenset[ExpertId]:
        return frozenset(
            ExpertId(layer, expert)
            for layer, group in self._table.all_groups()
            for expert in group.expert_ids
        )

    def held_on(self, device: Device) -> frozenset[ExpertId]:
        """The experts on one device."""
        return frozenset(
            ExpertId(layer, expert)
            for layer, group in self._table.all_groups()
            if group.device == device
            for expert in group.expert_ids
        )

    def add(self, layer: int, groups: Sequence[ExpertGroup]) -> None:
        """Adds experts of one layer that are not held yet, as they were loaded."""
        table, new = self._table, tuple(groups)
        whole_layers = dict(table.whole_layers)
        if sum(len(group.expert_ids) for group in new) == self._config.num_experts:
            whole_layers[layer] = new
        devices = {group.device for _, group in table.all_groups()} | {g.device for g in new}
        self._table = _Table(
            groups={**table.groups, layer: (*table.groups.get(layer, ()), *new)},
            whole_layers=whole_layers,
            is_spread=table.is_spread or len(devices) > 1,
        )

    def keep_only(self, wanted: Iterable[ExpertId]) -> None:
        """Drops groups of which no expert is wanted. A stack is kept or dropped as a whole."""
        table, wanted = self._table, frozenset(wanted)
        kept = {
            layer: tuple(
                group
                for group in groups
                if any(ExpertId(layer, expert) in wanted for expert in group.expert_ids)
            )
            for layer, groups in table.groups.items()
        }
        self._table = _Table(
            groups={layer: groups for layer, groups in kept.items() if groups},
            whole_layers={
                layer: groups
                for layer, groups in table.whole_layers.items()
                if kept[layer] == table.groups[layer]
            },
            is_spread=table.is_spread,
        )

    def examples(self) -> list[tuple[int, int]]:
        """A (layer, expert) for each size of stack on each device, and so for every program."""
        by_size = {
            (group.device, len(group.expert_ids)): (layer, group.expert_ids[0])
            for layer, group in self._table.all_groups()
        }
        return list(by_size.values())

    def whole_layer(self, layer: int) -> tuple[ExpertGroup, ...] | None:
        """The groups of a layer of which all experts were loaded at once.

        Layers that a take-over completed are excluded: the programs that run them were not compiled
        when this worker warmed up.
        """
        return self._table.whole_layers.get(layer)

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
        groups = self._table.groups.get(call.layer, ())
        missing = wanted.difference(*(group.expert_ids for group in groups))
        if missing:
            message = f"experts {sorted(missing)} of layer {call.layer} are not here"
            return Refusal(RefusalReason.NOT_HELD, message)
        return None

    def run(self, call: RunExperts) -> np.ndarray:
        """Outputs [N, D] of the activation type, a row for each id that is not -1.

        Raises:
            ExpertsMissingError: some of them are not here any more.
        """
        table = self._table
        num_rows, num_selected = call.expert_ids_TA.shape
        padded = bucket(num_rows, self._decoder.ops.min_rows)
        rows_TD = padded_rows(call.rows_TD, padded)
        ids_TA = padded_rows(call.expert_ids_TA, padded, -1)
        is_wanted = ids_TA >= 0
        started: list[tuple[np.ndarray, jax.Array]] = []
        for group in table.groups.get(call.layer, ()):
            places_TA = places_in(group.expert_ids, self._config.num_experts)[ids_TA]
            if (places_TA >= 0).any():
                rows = (rows_TD, places_TA)
                if table.is_spread:
                    # Like rows that come from another device: one program serves both.
                    rows = jax.device_put(rows, group.device)
                computing = self._expert_half(group.params, *rows)
                started.append((places_TA >= 0, computing))
        if len(started) == 1 and np.array_equal(started[0][0], is_wanted):
            return np.asarray(started[0][1])[is_wanted]
        if sum(np.count_nonzero(is_here) for is_here, _ in started) < np.count_nonzero(is_wanted):
            raise ExpertsMissingError(f"experts of layer {call.layer} are not here any more")
        # After all have begun: the devices compute and send at the same time.
        for _, computing in started:
            computing.copy_to_host_async()
        shape = (padded, num_selected, self._config.emb_size)
        outputs_TAD = np.zeros(shape, started[0][1].dtype)
        for is_here, computing in started:
            outputs_TAD[is_here] = np.asarray(computing)[is_here]
        return outputs_TAD[is_wanted]


@lru_cache(maxsize=1024)
def places_in(expert_ids: tuple[int, ...], num_experts: int) -> np.ndarray:
    """Each expert's place in a stack [E + 1]; -1 for experts elsewhere, and for the id -1."""
    # The last entry answers for the id -1.
    table = np.full(num_experts + 1, -1, np.int32)
    table[list(expert_ids)] = np.arange(len(expert_ids), dtype=np.int32)
    return table
