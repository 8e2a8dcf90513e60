"""Trains the demo model, and writes it in the released form.

    python -m milliways.benchmarks.demo.training.train_demo --seed 0 --steps 8000 --out build/demo

A run has these steps:

1. Train the tokenizer on the demo language, if --out does not have one.
2. Load the state from --out/state.npz if there is one; otherwise start from the seed.
3. Draw the rows of each step from (seed, step). The learning rate warms up, stays, and falls in the
   last part of the run. At the end, windows are longer. Both depend on the step, and on --steps
   only from the beginning of the fall: until then --steps may still be changed.
4. Save the state and the loss curve every few minutes.
5. Quantise, write --release (by default the package's own demo folder), and plot the loss.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece as spm
from flax import nnx

from milliways.benchmarks.demo.sample_check import format_report, judge
from milliways.benchmarks.demo.training.corpus import Corpus, train_tokenizer
from milliways.benchmarks.demo.training.grok_flax import GateLoad, Grok, balance_loss
from milliways.benchmarks.demo.training.loss_curve import LossCurve, plot_loss
from milliways.benchmarks.demo.training.release import parameters_of, write_release
from milliways.benchmarks.demo.training.sampling import TrainingSpeaker
from milliways.model.config import ModelConfig, ffn_size
from milliways.model.demo import DEMO_DIR
from milliways.model.tokenizer import TOKENIZER_FILE

logger = logging.getLogger(__name__)

EMB_SIZE = 128
KEY_SIZE = 32
DEMO_CONFIG = ModelConfig(
    emb_size=EMB_SIZE,
    key_size=KEY_SIZE,
    num_q_heads=4,
    num_kv_heads=2,
    num_layers=4,
    vocab_size=1280,
    ffn_size=ffn_size(EMB_SIZE, 3),
    num_experts=8,
    num_selected_experts=2,
    sequence_len=512,
    embedding_multiplier_scale=EMB_SIZE**0.5,
    output_multiplier_scale=3**-0.5,
    attn_output_multiplier=KEY_SIZE**-0.5,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the result, except the seed and the number of steps."""

    learning_rate_max: float = 3e-3
    learning_rate_end: float = 1e-4
    num_warmup_steps: int = 200
    # The share of the run, at its end, in which the learning rate falls along a cosine.
    fall_share: float = 0.5
    # Most texts fit into a short window. Long windows at the end teach the positions after it.
    num_rows: int = 16
    window: int = 128
    num_long_rows: int = 8
    long_window: int = 256
    long_share: float = 0.08
    capacity_factor: float = 1.25
    balance_weight: float = 0.02
    weight_decay: float = 0.05
    gradient_norm_max: float = 1.0

    def learning_rate(self, num_steps: int) -> optax.Schedule:
        """The learning rate by step: it rises, stays, and falls."""
        num_fall_steps = int(num_steps * self.fall_share)
        peak = self.learning_rate_max
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, self.num_warmup_steps),
                optax.cosine_decay_schedule(
                    peak, num_fall_steps, alpha=self.learning_rate_end / peak
                ),
            ],
            [num_steps - num_fall_steps],
        )

    def rows(self, step: int, num_steps: int) -> tuple[int, int]:
        """The number of rows of a step, and their window."""
        if step >= num_steps * (1 - self.long_share):
            return self.num_long_rows, self.long_window
        return self.num_rows, self.window


