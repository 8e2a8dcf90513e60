"""A real cluster's ingress, routers and workers give exactly the tokens of one process."""

import asyncio
import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import openai
import pytest

from milliways.cluster.cli import main as cli
from milliways.cluster.ingress.served_model import ServedModel
from milliways.router.engine import LocalEngine
from milliways.router.requests.sequence import TokenEvent
from milliways.v1 import generate_pb2, generate_pb2_grpc, sampling_pb2
from tests.demo_requests import PARAMS, PROMPT, PROMPTS, alone, check_choice, request_of
from tests.ingresses import demo_engine, demo_model
from tests.served_cluster import ServedCluster

MORE: dict[str, Any] = {"return_token_ids": True}
SHARED = "Travellers who come to the restaurant at the end of the universe are told that "
Case = tuple[Any, dict[str, Any]]
CASES: list[Case] = [(prompt, params) for prompt in PROMPTS for params in PARAMS]


@dataclass
class Oracle:
    """A separate engine, and its answers so far."""

    model: ServedModel = field(default_factory=demo_model)
    engine: LocalEngine = field(default_factory=demo_engine)
    answers: dict[str, list[list[TokenEvent]]] = field(default_factory=dict)

    def ask(self, prompt: Any, params: dict[str, Any]) -> list[list[TokenEvent]]:
        key = json.dumps([prompt, params], sort_keys=True)
        if key not in self.answers:
            self.answers[key] = alone(self.engine, request_of(self.model, prompt, params))
        return self.answers[key]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


async def ask(
    client: openai.AsyncOpenAI, prompt: Any, params: dict[str, Any], stream: bool
) -> list[list[Any]]:
    """The pieces of a stream, by choice."""
    answer: Any = await client.completions.create(
        model="demo", prompt=prompt, stream=stream, logprobs=3, **openai_fields(params)
    )
    pieces = [piece async for piece in answer] if stream else [answer]
    choices: dict[int, list[Any]] = {}
    for piece in pieces:
        for choice in piece.choices:
            choices.setdefault(choice.index, []).append(choice)
    return [choices[index] for index in sorted(choices)]


def openai_fields(params: dict[str, Any]) -> dict[str, Any]:
    fields = {"max_tokens": 12} | params
    own = {name: fields.pop(name) for name in ("ignore_eos",) if name in fields}
    return fields | {"extra_body": MORE | own}


