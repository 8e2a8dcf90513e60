"""Makes a tokenizer and training rows from the demo language.

A row begins with a text at position 0, without BOS, like a prompt when serving. EOS and the next
text follow, until the window is full. A batch depends only on the seed and the number of its step.
So nothing is stored, and a resumed run draws the same rows.
"""

import io
import random
from collections.abc import Iterator

import numpy as np
import sentencepiece as spm

from milliways.benchmarks.demo.grammar import generate_text

NUM_TOKENIZER_TEXTS = 40_000


def train_tokenizer(seed: int, vocab_size: int) -> bytes:
    """A serialised SentencePiece BPE model with Grok-1's conventions; the same for one seed."""
    rng = random.Random(f"tokenizer/{seed}")
    serialised = io.BytesIO()
    spm.SentencePieceTrainer.train(
        # The trainer needs lines. A newline is a piece of its own.
        sentence_iterator=_lines(rng),
        model_writer=serialised,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        max_sentencepiece_length=16,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        user_defined_symbols=["\n", *"0123456789"],
        num_threads=1,
        minloglevel=2,
    )
    return serialised.getvalue()


def _lines(rng: random.Random) -> Iterator[str]:
    for _ in range(NUM_TOKENIZER_TEXTS):
        yield from generate_text(rng).split("\n")


class Corpus:
    """An endless supply of rows."""

    def __init__(self, tokenizer: spm.SentencePieceProcessor, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed

    def batch(self, step: int, num_rows: int, window: int) -> np.ndarray:
        """Token ids [num_rows, window + 1]: the inputs and, shifted by one, the targets."""
        rng = random.Random(f"rows/{self._seed}/{step}")
        return np.array([self._row(rng, window + 1) for _ in range(num_rows)], dtype=np.int32)

    def _row(self, rng: random.Random, length: int) -> list[int]:
        row: list[int] = []
        while len(row) < length:
            row += self._tokenizer.encode(generate_text(rng))
            row.append(self._tokenizer.eos_id())
        return row[:length]
