"""Samples texts from the training model, plainly: the whole window again for every token."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm

# The logits of every position, given token ids [B, S]; one compilation per window.
Logits = Callable[[np.ndarray], jax.Array]
WINDOWS = (32, 64, 128, 192)


def sample_texts(
    logits_of: Logits,
    tokenizer: spm.SentencePieceProcessor,
    prompts: Sequence[str],
    *,
    temperature: float,
    seed: int,
) -> list[str | None]:
    """Each prompt with its completion; None where the model had not finished in time."""
    token_ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens_BS = np.full((len(prompts), WINDOWS[-1]), tokenizer.pad_id(), dtype=np.int32)
    for slot, ids in enumerate(token_ids):
        tokens_BS[slot, : len(ids)] = ids
    lengths_B = np.array([len(ids) for ids in token_ids])
    finished_B = np.zeros(len(prompts), dtype=bool)
    key = jax.random.key(seed)
    while not finished_B.all() and lengths_B.max() < WINDOWS[-1]:
        window = next(size for size in WINDOWS if size > lengths_B.max())
        key, use = jax.random.split(key)
        logits_BSV = logits_of(tokens_BS[:, :window])
        chosen_B = np.asarray(_draw(use, logits_BSV, lengths_B - 1, temperature))
        finished_B |= chosen_B == tokenizer.eos_id()
        going_on = np.flatnonzero(~finished_B)
        tokens_BS[going_on, lengths_B[going_on]] = chosen_B[going_on]
        lengths_B[going_on] += 1
    return [
        tokenizer.decode(tokens_BS[slot, : lengths_B[slot]].tolist()) if finished else None
        for slot, finished in enumerate(finished_B)
    ]


@jax.jit
def _draw(key, logits_BSV, last_B, temperature):
    logits_BV = logits_BSV[jnp.arange(logits_BSV.shape[0]), last_B]
    drawn = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1))