class Trainer:
    """The parameters of the model, the state of the optimiser, and the number of the next step.

    Invariant: `_params` and `_optimiser_state` are those after `step` updates.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, seed: int, num_steps: int) -> None:
        self.config = config
        self.step = 0
        self._graph, self._params = nnx.split(Grok(config, nnx.Rngs(seed)), nnx.Param)
        self._optimiser = optax.chain(
            optax.clip_by_global_norm(recipe.gradient_norm_max),
            optax.adamw(
                recipe.learning_rate(num_steps),
                b2=0.98,
                weight_decay=recipe.weight_decay,
                mask=_is_matrix,
            ),
        )
        self._optimiser_state = self._optimiser.init(self._params)
        self._recipe = recipe
        self._update = jax.jit(self._one_update, donate_argnums=(0, 1))

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._params))

    def train_on(self, rows: np.ndarray) -> tuple[jax.Array, GateLoad]:
        """Runs one step; returns the loss in nats per token. The arrays may still be computing."""
        self._params, self._optimiser_state, loss, load = self._update(
            self._params, self._optimiser_state, rows
        )
        self.step += 1
        return loss, load

    def parameters(self) -> dict[str, np.ndarray]:
        return parameters_of(nnx.merge(self._graph, self._params))

    def save(self, path: Path) -> None:
        leaves = jax.tree.leaves((self._params, self._optimiser_state))
        whole = path.with_suffix(".new.npz")
        np.savez(whole, step=self.step, **{f"leaf{i}": np.asarray(x) for i, x in enumerate(leaves)})
        whole.replace(path)

    def restore(self, path: Path) -> None:
        saved = np.load(path)
        tree = jax.tree.structure((self._params, self._optimiser_state))
        leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(tree.num_leaves)]
        self._params, self._optimiser_state = jax.tree.unflatten(tree, leaves)
        self.step = int(saved["step"])

    def _one_update(self, params: Any, optimiser_state: Any, rows: jax.Array) -> tuple[Any, ...]:
        grad = jax.value_and_grad(self._loss, has_aux=True)
        (_, (loss, load)), gradients = grad(params, rows)
        updates, optimiser_state = self._optimiser.update(gradients, optimiser_state, params)
        return optax.apply_updates(params, updates), optimiser_state, loss, load

    def _loss(self, params: Any, rows: jax.Array) -> tuple[jax.Array, tuple[jax.Array, GateLoad]]:
        model = nnx.merge(self._graph, params)
        logits_BSV, load = model(rows[:, :-1], self._recipe.capacity_factor)
        losses_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, rows[:, 1:])
        loss = losses_BS.mean()
        return loss + self._recipe.balance_weight * balance_loss(load), (loss, load)


def _is_matrix(params: Any) -> Any:
    """Which parameters have weight decay: matrices, but not the scales of norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def load_or_train_tokenizer(path: Path, seed: int) -> spm.SentencePieceProcessor:
    if not path.is_file():
        path.write_bytes(train_tokenizer(seed, DEMO_CONFIG.vocab_size))
    return spm.SentencePieceProcessor(model_file=str(path))


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.out / TOKENIZER_FILE
    state_path, curve_path = args.out / "state.npz", args.out / "loss.csv"
    tokenizer = load_or_train_tokenizer(tokenizer_path, args.seed)
    recipe = Recipe()
    trainer = Trainer(DEMO_CONFIG, recipe, args.seed, args.steps)
    curve = LossCurve(curve_path)
    if state_path.is_file():
        trainer.restore(state_path)
        curve.restore(trainer.step)
    logger.info("%d parameters, from step %d", trainer.num_parameters, trainer.step)
    batches = _batches(Corpus(tokenizer, args.seed), recipe, trainer.step, args.steps)
    deadline_s = time.monotonic() + args.minutes * 60
    for rows in batches:
        loss, load = trainer.train_on(rows)
        curve.add(trainer.step, rows[:, 1:].size, loss)
        if trainer.step % args.log_every == 0:
            _log(trainer, curve, load)
        if trainer.step % args.save_every == 0:
            trainer.save(state_path)
            curve.save()
        if trainer.step % args.sample_every == 0:
            _log_samples(trainer, tokenizer)
        if time.monotonic() > deadline_s:
            break
    trainer.save(state_path)
    curve.save()
    num_bytes = write_release(
        args.release, DEMO_CONFIG, trainer.parameters(), tokenizer_path.read_bytes()
    )
    logger.info("step %d, wrote %d bytes to %s", trainer.step, num_bytes, args.release)
    plot_loss(curve_path, args.plot)


def _batches(corpus: Corpus, recipe: Recipe, first: int, num_steps: int) -> Iterator[np.ndarray]:
    """The rows of each step. They are made while the device computes the step before."""
    for step in range(first, num_steps):
        yield corpus.batch(step, *recipe.rows(step, num_steps))


def _log(trainer: Trainer, curve: LossCurve, load: GateLoad) -> None:
    share = np.asarray(load.chosen_share_E)
    logger.info(
        "step %d tokens %.2fM loss %.4f expert load %.3f-%.3f dropped %.4f",
        trainer.step,
        curve.num_tokens / 1e6,
        curve.recent_loss(),
        share.min(),
        share.max(),
        np.asarray(load.dropped_share).max(),
    )


def _log_samples(trainer: Trainer, tokenizer: spm.SentencePieceProcessor) -> None:
    speaker = TrainingSpeaker(trainer.config, trainer.parameters(), tokenizer)
    report = judge(speaker, num_texts=40, seed=trainer.step)
    logger.info("step %d samples\n%s", trainer.step, format_report(report, 6))


def build_parser() -> argparse.ArgumentParser:
    """The options. Their defaults are those of the run that made the model we ship."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    option = parser.add_argument
    option("--seed", type=int, default=0, metavar="S", help="seed of the run [%(default)s]")
    option("--steps", type=int, default=8000, metavar="N", help="number of steps [%(default)s]")
    option(
        "--out",
        type=Path,
        default=Path("build/demo-run"),
        metavar="DIR",
        help="folder for the state of the run, to resume it [%(default)s]",
    )
    option("--minutes", type=float, default=1e6, metavar="M", help="minutes after which to stop")
    option("--release", type=Path, default=DEMO_DIR, metavar="DIR", help="model directory to write")
    option(
        "--plot",
        type=Path,
        default=Path("docs/demo-loss.svg"),
        metavar="FILE",
        help="plot of the loss to write [%(default)s]",
    )
    option("--log-every", type=int, default=50, metavar="N", help="steps between log lines")
    option("--save-every", type=int, default=250, metavar="N", help="steps between saved states")
    option("--sample-every", type=int, default=1500, metavar="N", help="steps between samples")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run(args)


if __name__ == "__main__":
    main()
