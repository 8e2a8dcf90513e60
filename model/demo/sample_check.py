"""Does it still speak? Samples texts from a model directory and holds them against the grammar.

`python -m model.demo.sample_check` prints the share of texts in the language, what was wrong with
the others, and the load of every expert.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm

from model.config import ModelConfig
from model.demo import DEMO_DIR
from model.demo.grammar import check_text, opening_prompts

ANSWER_PROMPT = "The answer to life the universe and everything is of course"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechReport:
    """What a model said: counts, its failures with reasons, and the gates' load by layer."""

    num_texts: int
    num_in_language: int
    failures: tuple[tuple[str, str], ...]
    answer: str
    expert_load_LE: np.ndarray

    @property
    def share_in_language(self) -> float:
        return self.num_in_language / self.num_texts


# Prompts, temperature, seed -> whole texts; None for one that did not end.
SampleTexts = Callable[[Sequence[str], float, int], list[str | None]]


def judge(
    sample: SampleTexts,
    expert_load_of: Callable[[Sequence[str]], np.ndarray],
    *,
    num_texts: int = 200,
    temperature: float = 0.7,
    seed: int = 0,
) -> SpeechReport:
    """Samples, checks and counts; how the texts are computed is the caller's."""
    prompts = opening_prompts(random.Random(f"openings/{seed}"), num_texts)
    texts = sample(prompts, temperature, seed)
    failures = [(text or "", fault) for text in texts if (fault := _fault(text))]
    ended = [text for text in texts if text]
    answer = sample([ANSWER_PROMPT], 0.0, seed)[0] or ""
    return SpeechReport(
        num_texts=num_texts,
        num_in_language=num_texts - len(failures),
        failures=tuple(failures),
        answer=answer.removeprefix(ANSWER_PROMPT),
        expert_load_LE=expert_load_of(ended),
    )


def _fault(text: str | None) -> str:
    return "did not end" if text is None else check_text(text).reason


def training_model_report(
    config: ModelConfig,
    parameters: dict[str, np.ndarray],
    tokenizer: spm.SentencePieceProcessor,
    **options: float,
) -> SpeechReport:
    """Judges parameters with the training model's forward pass."""
    # Imported here: the training model is an extra that serving does without.
    import jax
    from flax import nnx

    from model.training.release import model_of
    from model.training.sampling import sample_texts

    graph, state = nnx.split(model_of(config, parameters))

    @jax.jit
    def forward(state, tokens_BS):
        return nnx.merge(graph, state)(tokens_BS)

    def sample(prompts: Sequence[str], temperature: float, seed: int) -> list[str | None]:
        return sample_texts(
            lambda tokens_BS: forward(state, tokens_BS)[0],
            tokenizer,
            prompts,
            temperature=temperature,
            seed=seed,
        )

    def expert_load(texts: Sequence[str]) -> np.ndarray:
        stream = [token for text in texts for token in [*tokenizer.encode(text), 2]]
        window = min(128, len(stream))
        rows = np.array(stream[: len(stream) // window * window], dtype=np.int32)
        return np.asarray(forward(state, rows.reshape(-1, window))[1].chosen_share_E)

    return judge(sample, expert_load, **options)  # pyright: ignore[reportArgumentType]


def format_report(report: SpeechReport, num_failures_shown: int = 10) -> str:
    """The report as text, worst news first."""
    lines = [
        f"in the language: {report.num_in_language} of {report.num_texts}"
        f" = {report.share_in_language:.1%}",
        f"the answer: {report.answer!r}",
    ]
    for layer, load_E in enumerate(report.expert_load_LE):
        lines.append(f"layer {layer}: " + " ".join(f"{share:6.1%}" for share in load_E))
    mean_E = report.expert_load_LE.mean(axis=0)
    lines.append("overall: " + " ".join(f"{share:6.1%}" for share in mean_E))
    lines += [f"{fault}\n    {text!r}" for text, fault in report.failures[:num_failures_shown]]
    return "\n".join(lines)


def main() -> None:
    from model.training.release import read_release

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_DIR)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config, parameters = read_release(args.model)
    tokenizer = spm.SentencePieceProcessor(model_file=str(args.model / "tokenizer.model"))
    report = training_model_report(
        config,
        parameters,
        tokenizer,
        num_texts=args.texts,
        temperature=args.temperature,
        seed=args.seed,
    )
    print(format_report(report))


if __name__ == "__main__":
    main()
