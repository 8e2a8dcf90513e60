"""Requests to the demo model for tests, and the tokens of a separate engine for them."""

from typing import Any

from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.sampling_params import SamplingParams
from milliways.router.engine import LocalEngine
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent

MAX_TOKENS = 12
PROMPT = "The answer to life the universe and everything is of course"
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9},
    {"temperature": 1.2, "seed": 0, "n": 3},
    {"temperature": 1, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.7, "seed": 9, "stop": ["e", "42"], "logit_bias": {"5": 2}},
]
PROMPTS: list[Any] = [PROMPT, "Welcome to", [5, 60, 700]]


def request_of(model: ServedModel, prompt: Any, params: dict[str, Any]) -> GenerationRequest:
    """The engine's request for a client's prompt and parameters."""
    given = dict(params)
    num_samples, stop = given.pop("n", 1), tuple(given.pop("stop", ()))
    bias = {int(key): float(value) for key, value in given.pop("logit_bias", {}).items()}
    return GenerationRequest(
        prompt_ids=model.encode(prompt) if isinstance(prompt, str) else tuple(prompt),
        max_tokens=given.pop("max_tokens", MAX_TOKENS),
        ignore_eos=given.pop("ignore_eos", False),
        sampling=SamplingParams(num_logprobs=3, logit_bias=bias, **given),
        num_samples=num_samples,
        stop=stop,
    )


def alone(engine: LocalEngine, request: GenerationRequest) -> list[list[TokenEvent]]:
    """A request's events when it runs alone, by sample."""
    samples: list[list[TokenEvent]] = [[] for _ in range(request.num_samples)]
    for event in engine.generate(request):
        samples[event.sample_index].append(event)
    return samples


def check_choice(pieces: list[Any], events: list[TokenEvent], model: ServedModel) -> None:
    """Asserts that a choice's pieces agree with the events."""
    assert "".join(piece.text for piece in pieces) == "".join(event.text for event in events)
    ids = [token_id for piece in pieces for token_id in piece.token_ids]
    assert ids == [event.token_id for event in events]
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs.token_logprobs]
    assert logprobs == [event.logprob for event in events]
    tops = [top for piece in pieces for top in piece.logprobs.top_logprobs]
    wanted = [
        {model.token_name(token_id): logprob for token_id, logprob in reversed(event.top_logprobs)}
        for event in events
    ]
    assert tops == wanted
    offsets = [offset for piece in pieces for offset in piece.logprobs.text_offset]
    lengths = [len(event.text) for event in events]
    assert offsets == [sum(lengths[:i]) for i in range(len(lengths))]
    assert events[-1].finish_reason is not None
    reasons = [piece.finish_reason for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [events[-1].finish_reason.value]
