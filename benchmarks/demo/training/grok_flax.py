"""Grok-1's forward pass in Flax, in float32, for training only.

Every parameter has the names of its logical axes (vocab, embed, q_heads, kv_heads, experts, ffn) as
sharding metadata. The modules have the names of the released checkpoint. The arithmetic is that of
the reference: norms before and after each half, rotary embedding of two halves, attention logits
capped by tanh, gate weights from a softmax over all experts without renormalising, tied embedding.

Only in training may an expert drop a token: each expert has a capacity, so that a step consists of
a few matrices of fixed size. A balance loss keeps dropped tokens rare. Serving never drops one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from milliways.model.config import ModelConfig

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-5
ATTENTION_LOGIT_CAP = 30.0
MASKED_LOGIT = -1e30
# A small initial scale keeps the residual stream close to the embedding until the layers learn.
POST_NORM_INIT = 0.5


class GateLoad(NamedTuple):
    """The choices of a layer's gate: share and mean probability of each expert, dropped share."""

    chosen_share_E: Float[Array, " E"]
    mean_probability_E: Float[Array, " E"]
    dropped_share: Float[Array, ""]


def _matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A normal matrix with variance 1 / fan-in. The fan-in is the second-last axis."""
    weight = jax.random.normal(rngs.params(), shape) / math.sqrt(shape[-2])
    return nnx.Param(weight, out_sharding=axes, eager_sharding=False)


class RMSNorm(nnx.Module):
    """RMS norm that multiplies with the scale (not with 1 + scale)."""

    def __init__(self, size: int, init: float = 1.0) -> None:
        scale = jnp.full((size,), init)
        self.scale = nnx.Param(scale, out_sharding=("embed",), eager_sharding=False)

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        mean_square = jnp.mean(jnp.square(hidden), axis=-1, keepdims=True)
        scale = jnp.broadcast_to(self.scale[...], hidden.shape)
        return hidden * jax.lax.rsqrt(mean_square + NORM_EPSILON) * scale


class Attention(nnx.Module):
    """Causal attention over one window; groups of query heads share a key/value head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        embed, q_size, kv_size = config.emb_size, config.q_size, config.kv_size
        self.query = _matrix(rngs, (embed, q_size), ("embed", "q_heads"))
        self.key = _matrix(rngs, (embed, kv_size), ("embed", "kv_heads"))
        self.value = _matrix(rngs, (embed, kv_size), ("embed", "kv_heads"))
        self.linear = _matrix(rngs, (q_size, embed), ("q_heads", "embed"))

    def __call__(
        self, hidden_BSD: Float[Array, "B S D"], visible_BSS: Bool[Array, "B S S"]
    ) -> Float[Array, "B S D"]:
        config = self.config
        batch, length, _ = hidden_BSD.shape
        num_kv_heads = config.num_kv_heads
        heads = (batch, length, -1, config.key_size)
        queries_BHSK = rotate((hidden_BSD @ self.query[...]).reshape(heads)).swapaxes(1, 2)
        keys_BRSK = rotate((hidden_BSD @ self.key[...]).reshape(heads)).swapaxes(1, 2)
        values_BRSK = (hidden_BSD @ self.value[...]).reshape(heads).swapaxes(1, 2)
        # The query heads of a group are contiguous, so one matrix product computes a whole group.
        grouped = (batch, num_kv_heads, -1, config.key_size)
        logits = queries_BHSK.reshape(grouped) @ keys_BRSK.swapaxes(2, 3)
        logits_BHSS = logits.reshape(batch, config.num_q_heads, length, length)
        logits_BHSS = logits_BHSS * config.attn_output_multiplier
        logits_BHSS = ATTENTION_LOGIT_CAP * jnp.tanh(logits_BHSS / ATTENTION_LOGIT_CAP)
        logits_BHSS = jnp.where(visible_BSS[:, None], logits_BHSS, MASKED_LOGIT)
        weights_BHSS = jax.nn.softmax(logits_BHSS, axis=-1)
        mixed = weights_BHSS.reshape(batch, num_kv_heads, -1, length) @ values_BRSK
        mixed_BHSK = mixed.reshape(batch, config.num_q_heads, length, config.key_size)
        mixed = mixed_BHSK.swapaxes(1, 2).reshape(batch, length, config.q_size)
        return mixed @ self.linear[...]


