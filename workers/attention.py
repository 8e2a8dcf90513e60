"""An attention shard: a run of layers, their KV blocks, and the batches that pass them.

A batch enters before a layer and stops at the experts of each layer (`ExpertInput`). It continues
with their outputs, and leaves to another shard, or with tokens if the shard has the output head.

A batch does not stop at layers whose experts are all in this process, and no array of these layers
goes through the host. Consecutive layers that are whole on one device run as one program. If a
layer's experts are on several devices, its rows go to all of these at once, and come back.

With an exchange, a batch does not stop at any layer: programs of several layers ask for the
outputs of experts themselves, wherever these are (`model/ops/native/exchange.h`).

The blocks belong to one router at a time. That router decides which block belongs to which
sequence; a new router starts with empty blocks. It may also read and write whole blocks (`kv`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import jax
import numpy as np

from milliways.model.decoder import AttentionResult, Decoder
from milliways.model.kv_cache import LayerCache, StepBatch
from milliways.model.params import AttentionParams, EndParams, ExpertParams
from milliways.model.runner import CacheSize, bucket, draw_from_hidden, jitted_parts, padded_rows
from milliways.model.sampling_params import SampleRow
from milliways.wire.calls import (
    AdvanceBatch,
    BeginBatch,
    Departure,
    Drawn,
    ExpertInput,
    Refusal,
    TokenRows,
    Turn,
)
from milliways.wire.errors import RefusalReason
from milliways.workers.block_ownership import BlockOwnership, Owner
from milliways.workers.devices import Device
from milliways.workers.experts import ExpertGroup, places_in
from milliways.workers.kv_arrays import KvArrays
from milliways.workers.programs import (
    attend_and_deal,
    combine_and_attend,
    gather_and_combine,
    pass_and_exchange,
    pass_through,
)

MAX_BATCHES = 16
# A program with an exchange has as many layers as possible up to this, so that all of its runs have
# the same number: then one compiled program serves them all.
MAX_LAYERS_AT_ONCE = 16


class ExchangeNode(Protocol):
    """What a shard uses of an exchange: its number, and which batches nobody needs any more."""

    @property
    def number(self) -> int: ...

    @property
    def given_up(self) -> int: ...


@dataclass(slots=True)
class _Batch:
    """A batch that has begun: the rows are padded, `num_rows` of them are real.

    The step is on every device of the shard, the residual stream on `device`.
    """

    steps: Mapping[Device, StepBatch]
    num_rows: int
    samples: tuple[SampleRow, ...]
    logits_rows_W: np.ndarray
    hidden_TD: jax.Array
    device: Device
    layer: int
    gate_weights_TA: jax.Array | None = None

    @property
    def step(self) -> StepBatch:
        """The step on the device of the residual stream."""
        return self.steps[self.device]

    def move(self, device: Device) -> None:
        """Moves the residual stream to a device."""
        if device != self.device:
            self.hidden_TD = jax.device_put(self.hidden_TD, device)
            self.device = device


class AttentionShard:
    """Owns the attention parameters and KV arrays of layers `first_layer` and following.

    A layer's parameters are on its device of `layer_devices`, the ends on `end_device`.

    Invariants: one thread uses it. Every batch in `_batches` waits for the outputs of the experts
    of its layer, and is of the router that owns the blocks.
    """

    def __init__(
        self,
        decoder: Decoder,
        first_layer: int,
        attention: tuple[AttentionParams, ...],
        ends: EndParams | None,
        cache_size: CacheSize,
        whole_layer: Callable[[int], tuple[ExpertGroup, ...] | None],
        layer_devices: Sequence[Device],
        end_device: Device,
        node: ExchangeNode | None = None,
    ) -> None:
        """With a `node`, all layers must be here, on one device."""
        self.first_layer = first_layer
        self.num_layers = len(attention)
        self.cache_size = cache_size
        self._decoder = decoder
        self._params = dict(enumerate(attention, first_layer))
        self._ends = ends
        self._whole_layer = whole_layer
        self._devices = dict(enumerate(layer_devices, first_layer))
        self._end_device = end_device
        self.kv = KvArrays(decoder, first_layer, layer_devices, cache_size)
        self._batches: dict[tuple[Owner, int], _Batch] = {}
        self._ownership = BlockOwnership()
        self._parts = jitted_parts(decoder)
        self._go_on = combine_and_attend(decoder)
        self._pass = pass_through(decoder)
        self._deal = attend_and_deal(decoder)
        self._gather = gather_and_combine(decoder)
        self._node = node
        self._exchange = pass_and_exchange(decoder)
        # The runs of layers and the kinds of layers whose programs are compiled; a run of one layer
        # always is. None before `keep_to_programs`, when any may be compiled.
        self._lengths_run: set[int] = {1}
        self._kinds_run: set[tuple[Device, ...]] = set()
        self._may_compile = True

    @property
    def has_ends(self) -> bool:
        return self._ends is not None

    @property
    def has_exchange(self) -> bool:
        """Whether batches stop at no layer."""
        return self._node is not None

    def params_of(self, layer: int | None) -> AttentionParams | EndParams | None:
        """The parameters of a layer, or those of the ends for None; None if not here.

        They never change, so any thread may call this.
        """
        return self._ends if layer is None else self._params.get(layer)

    @property
    def tables_shape(self) -> tuple[int, int]:
        """B, M of the block tables of a step."""
        size = self.cache_size
        return size.max_slots, _blocks_per_sequence(self._decoder.config.sequence_len, size)

    def keep_to_programs(self) -> None:
        """From now on, uses only programs that have run, or that `spare_programs` compiled.

        The layers whose experts are all here may change. Longer runs of them are then computed one
        by one, and a layer that lies on devices as none did before stops for its experts.
        """
        self._may_compile = False

    def layers_on(self, device: Device) -> tuple[int, ...]:
        """The layers that are on one device."""
        return tuple(layer for layer, on in self._devices.items() if on == device)

    def read_cache(self) -> Mapping[int, LayerCache]:
        """The KV arrays by layer, for inspection; the next call invalidates them."""
        return self.kv.layers

    def begin(self, owner: Owner, call: BeginBatch) -> Turn | Refusal:
        """Begins a batch before its layer, and computes up to the first stop."""
        refusal = self._fault_of(owner, call)
        if refusal is not None:
            return refusal
        tokens = call.tokens
        steps = self._pad(tokens)
        if call.hidden_TD is None:
            assert self._ends is not None
            device = self._end_device
            hidden_TD = self._parts.embed(self._ends, steps[device].token_ids_T)
        else:
            device = self._devices.get(call.layer, self._end_device)
            num_rows = len(steps[device].token_ids_T)
            hidden_TD = jax.device_put(padded_rows(call.hidden_TD, num_rows), device)
        if call.layer < self._decoder.config.num_layers:
            self.kv.mark_visible(steps)
        rows_W = tokens.logits_rows_W
        batch = _Batch(
            steps, tokens.num_rows, tokens.samples, rows_W, hidden_TD, device, call.layer
        )
        return self._run(owner, call.batch_id, batch)

    def advance(self, owner: Owner, call: AdvanceBatch) -> Turn | Refusal:
        """Continues a batch with the outputs of the experts it stopped for."""
        batch = self._batches.get((owner, call.batch_id))
        if batch is None or batch.layer != call.layer:
            message = f"batch {call.batch_id} does not wait at layer {call.layer}"
            return Refusal(RefusalReason.UNKNOWN_BATCH, message)
        fault = self._outputs_fault(call, batch)
        if fault is not None:
            return fault
        del self._batches[(owner, call.batch_id)]
        outputs_TAD = padded_rows(call.outputs_TAD, batch.hidden_TD.shape[0])
        following = call.layer + 1
        is_near = self._devices.get(following) == batch.device
        if is_near and self._groups_of(following) is None:
            return self._combine_and_stop(owner, call.batch_id, batch, outputs_TAD)
        params = self._params[call.layer]
        batch.hidden_TD = self._parts.combine(
            params, batch.hidden_TD, outputs_TAD, batch.gate_weights_TA
        )
        batch.layer = following
        return self._run(owner, call.batch_id, batch)

    def abandon(self, owner: Owner, batch_id: int) -> None:
        """Forgets a batch."""
        self._batches.pop((owner, batch_id), None)

    def release(self, router_id: str) -> None:
        """Forgets the batches of a router that is gone."""
        for key in [key for key in self._batches if key[0][0] == router_id]:
            del self._batches[key]

    def _run(self, owner: Owner, batch_id: int, batch: _Batch) -> Turn | Refusal:
        """Computes from before a layer to the next stop."""
        if self._node is not None:
            self._pass_with_exchange(batch, self._node)
            # The exchanges of the batch are over now, and were done with zeros if it was given up.
            jax.block_until_ready(batch.hidden_TD)
            if self._node.given_up >= batch_id:
                return Refusal(RefusalReason.EXPIRED, "the batch was given up")
        self._pass_local_layers(batch)
        if batch.layer in self._params:
            return self._attend_and_stop(owner, batch_id, batch)
        if batch.layer < self._decoder.config.num_layers or self._ends is None:
            return Departure(np.asarray(batch.hidden_TD)[: batch.num_rows])
        if not batch.samples:
            return Drawn(())
        hidden_WD = np.asarray(batch.hidden_TD)[batch.logits_rows_W]
        unembed = partial(self._parts.unembed, self._ends)
        drawn = draw_from_hidden(
            unembed,
            hidden_WD,
            batch.samples,
            self._decoder.ops,
            self.cache_size.max_logits_rows,
            self._decoder.config.sequence_len,
        )
        return Drawn(tuple(drawn))

    def _pass_with_exchange(self, batch: _Batch, node: ExchangeNode) -> None:
        """Runs all layers that follow."""
        step = _layers_at_once(self.num_layers)
        while batch.layer in self._params:
            layers = range(batch.layer, batch.layer + step)
            batch.hidden_TD, caches = self._exchange(
                tuple(self._params[layer] for layer in layers),
                batch.hidden_TD,
                batch.step,
                tuple(self.kv.layers[layer] for layer in layers),
                self.kv.visible_NP[batch.device],
                np.array((node.number, batch.layer), np.int32),
            )
            self.kv.layers.update(zip(layers, caches, strict=True))
            batch.layer = layers.stop

    def _pass_local_layers(self, batch: _Batch) -> None:
        """Runs the next layers, as long as their experts are all here."""
        while batch.layer in self._params:
            batch.move(self._devices[batch.layer])
            stacks = self._stacks_ahead(batch)
            if stacks:
                self._pass_stacks(batch, stacks)
                continue
            groups = self._groups_of(batch.layer)
            if groups is None:
                return
            self._pass_groups(batch, groups)

    def _stacks_ahead(self, batch: _Batch) -> list[ExpertParams]:
        """The experts of the next layers, as long as each has them in one stack on this device."""
        stacks: list[ExpertParams] = []
        layer = batch.layer
        while self._devices.get(layer) == batch.device:
            groups = self._whole_layer(layer)
            if groups is None or not self._is_one_stack(groups, batch.device):
                break
            stacks.append(groups[0].params)
            layer += 1
        if self._may_compile:
            self._lengths_run.add(len(stacks))
        return stacks if len(stacks) in self._lengths_run else stacks[:1]

    def _is_one_stack(self, groups: Sequence[ExpertGroup], device: Device) -> bool:
        everything = tuple(range(self._decoder.config.num_experts))
        return (groups[0].device, groups[0].expert_ids) == (device, everything)

    def _groups_of(self, layer: int) -> tuple[ExpertGroup, ...] | None:
        """The groups of a layer that does not stop, as its experts are all here; else None."""
        groups, device = self._whole_layer(layer), self._devices.get(layer)
        if groups is None or device is None:
            return None
        if self._is_one_stack(groups, device):
            return groups
        kind = (device, *(group.device for group in groups))
        if self._may_compile:
            self._kinds_run.add(kind)
        return groups if kind in self._kinds_run else None

    def _pass_stacks(self, batch: _Batch, stacks: Sequence[ExpertParams]) -> None:
        layers = range(batch.layer, batch.layer + len(stacks))
        batch.hidden_TD, caches = self._pass(
            tuple(self._params[layer] for layer in layers),
            tuple(stacks),
            batch.hidden_TD,
            batch.step,
            tuple(self.kv.layers[layer] for layer in layers),
            self.kv.visible_NP[batch.device],
        )
        self.kv.layers.update(zip(layers, caches, strict=True))
        batch.layer = layers.stop

    def _pass_groups(self, batch: _Batch, groups: Sequence[ExpertGroup]) -> None:
        """Runs one layer whose experts are in several stacks, on any devices."""
        layer, num_experts = batch.layer, self._decoder.config.num_experts
        params = self._params[layer]
        tables_GE = np.stack([places_in(group.expert_ids, num_experts) for group in groups])
        result, places_GTA = self._deal(
            params,
            batch.hidden_TD,
            batch.step,
            self.kv.layers[layer],
            self.kv.visible_NP[batch.device],
            tables_GE,
        )
        self.kv.layers[layer] = result.cache
        outputs_GTAD: list[jax.Array] = []
        # Nothing here waits for a device, so all of them compute at the same time.
        for group, places_TA in zip(groups, places_GTA, strict=True):
            rows = jax.device_put((result.expert_input_TD, places_TA), group.device)
            outputs_TAD = self._parts.expert_half(group.params, *rows)
            outputs_GTAD.append(jax.device_put(outputs_TAD, batch.device))
        batch.hidden_TD = self._gather(
            params, result.hidden_TD, tuple(outputs_GTAD), places_GTA, result.gate_weights_TA
        )
        batch.layer += 1

    def _attend_and_stop(self, owner: Owner, batch_id: int, batch: _Batch) -> ExpertInput:
        layer = batch.layer
        result = self._parts.attention_half(
            self._params[layer],
            batch.hidden_TD,
            batch.step,
            self.kv.layers[layer],
            self.kv.visible_NP[batch.device],
        )
        return self._stop(owner, batch_id, batch, result)

    def _combine_and_stop(
        self, owner: Owner, batch_id: int, batch: _Batch, outputs_TAD: np.ndarray
    ) -> ExpertInput:
        """Combines and runs the next attention half in one program: one call to the device."""
        following = batch.layer + 1
        result = self._go_on(
            self._params[batch.layer],
            self._params[following],
            batch.hidden_TD,
            outputs_TAD,
            batch.gate_weights_TA,
            batch.step,
            self.kv.layers[following],
            self.kv.visible_NP[batch.device],
        )
        batch.layer = following
        return self._stop(owner, batch_id, batch, result)

    def _stop(
        self, owner: Owner, batch_id: int, batch: _Batch, result: AttentionResult
    ) -> ExpertInput:
        self.kv.layers[batch.layer] = result.cache
        batch.hidden_TD, batch.gate_weights_TA = result.hidden_TD, result.gate_weights_TA
        self._batches[(owner, batch_id)] = batch
        rows_TD, ids_TA = jax.device_get((result.expert_input_TD, result.expert_ids_TA))
        return ExpertInput(batch.layer, rows_TD[: batch.num_rows], ids_TA[: batch.num_rows])

    def _fault_of(self, owner: Owner, call: BeginBatch) -> Refusal | None:
        """Why a batch cannot begin, if it cannot."""
        before = self._ownership.owner
        refusal = self._ownership.enter(owner)
        if self._ownership.owner != before:
            self._batches.clear()
        if refusal is not None:
            return refusal
        num_layers = self._decoder.config.num_layers
        is_end = call.layer == num_layers or (call.layer == 0 and call.hidden_TD is None)
        if not (call.layer in self._params or call.layer == num_layers):
            return Refusal(RefusalReason.NOT_HELD, f"layer {call.layer} is not here")
        if is_end and self._ends is None:
            return Refusal(RefusalReason.NOT_HELD, "neither embedding nor output head is here")
        if len(self._batches) >= MAX_BATCHES:
            # Ids grow and few batches run at a time. So the router has abandoned the oldest batch,
            # and the message that said so was lost with its stream.
            del self._batches[min(self._batches)]
        return self._rows_fault(call)

    def _rows_fault(self, call: BeginBatch) -> Refusal | None:
        """Checks that all indices are in range, which the kernels do not check."""
        tokens, size, config = call.tokens, self.cache_size, self._decoder.config
        hidden_TD = call.hidden_TD
        num_rows = tokens.num_rows
        tables = tokens.block_tables_BM
        is_sound = (
            num_rows > 0
            and len(tokens.positions_T) == len(tokens.slots_T) == num_rows
            and (hidden_TD is None or hidden_TD.shape == (num_rows, config.emb_size))
            and (call.layer == 0 or hidden_TD is not None)
            and tables.ndim == 2
            and 0 < tables.shape[0] <= size.max_slots
            and tables.shape[1] <= _blocks_per_sequence(config.sequence_len, size)
            and _within(tables, size.num_blocks)
            and _within(tokens.token_ids_T, config.vocab_size)
            and _within(tokens.positions_T, tables.shape[1] * size.block_size)
            and _within(tokens.slots_T, tables.shape[0])
            and _within(tokens.logits_rows_W, num_rows)
            and len(tokens.samples) == len(tokens.logits_rows_W) <= num_rows
            and all((row.given_id or 0) < config.vocab_size for row in tokens.samples)
        )
        if is_sound:
            return None
        return Refusal(RefusalReason.MALFORMED, "rows, positions, slots and tables do not fit")

    def _outputs_fault(self, call: AdvanceBatch, batch: _Batch) -> Refusal | None:
        config = self._decoder.config
        wanted = (batch.num_rows, config.num_selected_experts, config.emb_size)
        if call.outputs_TAD.shape == wanted and call.outputs_TAD.dtype == self._decoder.dtype:
            return None
        message = f"outputs {call.outputs_TAD.shape} of {call.outputs_TAD.dtype}, wanted {wanted}"
        return Refusal(RefusalReason.MALFORMED, message)

    def _pad(self, tokens: TokenRows) -> dict[Device, StepBatch]:
        """Pads rows and tables to few different sizes, so that few programs are compiled."""
        min_rows, size = self._decoder.ops.min_rows, self.cache_size
        num_rows = bucket(tokens.num_rows, min_rows)
        blocks = _blocks_per_sequence(self._decoder.config.sequence_len, size)
        tables_BM = np.zeros((size.max_slots, blocks), np.int32)
        tables = tokens.block_tables_BM
        tables_BM[: tables.shape[0], : tables.shape[1]] = tables
        positions_T = np.full(num_rows, -1, np.int32)
        positions_T[: tokens.num_rows] = tokens.positions_T
        arrays = (
            padded_rows(tokens.token_ids_T, num_rows),
            positions_T,
            padded_rows(tokens.slots_T, num_rows),
            tables_BM,
            # Attention does not need to know which rows draw a token.
            np.zeros(0, np.int32),
        )
        if self.has_exchange:
            # They are in the memory of the host already. To bring them to JAX takes half a ms.
            return {self._end_device: StepBatch(*cast("tuple[jax.Array, ...]", arrays))}
        # Once for all layers: otherwise each layer would copy the host's arrays to the device.
        devices = dict.fromkeys((self._end_device, *self.kv.visible_NP))
        return {device: StepBatch(*jax.device_put(arrays, device)) for device in devices}


def _layers_at_once(num_layers: int) -> int:
    """The largest divisor that is not above MAX_LAYERS_AT_ONCE."""
    most = min(num_layers, MAX_LAYERS_AT_ONCE)
    return next(count for count in range(most, 0, -1) if num_layers % count == 0)


def _blocks_per_sequence(sequence_len: int, size: CacheSize) -> int:
    return -(-sequence_len // size.block_size)


def _within(indices: np.ndarray, end: int) -> bool:
    return indices.size == 0 or (int(indices.min()) >= 0 and int(indices.max()) < end)