def asked(
    cluster: ServedCluster, cases: list[Case], at_a_time: int, stream: bool = True
) -> list[list[list[Any]]]:
    """The pieces that clients receive for all cases, `at_a_time` of them in parallel."""

    async def main() -> list[list[list[Any]]]:
        room = asyncio.Semaphore(at_a_time)

        async def one(prompt: Any, params: dict[str, Any]) -> list[list[Any]]:
            async with room:
                return await ask(client, prompt, params, stream)

        async with openai.AsyncOpenAI(
            base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:
            return await asyncio.gather(*(one(*case) for case in cases))

    return asyncio.run(main())


def check_all(oracle: Oracle, cases: list[Case], received: list[list[list[Any]]]) -> None:
    for case, choices in zip(cases, received, strict=True):
        samples = oracle.ask(*case)
        assert len(choices) == len(samples)
        for pieces, events in zip(choices, samples, strict=True):
            check_choice(pieces, events, oracle.model)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_one_after_another(
    cluster: ServedCluster, oracle: Oracle, stream: bool
) -> None:
    check_all(oracle, CASES, asked(cluster, CASES, 1, stream))


def mixed_cases(count: int, seed: int) -> list[Case]:
    """Long and short, greedy and sampled cases; most share a prefix."""
    random = Random(seed)
    cases: list[Case] = []
    for i in range(count):
        words = " ".join(random.choice(["star", "tea", "towel", "42"]) for _ in range(i % 7 + 1))
        params = PARAMS[i % len(PARAMS)] | {"max_tokens": random.randint(1, 40)}
        cases.append((SHARED + words if i % 3 else words, params | {"ignore_eos": i % 4 == 0}))
    return cases


@pytest.mark.parametrize("at_a_time", [4, 16])
def test_requests_that_join_and_leave_change_no_other(
    cluster: ServedCluster, oracle: Oracle, at_a_time: int
) -> None:
    cases = mixed_cases(32, at_a_time)
    check_all(oracle, cases, asked(cluster, cases, at_a_time))


def test_generate_command_gives_the_same_text(
    cluster: ServedCluster, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--temperature", "0.8", "--seed", "3", "--top-p", "0.9", "--logprobs", "3"]
    assert cli.main(["generate", "--json", PROMPT, "--max-tokens", "12", *arguments]) == 0
    (wanted,) = json.loads(capsys.readouterr().out)["choices"]
    ((pieces,),) = asked(cluster, [(PROMPT, PARAMS[1])], 1, stream=False)
    assert pieces[0].text == wanted["text"]
    assert pieces[0].token_ids == wanted["token_ids"]
    assert pieces[0].logprobs.token_logprobs == wanted["logprobs"]["token_logprobs"]
    assert pieces[0].logprobs.top_logprobs == wanted["logprobs"]["top_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
def test_chat(cluster: ServedCluster, oracle: Oracle, stream: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        answer: Any = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": PROMPT}],
            max_completion_tokens=12,
            logprobs=True,
            stream=stream,
            **PARAMS[1],
            **options,
        )
        pieces = list(answer) if stream else [answer]
    (events,) = oracle.ask(PROMPT, PARAMS[1])
    choices = [piece.choices[0] for piece in pieces if piece.choices]
    parts = [choice.delta if stream else choice.message for choice in choices]
    assert "".join(part.content or "" for part in parts) == "".join(e.text for e in events)
    logprobs = [token.logprob for choice in choices for token in choice.logprobs.content]
    assert logprobs == [event.logprob for event in events]
    assert pieces[-1].usage.completion_tokens == len(events)


def test_models_are_listed(cluster: ServedCluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["demo"]


def test_plain_http_streams_events(cluster: ServedCluster, oracle: Oracle) -> None:
    body = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        # Serve adds one; we must not add another.
        assert len(response.headers.get_list("x-request-id")) == 1
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
    assert text == "".join(event.text for event in oracle.ask(PROMPT, PARAMS[0])[0])


def test_grpc_gives_the_same_tokens(cluster: ServedCluster, oracle: Oracle) -> None:
    cases = [(PROMPT, PARAMS[0]), (PROMPTS[2], PARAMS[1]), ("Welcome to", PARAMS[2])]

    async def main() -> list[list[Any]]:
        async with cluster.channel() as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            calls = [stub.Generate(grpc_request(*case), timeout=60) for case in cases]
            return [[e async for response in call for e in response.events] for call in calls]

    for case, events in zip(cases, asyncio.run(main()), strict=True):
        for index, wanted in enumerate(oracle.ask(*case)):
            received = [e for e in events if e.sample_index == index]
            assert [e.token_id for e in received] == [e.token_id for e in wanted]
            assert [e.text for e in received] == [e.text for e in wanted]
            assert [e.logprob for e in received] == [e.logprob for e in wanted]
            tops = [tuple(zip(e.top_token_ids, e.top_logprobs, strict=True)) for e in received]
            assert tops == [e.top_logprobs for e in wanted]


def grpc_request(prompt: Any, params: dict[str, Any]) -> generate_pb2.GenerateRequest:
    drawn = {"seed": 0} | {name: value for name, value in params.items() if name != "n"}
    if isinstance(prompt, str):
        asked: dict[str, Any] = {"text": prompt}
    else:
        asked = {"tokens": generate_pb2.TokenIds(token_ids=prompt)}
    return generate_pb2.GenerateRequest(
        **asked,
        max_tokens=12,
        num_samples=params.get("n", 1),
        sampling=sampling_pb2.SamplingParams(num_logprobs=3, **drawn),
    )