def rotate(heads_BSHK: Float[Array, "B S H K"]) -> Float[Array, "B S H K"]:
    """Rotary embedding of two halves. The positions of a window are counted from 0."""
    length, width = heads_BSHK.shape[1], heads_BSHK.shape[3]
    frequencies = ROPE_BASE ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    phases = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]
    phases_SK = jnp.concatenate([phases, phases], axis=-1)[None, :, None]
    first, second = jnp.split(heads_BSHK, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return heads_BSHK * jnp.cos(phases_SK) + turned * jnp.sin(phases_SK)


class MixtureOfExperts(nnx.Module):
    """The experts of a layer. Each takes at most `capacity` assignments of a step."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        num_experts, embed, ffn = config.num_experts, config.emb_size, config.ffn_size
        self.router = _matrix(rngs, (embed, num_experts), ("embed", "experts"))
        self.linear = _matrix(rngs, (num_experts, embed, ffn), ("experts", "embed", "ffn"))
        self.linear_v = _matrix(rngs, (num_experts, embed, ffn), ("experts", "embed", "ffn"))
        self.linear_1 = _matrix(rngs, (num_experts, ffn, embed), ("experts", "ffn", "embed"))

    def __call__(
        self, hidden_TD: Float[Array, "T D"], capacity: int
    ) -> tuple[Float[Array, "T D"], GateLoad]:
        num_experts = self.config.num_experts
        probabilities_TE = jax.nn.softmax(hidden_TD @ self.router[...], axis=-1)
        gate_weights_TA, expert_ids_TA = jax.lax.top_k(
            probabilities_TE, self.config.num_selected_experts
        )
        places_TA = assign_places(expert_ids_TA, num_experts, capacity)
        num_choices = expert_ids_TA.size
        # The inverse of the places: the choice (token and rank) at each place, if there is one.
        choice_of_place = jnp.full((num_experts * capacity,), num_choices)
        choice_of_place = choice_of_place.at[places_TA.reshape(-1)].set(
            jnp.arange(num_choices), mode="drop"
        )
        queued = dispatch(hidden_TD, places_TA, choice_of_place)
        answers = self._experts(queued.reshape(num_experts, capacity, -1))
        answers_TAD = combine(answers, places_TA, choice_of_place)
        mixed_TD = jnp.sum(answers_TAD * gate_weights_TA[..., None], axis=1)
        load = GateLoad(
            jnp.bincount(expert_ids_TA.reshape(-1), length=num_experts) / expert_ids_TA.size,
            probabilities_TE.mean(axis=0),
            jnp.mean(places_TA == num_experts * capacity),
        )
        return mixed_TD, load

    def _experts(self, queued_ECD: Float[Array, "E C D"]) -> Float[Array, "EC D"]:
        """One matrix product for each expert. A batched one is several times slower on a CPU."""
        answers = []
        for expert in range(self.config.num_experts):
            rows_CD = queued_ECD[expert]
            gate_CF = jax.nn.gelu(rows_CD @ self.linear[expert], approximate=True)
            up_CF = rows_CD @ self.linear_v[expert]
            answers.append((gate_CF * up_CF) @ self.linear_1[expert])
        return jnp.concatenate(answers)


def assign_places(
    expert_ids_TA: Int[Array, "T A"], num_experts: int, capacity: int
) -> Int[Array, "T A"]:
    """The place of each choice in the queues of all experts; one after the end if dropped."""
    flat = expert_ids_TA.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    group_sizes_E = jnp.bincount(flat, length=num_experts)
    group_starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    rank_sorted = jnp.arange(flat.size) - group_starts_E[flat[order]]
    place_sorted = jnp.where(
        rank_sorted < capacity, flat[order] * capacity + rank_sorted, num_experts * capacity
    )
    places = jnp.zeros_like(flat).at[order].set(place_sorted, unique_indices=True)
    return places.reshape(expert_ids_TA.shape)


def _rows_or_zeros(rows_ND: Array, indices: Array) -> Array:
    return rows_ND.at[indices].get(mode="fill", fill_value=0.0)


# Dispatch and combine are gathers, and the gradient of each has the form of the other. Without
# these definitions the gradients would be scatter-adds, which are slow on a CPU.


@jax.custom_vjp
def dispatch(
    hidden_TD: Float[Array, "T D"],
    places_TA: Int[Array, "T A"],
    choice_of_place: Int[Array, " N"],
) -> Float[Array, "N D"]:
    """Copies each token to the places of its choices. Empty places are zero."""
    return _rows_or_zeros(hidden_TD, choice_of_place // places_TA.shape[1])


@jax.custom_vjp
def combine(
    rows_ND: Float[Array, "N D"],
    places_TA: Int[Array, "T A"],
    choice_of_place: Int[Array, " N"],
) -> Float[Array, "T A D"]:
    """The row at the place of each choice; zeros for a dropped one."""
    del choice_of_place
    return _rows_or_zeros(rows_ND, places_TA)


def _dispatch_forward(hidden_TD, places_TA, choice_of_place):
    return dispatch(hidden_TD, places_TA, choice_of_place), places_TA


def _dispatch_backward(places_TA, gradient_ND):
    return _rows_or_zeros(gradient_ND, places_TA).sum(axis=1), None, None


def _combine_forward(rows_ND, places_TA, choice_of_place):
    return combine(rows_ND, places_TA, choice_of_place), choice_of_place


def _combine_backward(choice_of_place, gradient_TAD):
    rows = gradient_TAD.reshape(-1, gradient_TAD.shape[-1])
    return _rows_or_zeros(rows, choice_of_place), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
combine.defvjp(_combine_forward, _combine_backward)


class DecoderLayer(nnx.Module):
    """Attention and experts, each with a norm before and a norm after it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.rms_norm = RMSNorm(config.emb_size)
        self.multi_head_attention = Attention(config, rngs)
        self.rms_norm_1 = RMSNorm(config.emb_size, POST_NORM_INIT)
        self.rms_norm_2 = RMSNorm(config.emb_size)
        self.moe = MixtureOfExperts(config, rngs)
        self.rms_norm_3 = RMSNorm(config.emb_size, POST_NORM_INIT)

    def __call__(
        self,
        hidden_BSD: Float[Array, "B S D"],
        visible_BSS: Bool[Array, "B S S"],
        capacity: int,
    ) -> tuple[Float[Array, "B S D"], GateLoad]:
        attended_BSD = self.multi_head_attention(self.rms_norm(hidden_BSD), visible_BSS)
        hidden_BSD = hidden_BSD + self.rms_norm_1(attended_BSD)
        tokens_TD = self.rms_norm_2(hidden_BSD).reshape(-1, hidden_BSD.shape[-1])
        mixed_TD, load = self.moe(tokens_TD, capacity)
        return hidden_BSD + self.rms_norm_3(mixed_TD).reshape(hidden_BSD.shape), load


class Grok(nnx.Module):
    """The whole model, for windows that begin at position 0."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (config.vocab_size, config.emb_size)
        # Scaled so that the embedding times its multiplier has variance 1.
        embeddings = jax.random.normal(rngs.params(), shape) / config.embedding_multiplier_scale
        self.in_out_embed = nnx.Param(
            embeddings, out_sharding=("vocab", "embed"), eager_sharding=False
        )
        self.layers = nnx.List([DecoderLayer(config, rngs) for _ in range(config.num_layers)])
        self.rms_norm = RMSNorm(config.emb_size)

    def __call__(
        self, tokens_BS: Int[Array, "B S"], capacity_factor: float | None = None
    ) -> tuple[Float[Array, "B S V"], GateLoad]:
        """The logits of every position, and the gates' load by layer.

        Without a capacity factor no token is dropped.
        """
        config = self.config
        visible_BSS = _visible(tokens_BS, config.pad_token)
        capacity = expert_capacity(config, tokens_BS.size, capacity_factor)
        hidden_BSD = self.in_out_embed[tokens_BS] * config.embedding_multiplier_scale
        loads = []
        for layer in self.layers:
            hidden_BSD, load = layer(hidden_BSD, visible_BSS, capacity)
            loads.append(load)
        logits_BSV = self.rms_norm(hidden_BSD) @ self.in_out_embed[...].T
        return logits_BSV * config.output_multiplier_scale, jax.tree.map(_stack, *loads)


def _stack(*leaves: Array) -> Array:
    return jnp.stack(leaves)


def _visible(tokens_BS: Int[Array, "B S"], pad_token: int) -> Bool[Array, "B S S"]:
    """A key is seen by itself and what follows, unless it is padding."""
    length = tokens_BS.shape[1]
    causal_SS = jnp.tril(jnp.ones((length, length), dtype=bool))
    return causal_SS[None] & (tokens_BS > pad_token)[:, None, :]


def expert_capacity(config: ModelConfig, num_tokens: int, capacity_factor: float | None) -> int:
    """The places of an expert: its even share times the factor, or one for each token."""
    if capacity_factor is None:
        return num_tokens
    fair_share = num_tokens * config.num_selected_experts / config.num_experts
    return min(num_tokens, math.ceil(capacity_factor * fair_share / 8) * 8)


def balance_loss(load: GateLoad) -> Float[Array, ""]:
    """The balance loss of Switch Transformers: 1 if balanced, more if few experts dominate."""
    num_experts = load.chosen_share_E.shape[-1]
    per_layer = jnp.sum(load.chosen_share_E * load.mean_probability_E, axis=-1) * num_experts
    return jnp.mean(per_layer)
