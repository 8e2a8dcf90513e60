"""An attention shard: a run of layers, their KV blocks, and the batches on their way through.

A batch enters before a layer, stops at the experts of each layer (`ExpertInput`), goes on with
their outputs, and leaves: for another shard, or with tokens where the shard has the output head.
Layers whose experts are all in this process do not stop: consecutive ones run as one program,
without leaving the device.

The blocks belong to one router at a time. Which block belongs to which sequence is that router's
business; a new one starts from nothing. That router may also read and write whole blocks: copies of
keys and values, from and for another process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluster.calls import (
    AdvanceBatch,
    BeginBatch,
    Departure,
    Drawn,
    ExpertInput,
    Refusal,
    StoreBlocks,
    TokenRows,
    Turn,
)
from cluster.errors import RefusalReason
from model.decoder import AttentionResult, Decoder
from model.kv_cache import LayerCache, StepBatch, make_kv_cache, read_block, write_block
from model.params import AttentionParams, EndParams, ExpertParams
from model.runner import CacheSize, bucket, draw_from_hidden, jitted_parts, padded_rows
from model.sampling_params import SampleRow
from workers.tenancy import Owner, Tenancy

MAX_BATCHES = 16


@dataclass(slots=True)
class _Batch:
    """A batch on its way: the rows are padded, `num_rows` of them are real."""

    step: StepBatch
    num_rows: int
    samples: tuple[SampleRow, ...]
    logits_rows_W: np.ndarray
    hidden_TD: jax.Array
    layer: int
    gate_weights_TA: jax.Array | None = None


class AttentionShard:
    """Owns the attention parameters and KV arrays of layers `first_layer` and following."""

    def __init__(
        self,
        decoder: Decoder,
        first_layer: int,
        attention: tuple[AttentionParams, ...],
        ends: EndParams | None,
        cache_size: CacheSize,
        whole_layer: Callable[[int], ExpertParams | None],
    ) -> None:
        config = decoder.config
        self.first_layer = first_layer
        self.num_layers = len(attention)
        self.cache_size = cache_size
        self._decoder = decoder
        self._params = dict(enumerate(attention, first_layer))
        self._ends = ends
        self._whole_layer = whole_layer
        cache = make_kv_cache(
            config, len(attention), cache_size.num_blocks, cache_size.block_size, decoder.dtype
        )
        self._caches = dict(enumerate(cache.layers_L, first_layer))
        self._visible_NP = cache.visible_NP
        self._batches: dict[tuple[Owner, int], _Batch] = {}
        self._tenancy = Tenancy()
        self._parts = jitted_parts(decoder)
        self._go_on = _combine_and_attend(decoder)
        self._pass = _pass_through(decoder)

    @property
    def has_ends(self) -> bool:
        return self._ends is not None

    @property
    def num_batches(self) -> int:
        """Batches on their way; 0 when nothing runs."""
        return len(self._batches)

    def read_cache(self) -> Mapping[int, LayerCache]:
        """The KV arrays by layer, for inspection; the next call invalidates them."""
        return self._caches

    @property
    def block_bytes(self) -> int:
        """Of the keys and values of one block, in all layers of the shard."""
        values = np.prod(self._block_shape, dtype=np.int64) * self._decoder.dtype.itemsize
        return 2 * int(values)

    def read_blocks(self, block_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [C, L, P, R, K] of blocks, copied."""
        read, _ = _block_programs()
        layers_L = tuple(self._caches.values())
        # One at a time: a program for each number of blocks would have to be compiled.
        blocks = [jax.device_get(read(layers_L, np.int32(block_id))) for block_id in block_ids]
        keys_CLPRK, values_CLPRK = zip(*blocks, strict=True)
        return np.stack(keys_CLPRK), np.stack(values_CLPRK)

    def write_block(
        self,
        block_id: int,
        token_ids_P: np.ndarray,
        keys_LPRK: np.ndarray,
        values_LPRK: np.ndarray,
    ) -> None:
        """Puts keys and values into a block, as if its tokens had been computed there."""
        _, write = _block_programs()
        layers_L, self._visible_NP = write(
            tuple(self._caches.values()),
            self._visible_NP,
            np.int32(block_id),
            token_ids_P != self._decoder.config.pad_token,
            # Copied: a device may still read them when whoever sent them writes there again.
            keys_LPRK.copy(),
            values_LPRK.copy(),
        )
        self._caches = dict(zip(self._caches, layers_L, strict=True))

    def visible(self, block_id: int) -> np.ndarray:
        """Which positions [P] of a block later queries may see, for inspection."""
        return np.asarray(self._visible_NP)[block_id].copy()

    def blocks_fault(self, call: StoreBlocks) -> Refusal | None:
        """Why blocks cannot lie here, if they cannot."""
        wanted, dtype = self._block_shape, self._decoder.dtype
        num_blocks = len(call.token_ids_CP)
        layers = (call.first_layer, call.keys_CLPRK.shape[1])
        if layers != (self.first_layer, self.num_layers):
            message = f"layers {layers[0]} and following, {layers[1]} of them, are not these"
            return Refusal(RefusalReason.NOT_HELD, message)
        is_sound = (
            num_blocks > 0
            and call.token_ids_CP.shape == (num_blocks, wanted[1])
            and call.keys_CLPRK.shape == call.values_CLPRK.shape == (num_blocks, *wanted)
            and call.keys_CLPRK.dtype == call.values_CLPRK.dtype == dtype
        )
        if is_sound:
            return None
        message = f"blocks {call.keys_CLPRK.shape} of {call.keys_CLPRK.dtype}, wanted {wanted}"
        return Refusal(RefusalReason.MALFORMED, message)

    @property
    def _block_shape(self) -> tuple[int, int, int, int]:
        """L, P, R, K of a block."""
        config = self._decoder.config
        size = self.cache_size.block_size
        return (self.num_layers, size, config.num_kv_heads, config.key_size)

    def begin(self, owner: Owner, call: BeginBatch) -> Turn | Refusal:
        """Takes a batch in before its layer, as far as the first stop."""
        refusal = self._fault_of(owner, call)
        if refusal is not None:
            return refusal
        step = self._pad(call.tokens)
        if call.hidden_TD is None:
            assert self._ends is not None
            hidden_TD = self._parts.embed(self._ends, step.token_ids_T)
        else:
            hidden_TD = jnp.asarray(padded_rows(call.hidden_TD, len(step.token_ids_T)))
        if call.layer < self._decoder.config.num_layers:
            self._visible_NP = self._parts.mark_visible(self._visible_NP, step)
        tokens = call.tokens
        batch = _Batch(
            step, tokens.num_rows, tokens.samples, tokens.logits_rows_W, hidden_TD, call.layer
        )
        return self._run(owner, call.batch_id, batch)

    def advance(self, owner: Owner, call: AdvanceBatch) -> Turn | Refusal:
        """Goes on with the outputs of the experts it stopped for."""
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
        if following in self._params and self._whole_layer(following) is None:
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

    def _run(self, owner: Owner, batch_id: int, batch: _Batch) -> Turn:
        """From before a layer to the next stop."""
        self._pass_local_layers(batch)
        if batch.layer in self._params:
            return self._attend_and_stop(owner, batch_id, batch)
        if batch.layer < self._decoder.config.num_layers or self._ends is None:
            return Departure(np.asarray(batch.hidden_TD)[: batch.num_rows])
        if not batch.samples:
            return Drawn(())
        hidden_WD = np.asarray(batch.hidden_TD)[batch.logits_rows_W]
        unembed = partial(self._parts.unembed, self._ends)
        ops, max_rows = self._decoder.ops, self.cache_size.max_logits_rows
        return Drawn(tuple(draw_from_hidden(unembed, hidden_WD, batch.samples, ops, max_rows)))

    def _pass_local_layers(self, batch: _Batch) -> None:
        """Runs the layers ahead whose experts are all here."""
        layers: list[int] = []
        experts: list[ExpertParams] = []
        layer = batch.layer
        while layer in self._params and (whole := self._whole_layer(layer)) is not None:
            layers.append(layer)
            experts.append(whole)
            layer += 1
        if not layers:
            return
        batch.hidden_TD, caches = self._pass(
            tuple(self._params[layer] for layer in layers),
            tuple(experts),
            batch.hidden_TD,
            batch.step,
            tuple(self._caches[layer] for layer in layers),
            self._visible_NP,
        )
        self._caches.update(zip(layers, caches, strict=True))
        batch.layer = layer

    def _attend_and_stop(self, owner: Owner, batch_id: int, batch: _Batch) -> ExpertInput:
        layer = batch.layer
        result = self._parts.attention_half(
            self._params[layer], batch.hidden_TD, batch.step, self._caches[layer], self._visible_NP
        )
        return self._stop(owner, batch_id, batch, result)

    def _combine_and_stop(
        self, owner: Owner, batch_id: int, batch: _Batch, outputs_TAD: np.ndarray
    ) -> ExpertInput:
        """As combine and attention half, in one program: a call to the device less."""
        following = batch.layer + 1
        result = self._go_on(
            self._params[batch.layer],
            self._params[following],
            batch.hidden_TD,
            outputs_TAD,
            batch.gate_weights_TA,
            batch.step,
            self._caches[following],
            self._visible_NP,
        )
        batch.layer = following
        return self._stop(owner, batch_id, batch, result)

    def _stop(
        self, owner: Owner, batch_id: int, batch: _Batch, result: AttentionResult
    ) -> ExpertInput:
        self._caches[batch.layer] = result.cache
        batch.hidden_TD, batch.gate_weights_TA = result.hidden_TD, result.gate_weights_TA
        self._batches[(owner, batch_id)] = batch
        rows_TD, ids_TA = jax.device_get((result.expert_input_TD, result.expert_ids_TA))
        return ExpertInput(batch.layer, rows_TD[: batch.num_rows], ids_TA[: batch.num_rows])

    def _fault_of(self, owner: Owner, call: BeginBatch) -> Refusal | None:
        """Why a batch is not taken in, if it is not."""
        before = self._tenancy.tenant
        refusal = self._tenancy.enter(owner)
        if self._tenancy.tenant != before:
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
            # Ids go up and few are under way at a time: the router has given this one up, and the
            # message that said so was lost with its stream.
            del self._batches[min(self._batches)]
        return self._rows_fault(call)

    def _rows_fault(self, call: BeginBatch) -> Refusal | None:
        """Holds indices against what they index: the kernels would not."""
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

    def _pad(self, tokens: TokenRows) -> StepBatch:
        """Rows and tables in few different sizes, so that few programs are compiled."""
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
            # Attention does not ask who wants a token.
            np.zeros(0, np.int32),
        )
        # Once for all layers: each of them would put the host's arrays on the device again.
        return StepBatch(*jax.device_put(arrays))


