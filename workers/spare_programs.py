"""Compiles the programs that a worker needs only after its share of the model has changed.

A worker may take experts over from one that died, and give some back later. Then layers stop where
they did not before, stacks of experts have other sizes, and calls of more routers are merged. None
of that is there before it happens, so nothing can be run. Programs are compiled for the shapes
alone; JAX finds them when the arrays come.
"""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from milliways.model.decoder import Decoder
from milliways.model.kv_cache import StepBatch
from milliways.model.params import ExpertParams
from milliways.model.runner import bucket, jitted_parts
from milliways.workers.attention import AttentionShard
from milliways.workers.devices import Device
from milliways.workers.experts import ExpertShard, few_sizes
from milliways.workers.programs import combine_and_attend, pass_through


def compile_experts(
    decoder: Decoder, experts: ExpertShard, devices: Sequence[Device], sizes: Iterable[int]
) -> None:
    """For calls of these numbers of rows: experts in groups of each size that a load may make."""
    run = jitted_parts(decoder).expert_half
    config, held = decoder.config, experts.stacks()
    group_sizes = {stack.num_experts for stack in held}.union(few_sizes(config.num_experts))
    for num_rows, device in product(_padded(decoder, sizes), devices if held else ()):
        on = device if experts.is_spread else None
        rows_TD = _array((num_rows, config.emb_size), decoder.dtype, on)
        ids_TA = _array((num_rows, config.num_selected_experts), np.int32, on)
        for group_size in group_sizes:
            _compile(run, _stack_of(held[0], group_size, device), rows_TD, ids_TA)


def compile_layers(
    decoder: Decoder, attention: AttentionShard, experts: ExpertShard, sizes: Iterable[int]
) -> None:
    """For steps of these sizes: a layer that stops for its experts, and one that does not."""
    held = experts.stacks()
    for device, num_rows in product(attention.kv.visible_NP, _padded(decoder, sizes)):
        whole = _stack_of(held[0], decoder.config.num_experts, device) if held else None
        _compile_layer(decoder, attention, device, num_rows, whole)


def _compile_layer(
    decoder: Decoder,
    attention: AttentionShard,
    device: Device,
    num_rows: int,
    whole: ExpertParams | None,
) -> None:
    config, layer = decoder.config, attention.layers_on(device)[0]
    parts = jitted_parts(decoder)
    params = _shapes(attention.params_of(layer), device)
    cache = _shapes(attention.kv.layers[layer], device)
    visible_NP = _shapes(attention.kv.visible_NP[device], device)
    hidden_TD = _array((num_rows, config.emb_size), jnp.float32, device)
    weights_TA = _array((num_rows, config.num_selected_experts), jnp.float32, device)
    shape = (num_rows, config.num_selected_experts, config.emb_size)
    # The outputs come from the host.
    outputs_TAD = _array(shape, decoder.dtype, None)
    step = _step(attention.tables_shape, num_rows, device)
    attended = (step, cache, visible_NP)
    _compile(parts.attention_half, params, hidden_TD, *attended)
    _compile(parts.combine, params, hidden_TD, outputs_TAD, weights_TA)
    go_on = combine_and_attend(decoder)
    _compile(go_on, params, params, hidden_TD, outputs_TAD, weights_TA, *attended)
    if whole is not None:
        run_one = pass_through(decoder)
        _compile(run_one, (params,), (whole,), hidden_TD, step, (cache,), visible_NP)


def _compile(program: Any, *shapes: Any) -> None:
    program.lower(*shapes).compile()


def _step(tables_shape: tuple[int, int], num_rows: int, device: Device) -> StepBatch:
    def of(shape: tuple[int, ...]) -> Any:
        return _array(shape, np.int32, device)

    return StepBatch(of((num_rows,)), of((num_rows,)), of((num_rows,)), of(tables_shape), of((0,)))


def _padded(decoder: Decoder, sizes: Iterable[int]) -> list[int]:
    return sorted({bucket(size, decoder.ops.min_rows) for size in sizes})


def _stack_of(params: ExpertParams, num_experts: int, device: Device) -> ExpertParams:
    """The shapes of a stack of so many experts, given another stack of the same model."""

    def resized(array: Any) -> Any:
        return _array((num_experts, *array.shape[1:]), array.dtype, device)

    return jax.tree.map(resized, params)


def _shapes(arrays: Any, device: Device) -> Any:
    return jax.tree.map(lambda array: _array(array.shape, array.dtype, device), arrays)


def _array(shape: tuple[int, ...], dtype: Any, device: Device | None) -> Any:
    """The shape of an array that is bound to a device, or comes from the host."""
    sharding = None if device is None else SingleDeviceSharding(device)  # pyright: ignore[reportArgumentType]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
