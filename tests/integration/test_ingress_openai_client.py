"""OpenAI's own client on the demo model: exactly the tokens of `LocalEngine`."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from grpc import aio

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.served_model import ServedModel
from milliways.router.requests.sequence import TokenEvent
from milliways.v1 import generate_pb2, generate_pb2_grpc, sampling_pb2
from tests.demo_requests import PARAMS, PROMPT, PROMPTS, check_choice, request_of
from tests.ingresses import demo_engine, demo_model, local_source, make_ingress, served
from tests.sources import LocalSource


@dataclass(frozen=True)
class Served:
    client: openai.OpenAI
    ingress: Ingress
    source: LocalSource

    @property
    def model(self) -> ServedModel:
        return self.ingress.model


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with local_source() as source:
        ingress = make_ingress(source, demo_model())
        with served(lambda: make_http_app(ingress)) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            with client:
                yield Served(client, ingress, source)


@pytest.fixture(scope="module")
def alone(demo: Served) -> dict[tuple[int, int], list[list[TokenEvent]]]:
    """Each request's events when it runs alone, by sample."""
    engine = demo_engine()
    results: dict[tuple[int, int], list[list[TokenEvent]]] = {}
    for i, prompt in enumerate(PROMPTS):
        for j, params in enumerate(PARAMS):
            request = request_of(demo.model, prompt, params)
            samples: list[list[TokenEvent]] = [[] for _ in range(request.num_samples)]
            for event in engine.generate(request):
                samples[event.sample_index].append(event)
            results[i, j] = samples
    return results


CASES = [(i, j) for i in range(len(PROMPTS)) for j in range(len(PARAMS))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_completion_has_the_engines_tokens_and_logprobs(
    demo: Served, alone: dict[Any, Any], case: tuple[int, int], stream: bool
) -> None:
    params = PARAMS[case[1]] | {"max_tokens": 12, "logprobs": 3}
    more = {"return_token_ids": True}
    answer = demo.client.completions.create(
        model="demo", prompt=PROMPTS[case[0]], stream=stream, extra_body=more, **params
    )
    choices: dict[int, list[Any]] = {}
    for piece in answer if stream else [answer]:
        for choice in piece.choices:
            choices.setdefault(choice.index, []).append(choice)
    samples = alone[case]
    assert sorted(choices) == list(range(len(samples)))
    for index, events in enumerate(samples):
        check_choice(choices[index], events, demo.model)


def test_concurrent_requests_get_their_tokens_as_if_alone(
    demo: Served, alone: dict[Any, Any]
) -> None:
    async def ask(client: openai.AsyncOpenAI, case: tuple[int, int]) -> list[str]:
        params = PARAMS[case[1]] | {"max_tokens": 12}
        answer = await client.completions.create(model="demo", prompt=PROMPTS[case[0]], **params)
        return [choice.text for choice in answer.choices]

    async def main() -> list[list[str]]:
        url = demo.client.base_url
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, case) for case in CASES))

    wanted = [["".join(e.text for e in events) for events in alone[case]] for case in CASES]
    assert asyncio.run(main()) == wanted


def test_several_prompts_at_once_get_their_tokens_as_if_alone(
    demo: Served, alone: dict[Any, Any]
) -> None:
    params = PARAMS[2] | {"max_tokens": 12, "echo": True}
    answer = demo.client.completions.create(model="demo", prompt=PROMPTS[:2], **params)
    wanted = [
        PROMPTS[i] + "".join(event.text for event in events)
        for i in (0, 1)
        for events in alone[i, 2]
    ]
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(demo.model.encode(p)) for p in PROMPTS[:2])
    num_tokens = sum(len(events) for i in (0, 1) for events in alone[i, 2])
    assert answer.usage.completion_tokens == num_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_chat_of_one_message_is_a_completion(
    demo: Served, alone: dict[Any, Any], stream: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = demo.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=3,
        stream=stream,
        **PARAMS[1],
        **options,
    )
    events = alone[0, 1]
    pieces = [piece for piece in (answer if stream else [answer])]
    choices = [piece.choices[0] for piece in pieces if piece.choices]
    parts = [choice.delta if stream else choice.message for choice in choices]
    assert "".join(part.content or "" for part in parts) == "".join(e.text for e in events[0])
    content = [token for choice in choices for token in choice.logprobs.content]
    assert [token.logprob for token in content] == [event.logprob for event in events[0]]
    assert [len(token.top_logprobs) for token in content] == [3] * len(content)
    assert pieces[-1].usage.completion_tokens == len(events[0])


def test_grpc_gives_the_same_tokens_and_logprobs(demo: Served, alone: dict[Any, Any]) -> None:
    params = dict(PARAMS[1])
    request = generate_pb2.GenerateRequest(
        text=PROMPT,
        max_tokens=12,
        sampling=sampling_pb2.SamplingParams(num_logprobs=3, **params),
    )

    async def main() -> list[Any]:
        server = IngressGrpcServer(make_ingress(demo.source, demo.model))
        await server.start()
        try:
            async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                stub = generate_pb2_grpc.GenerateServiceStub(channel)
                call = stub.Generate(request)
                return [event async for response in call for event in response.events]
        finally:
            await server.stop()

    received = [
        (e.token_id, e.text, e.logprob, tuple(zip(e.top_token_ids, e.top_logprobs, strict=True)))
        for e in asyncio.run(main())
    ]
    wanted = [(e.token_id, e.text, e.logprob, e.top_logprobs) for e in alone[0, 1][0]]
    assert received == wanted


def test_client_raises_its_own_errors(demo: Served) -> None:
    create = demo.client.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="demo", prompt=PROMPT, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-9", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as long:
        create(model="demo", prompt=[7] * 513)
    assert long.value.code == "context_length_exceeded"
    assert [model.id for model in demo.client.models.list()] == ["demo"]
    assert demo.client.models.retrieve("demo").id == "demo"


def test_stream_that_is_closed_early_leaves_the_engine(demo: Served) -> None:
    stream = demo.client.completions.create(
        model="demo", prompt="A", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline_s = time.monotonic() + 10
    while demo.source.num_running or demo.ingress.num_ongoing:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
