"""Runs several layers one after another with the kernels of one mode, and times them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from milliways.benchmarks.gpu_floors import Floors, median_times
from milliways.benchmarks.gpu_workload import (
    Layer,
    Work,
    Workload,
    attention_work,
    expert_work,
    make_batch,
    make_cache,
)
from milliways.model.config import ModelConfig
from milliways.model.decoder import Decoder
from milliways.model.kv_cache import LayerCache
from milliways.model.ops.gpu import GpuOps


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. The times are those of one layer."""

    shape: str
    mode: str
    layer_ms: float
    floor_ms: float
    bound_by: str
    attention_ms: float
    attention_floor_ms: float
    experts_ms: float
    experts_floor_ms: float
    num_experts_read: float

    @property
    def ratio(self) -> float:
        return self.layer_ms / self.floor_ms


class LayerChain:
    """Layers one after another, with the kernels of one mode: whole, or only one of the halves."""

    def __init__(
        self, ops: GpuOps, config: ModelConfig, layers: list[Layer], workload: Workload
    ) -> None:
        self._decoder = Decoder(config=config, dtype=jnp.dtype(jnp.bfloat16), ops=ops)
        self._params = [(layer.attention, layer.experts) for layer in layers]
        self._batch = make_batch(workload)
        self._cache = make_cache(config, workload)
        self._visible_NP = jnp.ones(self._cache.keys_NPRK.shape[:2], jnp.bool)
        self._hidden_TD = jax.random.normal(
            jax.random.key(3), (workload.num_tokens, config.emb_size)
        )
        self._layers = jax.jit(partial(self._run, with_experts=True), donate_argnums=2)
        self._attention = jax.jit(partial(self._run, with_experts=False), donate_argnums=2)
        self._experts = jax.jit(self._run_experts)
        # The choices of the gates in a run of the whole layers.
        _, self._choices = self._call(self._layers)

    def run_layers(self) -> jax.Array:
        return self._call(self._layers)[0]

    def run_attention(self) -> jax.Array:
        # The results of the gates are returned too, so that the compiler does not remove the gates.
        return self._call(self._attention)

    def run_experts(self) -> jax.Array:
        return self._experts(self._params, self._hidden_TD, self._choices)

    def num_experts_read(self) -> float:
        """The average number of a layer's experts that at least one token chose."""
        counts = [len(np.unique(np.asarray(ids_TA))) for ids_TA, _ in self._choices]
        return sum(counts) / len(counts)

    def _call(self, program: Callable[..., Any]) -> Any:
        hidden_TD, choices, self._cache = program(self._params, self._hidden_TD, self._cache)
        return hidden_TD, choices

    def _run(
        self, params: Any, hidden_TD: jax.Array, cache: LayerCache, *, with_experts: bool
    ) -> Any:
        # Jitted on its own, so that one trace serves all layers.
        attention_half = jax.jit(self._decoder.attention_half)
        expert_half = jax.jit(self._expert_half)
        choices = []
        for attention, experts in params:
            result = attention_half(attention, hidden_TD, self._batch, cache, self._visible_NP)
            hidden_TD, cache = result.hidden_TD, result.cache
            choice = (result.expert_ids_TA, result.gate_weights_TA)
            choices.append(choice)
            if with_experts:
                inputs = (hidden_TD, result.expert_input_TD)
                hidden_TD = expert_half(attention, experts, inputs, choice)
        return hidden_TD, choices, cache

    def _run_experts(self, params: Any, hidden_TD: jax.Array, choices: Any) -> jax.Array:
        expert_half = jax.jit(self._expert_half)
        for (attention, experts), choice in zip(params, choices, strict=True):
            inputs = (hidden_TD, hidden_TD.astype(jnp.bfloat16))
            hidden_TD = expert_half(attention, experts, inputs, choice)
        return hidden_TD

    def _expert_half(self, attention: Any, experts: Any, inputs: Any, choice: Any) -> jax.Array:
        (hidden_TD, expert_input_TD), (expert_ids_TA, gate_weights_TA) = inputs, choice
        outputs_TAD = self._decoder.expert_half(experts, expert_input_TD, expert_ids_TA)
        return self._decoder.combine(attention, hidden_TD, outputs_TAD, gate_weights_TA)


def measure(
    modes: Mapping[str, GpuOps],
    config: ModelConfig,
    layers: list[Layer],
    workload: Workload,
    num_repeats: int,
    floors: Floors,
) -> list[Row]:
    """A row for each mode. The modes are timed in turn."""
    chains = {mode: LayerChain(ops, config, layers, workload) for mode, ops in modes.items()}
    seconds = median_times(_functions(chains), num_repeats)
    ms_per_layer = {name: 1e3 * value / len(layers) for name, value in seconds.items()}
    rows = []
    for mode, chain in chains.items():
        num_read = chain.num_experts_read()
        attention = attention_work(config, layers[0], workload)
        experts = expert_work(config, layers[0], workload, num_read)
        attention_floor_ms, experts_floor_ms = (
            1e3 * floors.least_s(work.num_bytes, work.num_flops) for work in (attention, experts)
        )
        rows.append(
            Row(
                shape=workload.name,
                mode=mode,
                layer_ms=ms_per_layer[f"{mode} layers"],
                floor_ms=attention_floor_ms + experts_floor_ms,
                bound_by=_bound_by(experts, floors),
                attention_ms=ms_per_layer[f"{mode} attention"],
                attention_floor_ms=attention_floor_ms,
                experts_ms=ms_per_layer[f"{mode} experts"],
                experts_floor_ms=experts_floor_ms,
                num_experts_read=num_read,
            )
        )
    return rows


def _functions(chains: Mapping[str, LayerChain]) -> dict[str, Callable[[], Any]]:
    functions: dict[str, Callable[[], Any]] = {}
    for mode, chain in chains.items():
        functions |= {
            f"{mode} layers": chain.run_layers,
            f"{mode} attention": chain.run_attention,
            f"{mode} experts": chain.run_experts,
        }
    return functions


def _bound_by(work: Work, floors: Floors) -> str:
    bytes_s, flops_s = work.num_bytes / floors.bytes_per_s, work.num_flops / floors.flops_per_s
    return "HBM" if bytes_s >= flops_s else "FLOP"
