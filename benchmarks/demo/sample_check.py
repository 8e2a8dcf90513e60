"""Samples texts from a model, and checks them with the grammar.

`python -m milliways.benchmarks.demo.sample_check` prints the share of texts in the language, the
faults of the others, and the load of every expert. A program that computes the model in another way
gives its own `Speaker` to `judge`.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from milliways.benchmarks.demo.grammar import (
    KIND_WEIGHTS,
    check_text,
    generate_text,
    opening_prompts,
)
from milliways.model.demo import DEMO_DIR

ANSWER_PROMPT = "The answer to life the universe and everything is of course"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechReport:
    """The sampled texts in numbers, the failures with reasons, and the experts' load by layer."""

    num_texts: int
    num_in_language: int
    failures: tuple[tuple[str, str], ...]
    answer: str
    expert_load_LE: np.ndarray

    @property
    def share_in_language(self) -> float:
        return self.num_in_language / self.num_texts


class Speaker(Protocol):
    """A model that writes texts, computed in any way."""

    def sample(
        self, prompts: Sequence[str], *, temperature: float, seed: int
    ) -> Sequence[str | None]:
        """Each prompt with its completion; None for a completion that did not end."""
        ...

    def expert_load(self, texts: Sequence[str]) -> np.ndarray:
        """The share of the texts' tokens that chose each expert: [L, E]; rows sum to 1."""
        ...


def judge(
    speaker: Speaker, *, num_texts: int = 200, temperature: float = 0.7, seed: int = 0
) -> SpeechReport:
    """Samples texts from a model, checks them, and counts."""
    prompts = opening_prompts(random.Random(f"openings/{seed}"), num_texts)
    texts = speaker.sample(prompts, temperature=temperature, seed=seed)
    failures = tuple((fault, text or "") for text in texts if (fault := _fault(text)))
    answer = speaker.sample([ANSWER_PROMPT], temperature=0.0, seed=seed)[0] or ""
    return SpeechReport(
        num_texts=num_texts,
        num_in_language=num_texts - len(failures),
        failures=failures,
        answer=answer.removeprefix(ANSWER_PROMPT),
        expert_load_LE=speaker.expert_load([text for text in texts if text]),
    )


def _fault(text: str | None) -> str:
    return "did not end" if text is None else check_text(text).reason


def expert_load_by_kind(
    speaker: Speaker, *, num_texts: int = 50, seed: int = 0
) -> dict[str, np.ndarray]:
    """The load [layers, experts] over generated texts of each kind: shows specialised experts."""
    loads = {}
    for kind in KIND_WEIGHTS:
        rng = random.Random(f"{kind}/{seed}")
        loads[kind] = speaker.expert_load([generate_text(rng, kind) for _ in range(num_texts)])
    return loads


def format_report(report: SpeechReport, num_failures_shown: int = 10) -> str:
    """The report as text."""
    load_LE = report.expert_load_LE
    lines = [
        f"in the language: {report.num_in_language} of {report.num_texts}"
        f" = {report.share_in_language:.1%}",
        f"the answer: {report.answer!r}",
        *(_format_load(f"layer {layer}", load_E) for layer, load_E in enumerate(load_LE)),
        _format_load("overall", load_LE.mean(axis=0)),
    ]
    lines += [f"{fault}\n    {text!r}" for fault, text in report.failures[:num_failures_shown]]
    return "\n".join(lines)


def format_load_by_kind(loads: dict[str, np.ndarray]) -> str:
    lines = []
    for layer in range(len(next(iter(loads.values())))):
        lines.append(f"layer {layer} by kind:")
        lines += [_format_load(kind, load_LE[layer]) for kind, load_LE in loads.items()]
    return "\n".join(lines)


def _format_load(label: str, load_E: np.ndarray) -> str:
    return f"{label:>8}: " + " ".join(f"{share:6.1%}" for share in load_E)


def main() -> None:
    # Imported here: the training model needs extra packages, which serving does not need.
    from milliways.benchmarks.demo.training.sampling import TrainingSpeaker

    parser = argparse.ArgumentParser(description="Check texts that the demo model writes.")
    option = parser.add_argument
    option("--model", type=Path, default=DEMO_DIR, metavar="DIR", help="model directory")
    option("--texts", type=int, default=200, metavar="N", help="number of texts [%(default)s]")
    option("--temperature", type=float, default=0.7, metavar="T", help="temperature [%(default)s]")
    option("--seed", type=int, default=0, metavar="S", help="seed of prompts and draws")
    option("--kinds", action="store_true", help="also print the experts' load by kind of text")
    args = parser.parse_args()
    speaker = TrainingSpeaker.load(args.model)
    report = judge(speaker, num_texts=args.texts, temperature=args.temperature, seed=args.seed)
    print(format_report(report))
    if args.kinds:
        print(format_load_by_kind(expert_load_by_kind(speaker)))


if __name__ == "__main__":
    main()
