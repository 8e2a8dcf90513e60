"""The experts that a worker holds, and their computation.

A group holds the experts of one layer that were loaded together onto one device, as one stack. Each
placement that adds experts adds groups. A call runs every group that holds one of its experts;
groups on different devices compute at the same time.

A program is compiled for each size of a group. Later loads therefore make groups of few sizes
(`few_sizes`), whose programs are compiled before the worker is ready.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """An immutable snapshot of the experts that are held. A change makes a new table."""

    groups: Mapping[int, tuple[ExpertGroup, ...]]
    # For each layer whose experts were all loaded by one `add`: the groups of that layer.
    whole_layers: Mapping[int, tuple[ExpertGroup, ...]]
    # Whether experts have ever been on several devices at the same time.
    is_spread: bool

    def all_groups(self) -> Iterator[tuple[int, ExpertGroup]]:
        """Each group, with its layer."""
        for layer, groups in self.groups.items():
            for group in groups:
                yield layer, group


class ExpertShard:
    """Owns a worker's experts.

    Only one thread calls `add` and `keep_only`. Any thread may call the other methods; each reads
    `_table` once, so that it works with one snapshot.

    Invariant: `groups[layer]` equals `whole_layers[layer]` for each layer in `whole_layers`. An
    expert is in at most one group.
    """

    def __init__(
        self,
        decoder: Decoder,
        is_spread: bool = False,
        on_change: Callable[[Sequence[tuple[int, ExpertGroup]]], None] | None = None,
    ) -> None:
        """`is_spread` if the worker has several devices: sooner or later, experts are on them.

        `on_change` is told each group with its layer; dropped groups live until it returns.
        """
        self._on_change = on_change
        self._decoder = decoder
        self._config = decoder.config
        self._table = _Table({}, {}, is_spread)
        self._expert_half = jitted_parts(decoder).expert_half

    @property
    def is_spread(self) -> bool:
        """Whether rows are put on a device before they are computed there."""
        return self._table.is_spread

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
        """Adds the loaded groups of one layer. Their experts must not be held yet."""
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
        self._tell()

    def keep_only(self, wanted: Iterable[ExpertId]) -> None:
        """Drops each group that holds no wanted expert. A group with a wanted one is kept whole."""
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
        # The old table, and so the arrays of the dropped groups, is alive until this returns.
        self._tell()

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(tuple(self._table.all_groups()))

    def find(self, layer: int, expert_id: int) -> tuple[ExpertGroup, int] | None:
        """The group that has an expert, and its place in the group's stack; None if not held."""
        for group in self._table.groups.get(layer, ()):
            if expert_id in group.expert_ids:
                return group, group.expert_ids.index(expert_id)
        return None

    def examples(self) -> list[tuple[int, int]]:
        """One (layer, expert) for each device and group size; calls of all run every program."""
        by_size = {
            (group.device, len(group.expert_ids)): (layer, group.expert_ids[0])
            for layer, group in self._table.all_groups()
        }
        return list(by_size.values())

    def stacks(self) -> list[ExpertParams]:
        """The parameters of one group of each size."""
        by_size = {len(group.expert_ids): group.params for _, group in self._table.all_groups()}
        return list(by_size.values())

    def whole_layer(self, layer: int) -> tuple[ExpertGroup, ...] | None:
        """The groups of a layer if one `add` loaded all its experts, else None.

        If a later `add` completed the layer, because this worker took experts over, the result is
        None: the warm-up did not compile the programs that run such a layer.
        """
        return self._table.whole_layers.get(layer)

    def fault_of(self, call: RunExperts) -> Refusal | None:
        """The reason why this shard cannot compute a call; None if it can."""
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
        """Outputs [N, D] in the activation dtype: a row for each of the N ids that are not -1.

        Raises:
            ExpertsMissingError: some of the call's experts were dropped after `fault_of` passed it.
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
                    # The attention shard of this process puts its rows on the device in the same
                    # way, so both kinds of call share one compiled program.
                    rows = jax.device_put(rows, group.device)
                computing = self._expert_half(group.params, *rows)
                started.append((places_TA >= 0, computing))
        if len(started) == 1 and np.array_equal(started[0][0], is_wanted):
            return np.asarray(started[0][1])[is_wanted]
        if sum(np.count_nonzero(is_here) for is_here, _ in started) < np.count_nonzero(is_wanted):
            raise ExpertsMissingError(f"experts of layer {call.layer} are not here any more")
        # Copy only after every group has begun: then devices compute and send at the same time.
        for _, computing in started:
            computing.copy_to_host_async()
        shape = (padded, num_selected, self._config.emb_size)
        outputs_TAD = np.zeros(shape, started[0][1].dtype)
        for is_here, computing in started:
            outputs_TAD[is_here] = np.asarray(computing)[is_here]
        return outputs_TAD[is_wanted]


def few_sizes(num_experts: int) -> list[int]:
    """The sizes of groups that later loads make: the powers of two up to E, the largest first."""
    return [1 << n for n in reversed(range(num_experts.bit_length()))]


def in_few_sizes(expert_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cuts experts of a layer into groups of `few_sizes`."""
    first = 0
    while first < len(expert_ids):
        size = few_sizes(len(expert_ids) - first)[0]
        yield expert_ids[first : first + size]
        first += size


@lru_cache(maxsize=1024)
def places_in(expert_ids: tuple[int, ...], num_experts: int) -> np.ndarray:
    """The index in a group of each of the E experts, [E + 1]; -1 if the group does not hold it."""
    # The id -1 (no expert) indexes the last entry, which is always -1.
    table = np.full(num_experts + 1, -1, np.int32)
    table[list(expert_ids)] = np.arange(len(expert_ids), dtype=np.int32)
    return table
