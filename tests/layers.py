"""All intermediate results of a forward pass, named as in the reference's recordings."""

import jax
import jax.numpy as jnp
import numpy as np

from milliways.model.decoder import Decoder
from milliways.model.kv_cache import StepBatch, make_kv_cache, mark_visible
from milliways.model.params import ModelParams

PADDED_LENGTH = 104
NUM_BLOCKS = 8


def layer_states(model: tuple[Decoder, ModelParams], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Runs one sequence of at most PADDED_LENGTH tokens; arrays [T, ...] by name."""
    decoder, params = model
    config, count = decoder.config, len(tokens)
    cache = make_kv_cache(config, config.num_layers, NUM_BLOCKS, 16, decoder.dtype)
    # Padded to one length, so that one set of programs serves all prompts.
    rows = np.arange(PADDED_LENGTH)
    batch = StepBatch(
        token_ids_T=jnp.asarray(np.pad(tokens, (0, PADDED_LENGTH - count)), jnp.int32),
        positions_T=jnp.asarray(np.where(rows < count, rows, -1), jnp.int32),
        slots_T=jnp.zeros(PADDED_LENGTH, jnp.int32),
        block_tables_BM=jnp.arange(NUM_BLOCKS)[None],
        logits_rows_W=jnp.zeros(1, jnp.int32),
    )
    visible_NP = mark_visible(cache.visible_NP, batch, config.pad_token)
    attend, expert_half = jax.jit(decoder.attend), jax.jit(decoder.expert_half)
    attention_half, combine = jax.jit(decoder.attention_half), jax.jit(decoder.combine)
    norm = jax.jit(decoder.ops.rms_norm)
    mix = jax.jit(lambda outputs, weights: (outputs * weights[:, :, None]).sum(1))

    hidden_TD = decoder.embed(params.ends, batch.token_ids_T)
    states = {"embed": hidden_TD}
    for layer in range(config.num_layers):
        attention, layer_cache = params.attention_L[layer], cache.layers_L[layer]
        attention_input_TD = norm(hidden_TD, attention.attention_norm_D)
        attended_TD, _ = attend(attention, attention_input_TD, batch, layer_cache, visible_NP)
        result = attention_half(attention, hidden_TD, batch, layer_cache, visible_NP)
        outputs_TAD = expert_half(
            params.experts_L[layer], result.expert_input_TD, result.expert_ids_TA
        )
        hidden_TD = combine(attention, result.hidden_TD, outputs_TAD, result.gate_weights_TA)
        states |= {
            f"layer{layer}_attn_in": attention_input_TD,
            f"layer{layer}_attn_out": attended_TD,
            f"layer{layer}_moe_in": result.expert_input_TD,
            f"layer{layer}_moe_out": mix(outputs_TAD, result.gate_weights_TA),
            f"layer{layer}_expert_index": result.expert_ids_TA,
            f"layer{layer}_expert_gate": result.gate_weights_TA,
            f"layer{layer}_out": hidden_TD,
        }
    states["final_norm"] = norm(hidden_TD, params.ends.final_norm_D)
    return {name: np.asarray(state)[:count] for name, state in states.items()}
