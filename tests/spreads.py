"""Spreads of a model over workers, requests, and the tokens of a single process for these."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from milliways.cluster.control.planner import AttentionCut
from milliways.model.runner import CacheSize, StepMode
from milliways.model.sampling_params import SamplingParams
from milliways.router.engine import LocalEngine
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent
from tests.runners import ON_GPU, load, runner_of

CACHE = CacheSize(num_blocks=64, block_size=4, max_slots=16)
DTYPES = ["float32", "bfloat16"] if ON_GPU else ["float32"]
# The smaller vocabulary of the two models.
VOCAB_SIZE = 256
Tokens = list[TokenEvent]


@dataclass(frozen=True, slots=True)
class Spread:
    """How a model is spread over workers."""

    num_workers: int
    replicas: int
    cut: AttentionCut

    def __str__(self) -> str:
        return f"{self.num_workers}w-{self.replicas}r-{self.cut.value}"


SPREADS = [
    Spread(num_workers, replicas, cut)
    for num_workers in (1, 2, 3, 5)
    for replicas in (1, 2)
    for cut in (AttentionCut.REPLICATED, AttentionCut.LAYERS)
    if replicas <= num_workers
]


def requests(count: int, seed: int = 0) -> list[GenerationRequest]:
    """Greedy and seeded, short and long requests; some share a prefix, some have two samples."""
    random = Random(seed)
    shared = tuple(random.randrange(3, VOCAB_SIZE) for _ in range(9))
    made: list[GenerationRequest] = []
    for i in range(count):
        own = tuple(random.randrange(3, VOCAB_SIZE) for _ in range(random.randint(1, 12)))
        sampling = SamplingParams(
            temperature=0.0 if i % 2 == 0 else 0.9,
            top_p=0.95 if i % 3 == 0 else 1.0,
            frequency_penalty=0.4 if i % 4 == 1 else 0.0,
            num_logprobs=3 if i % 3 == 1 else 0,
            seed=i,
        )
        made.append(
            GenerationRequest(
                prompt_ids=shared + own if i % 2 else own,
                max_tokens=random.randint(1, 10),
                sampling=sampling,
                num_samples=2 if i % 5 == 4 else 1,
                ignore_eos=True,
            )
        )
    return made


@cache
def alone(model_dir: Path, count: int, seed: int = 0, dtype: str = "float32") -> list[Tokens]:
    """One process's tokens for each of `requests(count, seed)`, run one after another."""
    return answers(model_dir, requests(count, seed), dtype)


def answers(
    model_dir: Path, wanted: list[GenerationRequest], dtype: str = "float32"
) -> list[Tokens]:
    """One process's tokens for each request, run one after another."""
    # FUSED is what `milliways generate` uses; on a CPU it takes long to compile.
    mode = StepMode.FUSED if ON_GPU else StepMode.HALVES
    runner = runner_of(load(model_dir, dtype), mode, CACHE)
    engine = LocalEngine(runner, tokenizer=None)
    return [by_sample(list(engine.generate(request))) for request in wanted]


def by_sample(events: Tokens) -> Tokens:
    """Sorts events by sample, and keeps each sample's order: steps interleave samples."""
    return sorted(events, key=lambda event: event.sample_index)
