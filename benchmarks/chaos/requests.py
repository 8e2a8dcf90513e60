"""The requests of the load: every sampling mode, over HTTP and over gRPC. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any

from milliways.v1 import generate_pb2, sampling_pb2


class Surface(Enum):
    """The protocol that a request is sent over."""

    HTTP = "HTTP"
    GRPC = "gRPC"


# Sampling modes, with the parameter names of OpenAI's API.
MODES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.9},
    "top-p + penalties": {
        "temperature": 1.0,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    },
    "logprobs": {"temperature": 0.7, "logprobs": 5},
    "scored prompt": {"temperature": 0.7, "logprobs": 2, "echo": True},
    "n=3": {"temperature": 1.0, "n": 3},
    "stop string": {"temperature": 0.5, "stop": ["universe", "42", " of the"]},
}
_BEGINNINGS = (
    "The answer to life the universe and everything is of course",
    "Welcome to",
    "Travellers who come to the restaurant at the end of the universe are told that",
    "Always bring a towel, because",
)
_WORDS = ("star", "tea", "towel", "time", "42")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosRequest:
    """One request, which can be sent over either protocol."""

    mode: str
    surface: Surface
    prompt: str
    seed: int
    max_tokens: int

    def __str__(self) -> str:
        return f"{self.mode} over {self.surface.value}, seed {self.seed}: {self.prompt!r}"

    @property
    def num_samples(self) -> int:
        return MODES[self.mode].get("n", 1)

    def http_body(self, model: str) -> dict[str, Any]:
        """The body for POST /v1/completions. It asks for token ids, to compare every token."""
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
            **MODES[self.mode],
        }

    def grpc_message(self) -> generate_pb2.GenerateRequest:
        """The message for GenerateService.Generate."""
        drawn = dict(MODES[self.mode])
        stop, num_samples = drawn.pop("stop", []), drawn.pop("n", 0)
        num_logprobs, is_scored = drawn.pop("logprobs", 0), drawn.pop("echo", False)
        return generate_pb2.GenerateRequest(
            text=self.prompt,
            max_tokens=self.max_tokens,
            num_samples=num_samples,
            stop=stop,
            ignore_eos=True,
            echo=is_scored,
            prompt_logprobs=num_logprobs if is_scored else None,
            sampling=sampling_pb2.SamplingParams(
                num_logprobs=num_logprobs, seed=self.seed, **drawn
            ),
        )


def draw_requests(count: int, max_tokens: int, seed: int) -> tuple[ChaosRequest, ...]:
    """`count` different requests, which take the modes and protocols in turn."""
    random = Random(seed)
    kinds = [(mode, surface) for mode in MODES for surface in Surface]
    requests: list[ChaosRequest] = []
    for number in range(count):
        mode, surface = kinds[number % len(kinds)]
        words = " ".join(random.choice(_WORDS) for _ in range(random.randrange(4)))
        requests.append(
            ChaosRequest(
                mode=mode,
                surface=surface,
                prompt=f"{random.choice(_BEGINNINGS)} {words}".rstrip(),
                seed=random.randrange(1 << 31),
                max_tokens=max_tokens,
            )
        )
    return tuple(requests)
