"""Runs steps of a whole model in one process. It takes lists of tokens and returns logits.

This module alone turns sequences of different lengths into padded arrays. A step is compiled once
for each bucket of sizes. `StepMode.FUSED` compiles the whole model as one program. `HALVES` calls
each layer's attention half and expert half, as a cluster of workers does.

A row of logits is as long as the vocabulary, so at most `CacheSize.max_logits_rows` rows are held
at once. A step needs more only if it scores a prompt; they are then computed in several parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, partial
from typing import NamedTuple, cast

import jax
import numpy as np

from milliways.model.config import ModelConfig
from milliways.model.decoder import (
    Decoder,
    DecoderParts,
    run_held_layers,
    run_held_step,
    run_layers,
    run_step,
)
from milliways.model.kv_cache import KVCache, StepBatch, make_kv_cache
from milliways.model.ops import Ops
from milliways.model.ops.interface import HeldLayers
from milliways.model.params import EndParams, ModelParams
from milliways.model.sampling import SampledTokens, pack_rows, sample
from milliways.model.sampling_params import SampledToken, SampleRow

# 16 MiB of Grok-1's logits. The next power of two would need twice as much, and save little time.
MAX_LOGITS_ROWS = 32


class StepMode(Enum):
    """One program for the whole model, or one call for each half of a layer."""

    FUSED = "fused"
    HALVES = "halves"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTokens:
    """The tokens of one sequence to compute in a step, and the blocks of its keys and values.

    Logits of the last `num_logits` tokens are wanted. That is 0 for a prefill chunk that is not the
    last one, unless the prompt is scored.
    """

    token_ids: Sequence[int]
    start_position: int
    block_table: Sequence[int]
    num_logits: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """How much KV memory a runner owns, and how many sequences a step may hold."""

    num_blocks: int
    block_size: int = 16
    max_slots: int = 32

    @property
    def max_logits_rows(self) -> int:
        """The most rows of logits to hold at once: at least one for each sequence of a step."""
        return max(MAX_LOGITS_ROWS, self.max_slots)


Step = Callable[[ModelParams, StepBatch, KVCache], tuple[jax.Array, KVCache]]
Unembed = Callable[[EndParams, np.ndarray, np.ndarray], jax.Array]


class DividedStep(NamedTuple):
    """A step in two parts: the layers, up to the residual stream [T, D], and the logits of rows."""

    layers: Step
    unembed: Unembed


class ModelRunner:
    """Owns the parameters, the KV arrays and the compiled step of one process.

    Invariant: `_cache` is the result of the last step. A step donates it, so earlier references to
    it are invalid.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: ModelParams,
        cache: KVCache,
        step: Step,
        cache_size: CacheSize,
        ops: Ops,
        divided: DividedStep,
        owner: object = None,
    ) -> None:
        self.config = config
        self._ops = ops
        # Kept alive as long as the parameters, which may be views of what it holds.
        self._owner = owner
        self.cache_size = cache_size
        self._params = params
        self._cache = cache
        self._step = step
        self._divided = divided

    @property
    def blocks_per_sequence(self) -> int:
        """Block-table entries of a sequence as long as the context."""
        return -(-self.config.sequence_len // self.cache_size.block_size)

    def compute_logits(self, scheduled: Sequence[ScheduledTokens]) -> np.ndarray:
        """Computes all scheduled tokens; returns float32 logits [sum of num_logits, V] in order."""
        num_logits = sum(entry.num_logits for entry in scheduled)
        return np.asarray(self._compute(scheduled))[:num_logits]

    def compute_and_sample(
        self, scheduled: Sequence[ScheduledTokens], rows: Sequence[SampleRow]
    ) -> list[SampledToken]:
        """Computes all scheduled tokens, and draws one token for each wanted row of logits."""
        assert len(rows) == sum(entry.num_logits for entry in scheduled)
        max_rows, max_tokens = self.cache_size.max_logits_rows, self.config.sequence_len
        if len(rows) <= max_rows:
            return draw_tokens(self._compute(scheduled), rows, self._ops, max_tokens)
        batch = self._batch(scheduled)
        rows_W = np.asarray(batch.logits_rows_W)[: len(rows)]
        # The layers do not need the wanted rows. Without them, fewer programs are compiled.
        batch = replace(batch, logits_rows_W=cast(jax.Array, np.zeros(0, np.int32)))
        hidden_TD, self._cache = self._divided.layers(self._params, batch, self._cache)
        hidden_WD = np.asarray(hidden_TD)[rows_W]
        unembed = partial(self._divided.unembed, self._params.ends)
        return draw_from_hidden(unembed, hidden_WD, rows, self._ops, max_rows, max_tokens)

    def _compute(self, scheduled: Sequence[ScheduledTokens]) -> jax.Array:
        assert 0 < len(scheduled) <= self.cache_size.max_slots
        batch = self._batch(scheduled)
        logits_WV, self._cache = self._step(self._params, batch, self._cache)
        return logits_WV

    def read_cache(self) -> KVCache:
        """The current KV arrays, for inspection. The next step makes them invalid."""
        return self._cache

    def _batch(self, scheduled: Sequence[ScheduledTokens]) -> StepBatch:
        num_tokens = sum(len(entry.token_ids) for entry in scheduled)
        num_logits = sum(entry.num_logits for entry in scheduled)
        token_ids_T = np.zeros(bucket(num_tokens, self._ops.min_rows), np.int32)
        positions_T = np.full(len(token_ids_T), -1, np.int32)
        slots_T = np.zeros(len(token_ids_T), np.int32)
        tables_BM = np.zeros((self.cache_size.max_slots, self.blocks_per_sequence), np.int32)
        # Most prefill chunks need no logits; then none are computed.
        num_rows = bucket(num_logits, self._ops.min_rows) if num_logits else 0
        logits_rows_W = np.zeros(num_rows, np.int32)
        first = first_row = 0
        for slot, entry in enumerate(scheduled):
            end = first + len(entry.token_ids)
            end_row = first_row + entry.num_logits
            token_ids_T[first:end] = entry.token_ids
            positions_T[first:end] = range(entry.start_position, entry.start_position + end - first)
            slots_T[first:end] = slot
            tables_BM[slot, : len(entry.block_table)] = entry.block_table
            logits_rows_W[first_row:end_row] = range(end - entry.num_logits, end)
            first, first_row = end, end_row
        # Host arrays: a jitted call copies them to the device faster than we could.
        arrays = (token_ids_T, positions_T, slots_T, tables_BM, logits_rows_W)
        return StepBatch(*(cast(jax.Array, array) for array in arrays))


def draw_tokens(
    logits_WV: jax.Array, rows: Sequence[SampleRow], ops: Ops, max_tokens: int
) -> list[SampledToken]:
    """Draws one token for each row; the logits after the last row are padding.

    A sequence may have `max_tokens` tokens.
    """
    if not rows:
        return []
    padded = [*rows, *[None] * (logits_WV.shape[0] - len(rows))]
    inputs = pack_rows(padded, logits_WV.shape[1], max_tokens)
    # One by one: `jax.device_get` takes a fifth of a millisecond for five small arrays.
    sampled = SampledTokens(*map(np.asarray, sample(logits_WV, inputs, kernels=ops)))
    return [_sampled_token(sampled, i, row) for i, row in enumerate(rows)]


def draw_from_hidden(
    unembed: Callable[[np.ndarray, np.ndarray], jax.Array],
    hidden_WD: np.ndarray,
    rows: Sequence[SampleRow],
    ops: Ops,
    max_rows: int,
    max_tokens: int,
) -> list[SampledToken]:
    """Draws one token for each row of the residual stream, in parts of at most `max_rows` rows.

    The rows were selected on the host. So a compiled program depends on the number of rows alone,
    and not also on the size of the step. When sequences are computed again after a death, there are
    many combinations of the two, and each new one would have to be compiled.
    """
    drawn: list[SampledToken] = []
    for first in range(0, len(rows), max_rows):
        some = rows[first : first + max_rows]
        num_padded = bucket(len(some), ops.min_rows)
        piece_WD = padded_rows(hidden_WD[first : first + max_rows], num_padded)
        logits_WV = unembed(piece_WD, np.arange(num_padded, dtype=np.int32))
        drawn += draw_tokens(logits_WV, some, ops, max_tokens)
    return drawn


def _sampled_token(sampled: SampledTokens, i: int, row: SampleRow) -> SampledToken:
    num_logprobs = row.params.num_logprobs
    top_ids = sampled.top_ids_BK[i][:num_logprobs].tolist()
    top_logprobs = sampled.top_logprobs_BK[i][:num_logprobs].tolist()
    return SampledToken(
        token_id=int(sampled.token_B[i]),
        logprob=float(sampled.logprob_B[i]),
        top_logprobs=tuple(zip(top_ids, top_logprobs, strict=True)),
        is_valid=bool(sampled.is_valid_B[i]),
    )


def bucket(num_rows: int, min_rows: int) -> int:
    """The padded number of rows: a power of two, so that few programs are compiled."""
    return max(min_rows, 1 << (num_rows - 1).bit_length())


def padded_rows(array: np.ndarray, num_rows: int, value: int = 0) -> np.ndarray:
    """The array, padded with rows of `value` to `num_rows` rows."""
    if len(array) == num_rows:
        return array
    padded = np.full((num_rows, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded


def make_runner(
    decoder: Decoder,
    params: ModelParams,
    cache_size: CacheSize,
    mode: StepMode = StepMode.FUSED,
    owner: object = None,
) -> ModelRunner:
    """A runner on the default device; it keeps `owner` alive."""
    cache = _empty_cache(decoder, cache_size)
    parts = jitted_parts(decoder)
    halves, sizes = decoder.ops.halves, decoder.half_sizes
    is_fused = mode is StepMode.FUSED
    held = (
        halves.hold_layers(params.attention_L, params.experts_L, sizes)
        if is_fused and halves
        else None
    )
    if held:
        step = _held(held, jax.jit(partial(run_held_step, decoder), donate_argnums=(3,)))
        layers = _held(held, jax.jit(partial(run_held_layers, decoder), donate_argnums=(3,)))
    elif is_fused:
        # The parts stay jitted inside, so that one trace serves all layers.
        step = jax.jit(partial(run_step, parts), donate_argnums=(2,))
        layers = jax.jit(partial(run_layers, parts), donate_argnums=(2,))
    else:
        step = partial(_by_halves, run_step, parts)
        layers = partial(_by_halves, run_layers, parts)
    divided = DividedStep(layers, parts.unembed)
    return ModelRunner(decoder.config, params, cache, step, cache_size, decoder.ops, divided, owner)


def _held(held: HeldLayers, program: Callable[..., tuple[jax.Array, KVCache]]) -> Step:
    """A step by a program that finds the layers under their number; it keeps them."""

    def step(params: ModelParams, batch: StepBatch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return program(params.ends, held.number_1, batch, cache)

    return step


def _empty_cache(decoder: Decoder, cache_size: CacheSize) -> KVCache:
    return make_kv_cache(
        decoder.config,
        decoder.config.num_layers,
        cache_size.num_blocks,
        cache_size.block_size,
        decoder.dtype,
    )


@cache
def jitted_parts(decoder: Decoder) -> DecoderParts:
    """Each part as its own jitted function. All callers with equal decoders share them."""
    parts = decoder.parts()
    return DecoderParts(
        mark_visible=jax.jit(parts.mark_visible),
        embed=jax.jit(parts.embed),
        # The layer's cache, the fourth argument, is updated in place.
        attention_half=jax.jit(parts.attention_half, donate_argnums=(3,)),
        expert_half=jax.jit(parts.expert_half),
        combine=jax.jit(parts.combine),
        unembed=jax.jit(parts.unembed),
    )


def _by_halves(
    run: Callable[[DecoderParts, ModelParams, StepBatch, KVCache], tuple[jax.Array, KVCache]],
    parts: DecoderParts,
    params: ModelParams,
    batch: StepBatch,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    # Done once: otherwise each layer would copy the host arrays to the device again.
    return run(parts, params, jax.device_put(batch), cache)