@cache
def _combine_and_attend(decoder: Decoder) -> Callable[..., AttentionResult]:
    """From the outputs of a layer's experts to the next layer's, as one program."""

    def go_on(
        before: AttentionParams,
        params: AttentionParams,
        hidden_TD: jax.Array,
        outputs_TAD: jax.Array,
        gate_weights_TA: jax.Array,
        step: StepBatch,
        cache: LayerCache,
        visible_NP: jax.Array,
    ) -> AttentionResult:
        hidden_TD = decoder.combine(before, hidden_TD, outputs_TAD, gate_weights_TA)
        return decoder.attention_half(params, hidden_TD, step, cache, visible_NP)

    return jax.jit(go_on, donate_argnums=(6,))


@cache
def _pass_through(decoder: Decoder) -> Callable[..., tuple[jax.Array, tuple[LayerCache, ...]]]:
    """Several layers with all their experts, as one program."""
    # The parts stay jitted inside: a layer is then traced once and not once for each layer.
    parts = jitted_parts(decoder)

    def run(
        attention_L: tuple[AttentionParams, ...],
        experts_L: tuple[ExpertParams, ...],
        hidden_TD: jax.Array,
        step: StepBatch,
        caches_L: tuple[LayerCache, ...],
        visible_NP: jax.Array,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        kept: list[LayerCache] = []
        for params, experts, layer_cache in zip(attention_L, experts_L, caches_L, strict=True):
            result = parts.attention_half(params, hidden_TD, step, layer_cache, visible_NP)
            outputs_TAD = parts.expert_half(experts, result.expert_input_TD, result.expert_ids_TA)
            hidden_TD = parts.combine(params, result.hidden_TD, outputs_TAD, result.gate_weights_TA)
            kept.append(result.cache)
        return hidden_TD, tuple(kept)

    return jax.jit(run, donate_argnums=(4,))


@cache
def _block_programs() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Reads a block of all layers, and writes one in place."""
    return jax.jit(read_block), jax.jit(write_block, donate_argnums=(0,))


def _blocks_per_sequence(sequence_len: int, size: CacheSize) -> int:
    return -(-sequence_len // size.block_size)


def _within(indices: np.ndarray, end: int) -> bool:
    return indices.size == 0 or (int(indices.min()) >= 0 and int(indices.max()) < end)
