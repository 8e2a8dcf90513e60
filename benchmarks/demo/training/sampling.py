"""Samples texts from the training model. It computes the whole window for every token."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sentencepiece import SentencePieceProcessor

from milliways.benchmarks.demo.training.release import model_of, read_release
from milliways.model.config import ModelConfig
from milliways.model.tokenizer import TOKENIZER_FILE

# The window sizes, each compiled once. A text longer than the last one counts as unfinished.
WINDOWS = (32, 64, 128, 192)
LOAD_WINDOW = 128


class TrainingSpeaker:
    """A `Speaker` of `milliways.benchmarks.demo.sample_check`; samples many prompts at a time."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        tokenizer: SentencePieceProcessor,
    ) -> None:
        graph, self._state = nnx.split(model_of(config, parameters))
        self._tokenizer = tokenizer
        self._forward = jax.jit(lambda state, tokens_BS: nnx.merge(graph, state)(tokens_BS))

    @classmethod
    def load(cls, model_dir: Path) -> "TrainingSpeaker":
        """A speaker with the dequantised weights of a model directory."""
        tokenizer = SentencePieceProcessor(model_file=str(model_dir / TOKENIZER_FILE))
        return cls(*read_release(model_dir), tokenizer)

    def sample(self, prompts: Sequence[str], *, temperature: float, seed: int) -> list[str | None]:
        """Each prompt with its completion; None if the completion did not end in the window."""
        tokens_BS, lengths_B = self._pad(prompts)
        finished_B = np.zeros(len(prompts), dtype=bool)
        key = jax.random.key(seed)
        while not finished_B.all() and lengths_B.max() < WINDOWS[-1]:
            window = next(size for size in WINDOWS if size > lengths_B.max())
            key, use = jax.random.split(key)
            logits_BSV, _ = self._forward(self._state, tokens_BS[:, :window])
            drawn_B = np.asarray(_draw(use, logits_BSV, lengths_B - 1, temperature))
            finished_B |= drawn_B == self._tokenizer.eos_id()
            going_on = np.flatnonzero(~finished_B)
            tokens_BS[going_on, lengths_B[going_on]] = drawn_B[going_on]
            lengths_B[going_on] += 1
        return [
            self._tokenizer.decode(tokens_BS[slot, : lengths_B[slot]].tolist())
            if finished
            else None
            for slot, finished in enumerate(finished_B)
        ]

    def expert_load(self, texts: Sequence[str]) -> np.ndarray:
        """The share of the texts' tokens that chose each expert, by layer."""
        eos = self._tokenizer.eos_id()
        stream = [token for text in texts for token in [*self._tokenizer.encode(text), eos]]
        window = min(LOAD_WINDOW, len(stream))
        rows = np.array(stream[: len(stream) // window * window], dtype=np.int32)
        _, load = self._forward(self._state, rows.reshape(-1, window))
        return np.asarray(load.chosen_share_E)

    def _pad(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        token_ids = [self._tokenizer.encode(prompt) for prompt in prompts]
        tokens_BS = np.full((len(prompts), WINDOWS[-1]), self._tokenizer.pad_id(), dtype=np.int32)
        for slot, ids in enumerate(token_ids):
            tokens_BS[slot, : len(ids)] = ids
        return tokens_BS, np.array([len(ids) for ids in token_ids])


@jax.jit
def _draw(key, logits_BSV, last_B, temperature):
    logits_BV = logits_BSV[jnp.arange(logits_BSV.shape[0]), last_B]
    drawn = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1))
