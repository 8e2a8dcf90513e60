"""Runs steps of a whole model in one process: host lists in, logits out, compiled once per bucket.

The only place that turns a ragged set of sequences into padded arrays. Two ways through the same
layers: `fused` compiles the whole model as one program, `halves` calls each layer's attention half
and expert half as a cluster of workers would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from typing import cast

import jax
import numpy as np

from model.config import ModelConfig
from model.decoder import Decoder, DecoderParts, run_step
from model.kv_cache import KVCache, StepBatch, make_kv_cache
from model.ops import Ops
from model.params import ModelParams
from model.sampling import SampledTokens, bucket_num_logprobs, pack_rows, sample
from model.sampling_params import SampledToken, SampleRow
from model.sharding import ShardingRules, shard_model


class StepMode(Enum):
    """One program for the whole model, or one call per layer half."""

    FUSED = "fused"
    HALVES = "halves"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTokens:
    """The tokens of one sequence to compute in a step, and where its keys and values lie.

    Logits are wanted of the last `num_logits` tokens: 0 for a prefill chunk that is not the last.
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


Step = Callable[[ModelParams, StepBatch, KVCache], tuple[jax.Array, KVCache]]


class ModelRunner:
    """Owns the parameters, the KV arrays and the compiled step of one process."""

    def __init__(
        self,
        config: ModelConfig,
        params: ModelParams,
        cache: KVCache,
        step: Step,
        cache_size: CacheSize,
        ops: Ops,
        owner: object = None,
    ) -> None:
        self.config = config
        self._ops = ops
        # Whatever must live as long as the parameters do.
        self._owner = owner
        self.cache_size = cache_size
        self._params = params
        self._cache = cache
        self._step = step

    @property
    def blocks_per_sequence(self) -> int:
        """Block-table entries of a sequence as long as the context."""
        return -(-self.config.sequence_len // self.cache_size.block_size)

    def compute_logits(self, scheduled: Sequence[ScheduledTokens]) -> np.ndarray:
        """Computes all scheduled tokens; logits [sum of num_logits, V] float32, in order."""
        num_logits = sum(entry.num_logits for entry in scheduled)
        return np.asarray(self._compute(scheduled))[:num_logits]

    def compute_and_sample(
        self, scheduled: Sequence[ScheduledTokens], rows: Sequence[SampleRow]
    ) -> list[SampledToken]:
        """Computes all scheduled tokens and draws one token for each wanted logits row."""
        logits_WV = self._compute(scheduled)
        assert len(rows) == sum(entry.num_logits for entry in scheduled)
        return draw_tokens(logits_WV, rows, self._ops)

    def _compute(self, scheduled: Sequence[ScheduledTokens]) -> jax.Array:
        assert 0 < len(scheduled) <= self.cache_size.max_slots
        batch = self._batch(scheduled)
        logits_WV, self._cache = self._step(self._params, batch, self._cache)
        return logits_WV

    def read_cache(self) -> KVCache:
        """The KV arrays as they stand, for inspection; the next step invalidates them."""
        return self._cache

    def _batch(self, scheduled: Sequence[ScheduledTokens]) -> StepBatch:
        num_tokens = sum(len(entry.token_ids) for entry in scheduled)
        num_logits = sum(entry.num_logits for entry in scheduled)
        token_ids_T = np.zeros(bucket(num_tokens, self._ops.min_rows), np.int32)
        positions_T = np.full(len(token_ids_T), -1, np.int32)
        slots_T = np.zeros(len(token_ids_T), np.int32)
        tables_BM = np.zeros((self.cache_size.max_slots, self.blocks_per_sequence), np.int32)
        # A prefill chunk that is not the last wants no logits, and then none are computed.
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
        # Host arrays: a jitted call takes them in faster than they could be put on the device.
        arrays = (token_ids_T, positions_T, slots_T, tables_BM, logits_rows_W)
        return StepBatch(*(cast(jax.Array, array) for array in arrays))


def draw_tokens(logits_WV: jax.Array, rows: Sequence[SampleRow], ops: Ops) -> list[SampledToken]:
    """Draws one token for each row; logits beyond the rows are padding."""
    if not rows:
        return []
    padded = [*rows, *[None] * (logits_WV.shape[0] - len(rows))]
    inputs = pack_rows(padded, logits_WV.shape[1])
    num_logprobs = bucket_num_logprobs([row.params for row in rows])
    sampled = jax.device_get(sample(logits_WV, inputs, num_logprobs=num_logprobs, kernels=ops))
    return [_sampled_token(sampled, i, row) for i, row in enumerate(rows)]


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
    """The padded size for `num_rows`: a power of two, so that few programs are compiled."""
    return max(min_rows, 1 << (num_rows - 1).bit_length())


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
    if mode is StepMode.FUSED:
        # The parts stay jitted inside: a layer is then traced once and not once for each layer.
        step = jax.jit(partial(run_step, parts), donate_argnums=(2,))
    else:
        step = partial(_step_by_halves, parts)
    return ModelRunner(decoder.config, params, cache, step, cache_size, decoder.ops, owner)


def make_mesh_runner(
    decoder: Decoder,
    host_params: ModelParams,
    cache_size: CacheSize,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
) -> ModelRunner:
    """A runner over a local mesh; each device receives only its part of `host_params`."""
    params, cache, step = shard_model(
        decoder, host_params, _empty_cache(decoder, cache_size), mesh, rules
    )
    return ModelRunner(decoder.config, params, cache, step, cache_size, decoder.ops)


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
    """Each part compiled for itself, once for all who compute with equal decoders."""
    parts = decoder.parts()
    return DecoderParts(
        mark_visible=jax.jit(parts.mark_visible),
        embed=jax.jit(parts.embed),
        # The layer's cache, fourth of the arguments, is updated in place.
        attention_half=jax.jit(parts.attention_half, donate_argnums=(3,)),
        expert_half=jax.jit(parts.expert_half),
        combine=jax.jit(parts.combine),
        unembed=jax.jit(parts.unembed),
    )


def _step_by_halves(
    parts: DecoderParts, params: ModelParams, batch: StepBatch, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    # Once for all layers: each of them would put the host's arrays on the device again.
    return run_step(parts, params, jax.device_put(batch), cache)
