"""The gate: which experts a token goes to, and with which weights.

In plain JAX. `native/ops.cc` and `gpu_rows.py` compute the same on a CPU and on a GPU.
`Decoder.attention_half` calls the one that the backend has, as `Ops.gate`. Source of the formula:
xai-org/grok-1, model.py. As there, the weights are not normalised again after the choice.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def choose_experts(
    hidden_TD: Float[Array, "T D"], gate_DE: Float[Array, "D E"], num_selected: int
) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
    """The ids and softmax weights of each row's best `num_selected` experts, the best first."""
    # HIGHEST prevents accelerators from rounding float32 operands to TF32.
    logits_TE = jnp.einsum(
        "td,de->te",
        hidden_TD.astype(jnp.float32),
        gate_DE,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )
    gate_weights_TA, expert_ids_TA = lax.top_k(jax.nn.softmax(logits_TE, axis=-1), num_selected)
    return expert_ids_TA, gate_weights_TA
