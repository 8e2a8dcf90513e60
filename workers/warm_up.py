"""Compiles the programs that a worker will run, for each size of a step, before it is READY.

Meaningless batches go through the shards. The keys and values that they write are overwritten
before any sequence reads them. `spare_programs` compiles what no batch can reach yet. A worker that
is READY compiles nothing: while it does, every stream of its router stands still.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from milliways.model.config import ModelConfig
from milliways.model.decoder import Decoder
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SampleRow, SamplingParams
from milliways.wire.calls import AdvanceBatch, BeginBatch, ExpertInput, RunExperts, TokenRows
from milliways.workers.attention import AttentionShard
from milliways.workers.devices import Device
from milliways.workers.experts import ExpertShard
from milliways.workers.kv_arrays import KvArrays
from milliways.workers.spare_programs import compile_experts, compile_layers

_OWNER = ("warm-up", 0)


def warm_up(
    decoder: Decoder,
    attention: AttentionShard | None,
    experts: ExpertShard,
    devices: Sequence[Device],
    max_step_tokens: int,
    max_merged_rows: int = 0,
    copies_blocks: bool = False,
) -> None:
    """Runs a step of every size, before the worker gets any calls.

    Calls of several routers may be merged, up to `max_merged_rows`.
    """
    config, dtype = decoder.config, decoder.dtype
    for num_tokens in _sizes(max_step_tokens):
        _run_experts(config, experts, dtype, num_tokens)
        if attention is not None:
            _run_attention(config, attention.cache_size, attention, dtype, num_tokens)
    merged = _sizes(max(max_step_tokens, max_merged_rows))
    compile_experts(decoder, experts, devices, merged)
    if attention is not None:
        if not attention.has_exchange:
            compile_layers(decoder, attention, experts, _sizes(max_step_tokens))
        attention.keep_to_programs()
        if copies_blocks:
            _copy_block(attention.kv)
        attention.release(_OWNER[0])


def _copy_block(kv: KvArrays) -> None:
    keys_CLPRK, values_CLPRK = kv.read_blocks((0,))
    token_ids_P = np.zeros(kv.cache_size.block_size, np.int32)
    kv.write_block(0, token_ids_P, keys_CLPRK[0], values_CLPRK[0])


def _sizes(largest: int) -> Iterator[int]:
    size = 1
    while size < largest:
        yield size
        size *= 2
    yield largest


def _run_experts(
    config: ModelConfig, experts: ExpertShard, dtype: np.dtype, num_tokens: int
) -> None:
    """Runs one expert for each device and group size."""
    rows_TD = np.zeros((num_tokens, config.emb_size), dtype)
    for layer, expert in experts.examples():
        ids_TA = np.full((num_tokens, config.num_selected_experts), -1, np.int32)
        ids_TA[:, 0] = expert
        experts.run(RunExperts(layer, rows_TD, ids_TA))


def _run_attention(
    config: ModelConfig,
    cache_size: CacheSize,
    attention: AttentionShard,
    dtype: np.dtype,
    num_tokens: int,
) -> None:
    tokens = _tokens(config, cache_size, num_tokens)
    hidden_TD = np.zeros((num_tokens, config.emb_size), np.float32)
    shape = (num_tokens, config.num_selected_experts, config.emb_size)
    outputs_TAD = np.zeros(shape, dtype)
    starts = [attention.first_layer] if attention.num_layers else []
    # A shard with the output head also draws the tokens of batches that return to it.
    starts += [config.num_layers] if attention.has_ends else []
    for batch_id, layer in enumerate(starts):
        is_first = layer == 0 and attention.has_ends
        call = BeginBatch(batch_id, layer, tokens, None if is_first else hidden_TD)
        turn = attention.begin(_OWNER, call)
        while isinstance(turn, ExpertInput):
            turn = attention.advance(_OWNER, AdvanceBatch(batch_id, turn.layer, outputs_TAD))


def _tokens(config: ModelConfig, cache_size: CacheSize, num_tokens: int) -> TokenRows:
    """`num_tokens` rows of as few sequences as possible, and as many rows of logits as allowed."""
    capacity = min(config.sequence_len, cache_size.num_blocks * cache_size.block_size)
    positions_T = np.arange(num_tokens, dtype=np.int32) % capacity
    slots_T = np.arange(num_tokens, dtype=np.int32) // capacity
    blocks = np.arange(-(-capacity // cache_size.block_size), dtype=np.int32)
    num_samples = min(num_tokens, cache_size.max_logits_rows)
    row = SampleRow(params=SamplingParams(), token_ids=(1,), num_prompt_tokens=1)
    return TokenRows(
        token_ids_T=np.full(num_tokens, config.pad_token, np.int32),
        positions_T=positions_T,
        slots_T=slots_T,
        block_tables_BM=np.tile(blocks, (int(slots_T.max()) + 1, 1)),
        logits_rows_W=np.arange(num_samples, dtype=np.int32),
        samples=(row,) * num_samples,
    )
