"""Milliways in one process as a contestant: runs the steps that its engine would run."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from milliways.benchmarks.speed.programs.line_protocol import Measure, serve
from milliways.cluster.host.local import BLOCK_SIZE, LocalModel, load_local_model, make_local_runner
from milliways.model.activations import Activations
from milliways.model.ops.select import KernelChoice
from milliways.model.runner import CacheSize, ModelRunner, ScheduledTokens
from milliways.model.sampling_params import SampleRow, SamplingParams
from milliways.router.limits import SchedulerLimits

CHUNK_TOKENS = SchedulerLimits().max_step_tokens
_GREEDY = SamplingParams(temperature=0.0)
_SEED = 1
# The least number of slots; serving one request has the same number.
_MIN_SLOTS = 8


@dataclass(slots=True)
class _Sequence:
    """A sequence with its own KV blocks. Its tokens are random, as for the other engines."""

    token_ids: list[int]
    blocks: range

    def scheduled(self, start: int, end: int, num_logits: int) -> ScheduledTokens:
        return ScheduledTokens(
            token_ids=self.token_ids[start:end],
            start_position=start,
            block_table=self.blocks[: -(-end // BLOCK_SIZE)],
            num_logits=num_logits,
        )

    def row(self, num_tokens: int) -> SampleRow:
        return SampleRow(
            params=_GREEDY, token_ids=self.token_ids[:num_tokens], num_prompt_tokens=num_tokens
        )


class Bench:
    """One batch to decode and one prompt to prefill, in separate blocks of one cache.

    Invariant: the first `_num_prefilled` sequences of `_batch` have their prompts in the cache.
    """

    def __init__(self, model: LocalModel, options: argparse.Namespace) -> None:
        batch_tokens, prompt_tokens = options.batch_tokens, options.prompt_tokens
        blocks_each = -(-batch_tokens // BLOCK_SIZE)
        num_batch_blocks = options.max_batch * blocks_each
        num_blocks = num_batch_blocks + -(-prompt_tokens // BLOCK_SIZE)
        rng = np.random.default_rng(_SEED)
        vocab_size = model.decoder.config.vocab_size

        def sequence(num_tokens: int, blocks: range) -> _Sequence:
            return _Sequence(rng.integers(3, vocab_size, num_tokens).tolist(), blocks)

        self._batch = [
            sequence(batch_tokens, range(first, first + blocks_each))
            for first in range(0, num_batch_blocks, blocks_each)
        ]
        self._prompt = sequence(prompt_tokens, range(num_batch_blocks, num_blocks))
        self._num_prefilled = 0
        size = CacheSize(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_slots=max(_MIN_SLOTS, options.max_batch),
        )
        self._runner: ModelRunner = make_local_runner(model, size)

    def measure(self, request: dict[str, Any]) -> tuple[int, float]:
        """Times one request of the line protocol."""
        if request["kind"] == "prefill":
            return self._prefill(self._prompt, request["size"])
        return self._decode(request["size"], request["prompt_tokens"], request["steps"])

    def _prefill(self, sequence: _Sequence, num_tokens: int) -> tuple[int, float]:
        """Prefills in the chunks that the scheduler would use; the last one draws a token."""
        start_s = time.perf_counter()
        for start in range(0, num_tokens, CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, num_tokens)
            self._step([sequence], start, end, draw=end == num_tokens)
        return num_tokens, time.perf_counter() - start_s

    def _decode(self, batch: int, num_prompt_tokens: int, num_steps: int) -> tuple[int, float]:
        times = self.time_steps(batch, num_prompt_tokens, num_steps)
        return batch * num_steps, (times[-1][1] - times[0][0]) / 1e9

    def time_steps(
        self, batch: int, num_prompt_tokens: int, num_steps: int
    ) -> list[tuple[int, int]]:
        """Decodes; returns start and end of each step, by `time.monotonic_ns`.

        It begins at the end of the prompts, and overwrites the positions of the last repeat.
        """
        for sequence in self._batch[self._num_prefilled : batch]:
            self._prefill(sequence, num_prompt_tokens)
        self._num_prefilled = max(self._num_prefilled, batch)
        times: list[tuple[int, int]] = []
        for position in range(num_prompt_tokens, num_prompt_tokens + num_steps):
            start_ns = time.monotonic_ns()
            self._step(self._batch[:batch], position, position + 1, draw=True)
            times.append((start_ns, time.monotonic_ns()))
        return times

    def _step(self, sequences: Sequence[_Sequence], start: int, end: int, *, draw: bool) -> None:
        self._runner.compute_and_sample(
            [sequence.scheduled(start, end, num_logits=int(draw)) for sequence in sequences],
            [sequence.row(end) for sequence in sequences if draw],
        )


def load(options: argparse.Namespace) -> tuple[str, Measure]:
    """Loads the model. The description names what the figures depend on."""
    model = load_model(options)
    kernels = type(model.decoder.ops).__name__
    about = (
        f"{options.dtype}, activations {options.activations}, {kernels}, steps of at most "
        f"{CHUNK_TOKENS} tokens, jax {jax.__version__} on {jax.default_backend()}"
    )
    return about, Bench(model, options).measure


def load_model(options: argparse.Namespace) -> LocalModel:
    """Loads the model that the options name."""
    wanted = KernelChoice(activations=Activations(options.activations), num_threads=options.threads)
    return load_local_model(options.model_dir, options.dtype, wanted)


def parse_options() -> argparse.Namespace:
    """The options that `milliways bench` starts this program with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, required=True, help="context of each sequence")
    parser.add_argument("--prompt-tokens", type=int, required=True, help="longest prompt")
    parser.add_argument("--threads", type=int, help="number of threads [all cores]")
    return parser.parse_args()


if __name__ == "__main__":
    parsed = parse_options()
    serve(lambda: load(parsed))
