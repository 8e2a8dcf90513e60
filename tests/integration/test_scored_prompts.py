"""Scored prompts: `echo` with `logprobs` over HTTP, and `prompt_logprobs` over gRPC."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc import aio

from milliways.api.resuming import GenerateClient
from milliways.cluster.cli import main as cli
from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.openai.requests import completion_ask
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.sampling_params import SampledToken, SamplingParams
from milliways.router.engine import LocalEngine
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import PromptScores, TokenEvent
from milliways.v1 import generate_pb2, generate_pb2_grpc, sampling_pb2
from milliways.wire.errors import ModelFaultError
from tests import fake_routers
from tests.demo_requests import PROMPT
from tests.fake_routers import FakeRouter, Fault, InOrder
from tests.http_apps import COMPLETIONS, body, post, run, sse_data
from tests.ingresses import demo_engine, demo_model, local_source, make_ingress, served
from tests.sources import CountingSource, LocalSource, counted_events, counted_scores

ID = "019f00000000aaaaaaaaaaaaaaaaaaaa"
TOKENS = [7, 100, 5, 60, 700]
SCORED: dict[str, Any] = {"prompt": TOKENS, "logprobs": 1, "echo": True}


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def expected_logprobs(model: ServedModel, num_tokens: int) -> dict[str, Any]:
    """The counting source's scores for TOKENS, written by hand."""
    name = model.token_name
    drawn = [TOKENS[-1] + 1 + i for i in range(num_tokens)]
    lengths = [len(piece) for piece in model.echo_pieces(tuple(TOKENS))]
    lengths += [len(f"{token},") for token in drawn]
    return {
        "tokens": [name(token) for token in TOKENS + drawn],
        "token_logprobs": [None, *(-t / 2 for t in TOKENS[1:]), *(-float(t) for t in drawn)],
        "top_logprobs": [
            None,
            *({name(t + 1): -t / 4} for t in TOKENS[1:]),
            *({name(t): -float(t)} for t in drawn),
        ],
        "text_offset": [sum(lengths[:i]) for i in range(len(lengths))],
    }


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_logprobs_cover_the_prompt_and_what_follows(model: ServedModel, num_tokens: int) -> None:
    fields = SCORED | {"max_tokens": num_tokens}
    answer = post(CountingSource(), model, COMPLETIONS, json=body(**fields)).json()
    (choice,) = answer["choices"]
    drawn = "".join(f"{TOKENS[-1] + 1 + i}," for i in range(num_tokens))
    assert choice == {
        "index": 0,
        "text": model.echo(tuple(TOKENS)) + drawn,
        "logprobs": expected_logprobs(model, num_tokens),
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": num_tokens,
        "total_tokens": 5 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("prompt", ["Welcome to", ["Welcome to", "The"], [TOKENS, [9], [3, 4]]])
def test_stream_joins_to_the_whole_answer(model: ServedModel, num_tokens: int, prompt: Any) -> None:
    fields = SCORED | {"max_tokens": num_tokens, "n": 2, "prompt": prompt}
    whole = post(CountingSource(), model, COMPLETIONS, json=body(**fields)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = sse_data(
        post(CountingSource(), model, COMPLETIONS, json=body(**fields, **options))
    )
    assert last["usage"] == whole["usage"]
    assert joined(chunks) == joined([whole])


def joined(chunks: list[dict[str, Any]]) -> list[list[Any]]:
    """Text, log-probabilities and last finish reason of each choice."""
    choices: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            made = choices.setdefault(choice["index"], ["", {}, None])
            made[0] += choice["text"]
            for name, values in choice["logprobs"].items():
                made[1].setdefault(name, []).extend(values)
            made[2] = choice["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def test_prompt_is_scored_once_for_all_its_choices(model: ServedModel) -> None:
    source = CountingSource()
    fields = SCORED | {"n": 3, "prompt": [TOKENS, [3, 4]], "logprobs": 0}
    answer = post(source, model, COMPLETIONS, json=body(**fields)).json()
    assert [request.prompt_logprobs for request in source.requests] == [0, 0]
    heads = [choice["logprobs"]["token_logprobs"][:2] for choice in answer["choices"]]
    assert heads == [[None, -50.0]] * 3 + [[None, -2.0]] * 3
    assert answer["choices"][0]["logprobs"]["top_logprobs"][:2] == [None, {}]


@pytest.mark.parametrize(
    "fields", [{"echo": True}, {"logprobs": 3}, {"echo": False, "logprobs": 3}]
)
def test_prompt_is_scored_only_where_both_are_asked_for(
    model: ServedModel, fields: dict[str, Any]
) -> None:
    source = CountingSource()
    post(source, model, COMPLETIONS, json=body(**fields))
    assert source.requests[0].prompt_logprobs is None


def test_more_log_probabilities_than_an_answer_may_have_are_refused(model: ServedModel) -> None:
    fields = {"prompt": [[7] * 512] * 2, "n": 64, "echo": True, "max_tokens": 0}
    largest = json.dumps(body(logprobs=15, **fields)).encode()
    assert completion_ask(largest, model, ID).num_samples == 64
    source = CountingSource()
    answer = post(source, model, COMPLETIONS, json=body(logprobs=16, **fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], source.requests) == (400, "logprobs", [])
    assert error["message"].startswith("logprobs = 1114112 of the prompts: ")
    assert "1048576" in error["message"]


def test_scored_prompts_are_counted_among_the_tokens(model: ServedModel) -> None:
    async def scenario(client: httpx.AsyncClient, ingress: Ingress) -> None:
        await client.post(COMPLETIONS, json=body(**SCORED | {"max_tokens": 0, "n": 3}))
        assert 'milliways_tokens_total{kind="prompt"} 5.0' in ingress.metrics.text()

    run(scenario, CountingSource(), model)


def test_error_while_a_prompt_is_scored_is_an_error_of_http(model: ServedModel) -> None:
    source = CountingSource(error=ModelFaultError("nan"), num_before_error=1)
    fields = SCORED | {"stream": True, "max_tokens": 0}
    assert post(source, model, COMPLETIONS, json=body(**fields)).status_code == 500


def sse_events(text: str) -> list[tuple[str, str]]:
    events: list[tuple[str, str]] = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((fields.get("id", ""), fields["data"]))
    return events


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("more", [{}, {"n": 2}, {"prompt": [TOKENS, [3, 4]], "n": 2}])
def test_stream_goes_on_behind_any_event(
    model: ServedModel, num_tokens: int, more: dict[str, Any]
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    ask = body(**(SCORED | options | {"max_tokens": num_tokens} | more))
    source = CountingSource()

    async def scenario(client: httpx.AsyncClient, _: Ingress) -> None:
        with_ids = {"X-Milliways-Event-Ids": "1"}
        whole = sse_events((await client.post(COMPLETIONS, json=ask, headers=with_ids)).text)
        for num_received in range(1, len(whole)):
            headers = {"Last-Event-ID": whole[num_received - 1][0]}
            rest = await client.post(COMPLETIONS, json=ask, headers=headers)
            events = whole[:num_received] + sse_events(rest.text)
            assert sorted(events) == sorted(whole)

    run(scenario, source, model)
    # A client that has a token of each choice has the scores: the prompt is not scored again.
    assert num_tokens == 0 or source.nums_scored[-1] > 0


async def grpc_told(
    address: str, request: generate_pb2.GenerateRequest
) -> list[generate_pb2.GenerateResponse]:
    async with aio.insecure_channel(address) as channel:
        call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=60)
        return [response async for response in call]


def over_grpc(source: Any, model: ServedModel, request: Any) -> list[Any]:
    async def main() -> list[Any]:
        server = IngressGrpcServer(make_ingress(source, model))
        await server.start()
        try:
            return await grpc_told(f"127.0.0.1:{server.port}", request)
        finally:
            await server.stop()

    return asyncio.run(main())


def scores_of(responses: list[Any]) -> list[tuple[int, int, float, Any]]:
    return [
        (
            s.position,
            s.token_id,
            s.logprob,
            tuple(zip(s.top_token_ids, s.top_logprobs, strict=True)),
        )
        for response in responses
        for s in response.prompt_logprobs
    ]


def wanted_scores(scores: list[SampledToken]) -> list[tuple[int, int, float, Any]]:
    return [(i, s.token_id, s.logprob, s.top_logprobs) for i, s in enumerate(scores, 1)]


def grpc_request(**fields: Any) -> generate_pb2.GenerateRequest:
    tokens = {} if "text" in fields else {"tokens": generate_pb2.TokenIds(token_ids=TOKENS)}
    return generate_pb2.GenerateRequest(
        **({"max_tokens": 2, "prompt_logprobs": 1} | tokens | fields)
    )


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_grpc_gives_scores_in_pieces_before_any_token(model: ServedModel, num_tokens: int) -> None:
    responses = over_grpc(
        CountingSource(), model, grpc_request(max_tokens=num_tokens, num_samples=2)
    )
    kinds = [(len(r.prompt_logprobs), len(r.events), r.HasField("usage")) for r in responses]
    assert kinds == [(2, 0, False)] * 2 + [(0, 1, False)] * 2 * num_tokens + [(0, 0, True)]
    assert [r.HasField("started") for r in responses] == [True] + [False] * (len(kinds) - 1)
    request = GenerationRequest(prompt_ids=tuple(TOKENS), max_tokens=1, prompt_logprobs=1)
    assert scores_of(responses) == wanted_scores(counted_scores(request))
    assert responses[-1].usage.num_completion_tokens == 2 * num_tokens


@pytest.mark.parametrize("num_scored", range(5))
def test_grpc_goes_on_behind_any_score(model: ServedModel, num_scored: int) -> None:
    resume = generate_pb2.Resume(request_id=ID, num_prompt_logprobs=num_scored)
    responses = over_grpc(CountingSource(), model, grpc_request(resume=resume))
    positions = [score.position for r in responses for score in r.prompt_logprobs]
    assert positions == list(range(num_scored + 1, 5))
    assert sum(len(r.events) for r in responses) == 2


@pytest.mark.parametrize(
    ("num_scored", "received", "fields"),
    [
        (5, [], {}),
        (1, [], {"prompt_logprobs": None}),
        (3, [generate_pb2.ReceivedTokens(num_tokens=1)], {}),
        (0, [generate_pb2.ReceivedTokens(num_tokens=1, token_ids=[701])], {}),
    ],
)
def test_grpc_refuses_a_count_that_cannot_be(
    model: ServedModel, num_scored: int, received: list[Any], fields: dict[str, Any]
) -> None:
    source = CountingSource()
    resume = generate_pb2.Resume(request_id=ID, num_prompt_logprobs=num_scored, received=received)
    with pytest.raises(aio.AioRpcError) as caught:
        over_grpc(source, model, grpc_request(resume=resume, **fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    metadata = dict(caught.value.trailing_metadata() or ())
    assert metadata["milliways-field"] == "resume.num_prompt_logprobs"
    assert metadata["milliways-value"] == str(num_scored)
    assert source.requests == []


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_client_of_servers_that_die_gets_every_score_once(
    model: ServedModel, num_tokens: int
) -> None:
    request = grpc_request(max_tokens=num_tokens)

    async def told(num_received: int) -> list[Any]:
        """Runs with a server that dies after a number of responses."""
        source = CountingSource(gate=asyncio.Semaphore(1))
        assert source.gate is not None
        ingresses = [make_ingress(source, model) for _ in range(2)]
        servers = [IngressGrpcServer(ingress) for ingress in ingresses]
        for server in servers:
            await server.start()
        addresses = [f"127.0.0.1:{server.port}" for server in servers]
        responses: list[Any] = []
        async with (
            GenerateClient(addresses) as client,
            aclosing(client.generate(request, timeout_s=20)) as stream,
        ):
            async for response in stream:
                responses.append(response)
                serving = [i for i, one in enumerate(ingresses) if one.num_ongoing]
                if len(responses) == num_received and serving:
                    await servers[serving[0]].stop()
                source.gate.release()
        for server in servers:
            await server.stop()
        return responses

    whole = asyncio.run(told(0))
    for num_received in range(1, len(whole)):
        responses = asyncio.run(told(num_received))
        assert scores_of(responses) == scores_of(whole)
        events = [[e.token_id for r in some for e in r.events] for some in (responses, whole)]
        assert events[0] == events[1]


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("events_each", [1, 2, 3])
def test_routers_that_break_off_anywhere_give_every_score_once(
    num_tokens: int, events_each: int
) -> None:
    request = GenerationRequest(
        prompt_ids=tuple(TOKENS), max_tokens=num_tokens, prompt_logprobs=1, num_samples=2
    )

    async def main(num_first: int, num_second: int) -> list[Any]:
        routers = [
            FakeRouter(Fault.UNAVAILABLE, num_scores_before_fault=n, events_each=events_each)
            for n in (num_first, num_second)
        ]
        async with fake_routers.running(*routers, FakeRouter(events_each=2)) as directory:
            source = RouterSource(directory, random=InOrder())
            try:
                return [event async for event in deadline_stream(source, request)]
            finally:
                await source.close()

    for num_first in range(4):
        events = asyncio.run(main(num_first, (num_first * 7 + 3) % 5))
        scores = [token for e in events if isinstance(e, PromptScores) for token in e.tokens]
        assert scores == counted_scores(request)
        tokens = [e for e in events if isinstance(e, TokenEvent)]
        assert tokens == counted_events(request)


async def deadline_stream(source: RouterSource, request: GenerationRequest) -> Any:
    deadline_s = asyncio.get_running_loop().time() + 20
    stream = source.generate(request, request_id="r", deadline_s=deadline_s)
    async with aclosing(stream) as events:
        async for event in events:
            yield event


# With the demo model: the engine's log-probabilities, to the bit.


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return demo_engine()


@pytest.fixture(scope="module")
def source() -> Iterator[LocalSource]:
    with local_source() as made:
        yield made


def alone(engine: LocalEngine, prompt_ids: tuple[int, ...]) -> list[SampledToken]:
    request = GenerationRequest(
        prompt_ids=prompt_ids, max_tokens=0, prompt_logprobs=3, sampling=SamplingParams()
    )
    return [token for e in engine.generate(request) for token in e.tokens]  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_scores_as_a_harness_does(
    model: ServedModel, source: LocalSource, engine: LocalEngine, stream: bool
) -> None:
    texts = [PROMPT + " 42.", "Welcome to"]
    prompts = [list(model.encode(text)) for text in texts]
    ingress = make_ingress(source, model)
    with (
        served(lambda: make_http_app(ingress)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        for max_tokens in (0, 1):
            answer: Any = client.completions.create(
                model="demo",
                prompt=prompts,
                max_tokens=max_tokens,
                temperature=0,
                logprobs=3,
                echo=True,
                stream=stream,
            )
            pieces = [c for p in (answer if stream else [answer]) for c in p.choices]
            check_harness(pieces, prompts, max_tokens, model, engine)


def check_harness(
    pieces: list[Any],
    prompts: list[list[int]],
    max_tokens: int,
    model: ServedModel,
    engine: LocalEngine,
) -> None:
    for index, prompt_ids in enumerate(prompts):
        (choice,) = [piece for piece in pieces if piece.index == index]
        wanted = alone(engine, tuple(prompt_ids))
        end = len(prompt_ids)
        assert len(choice.logprobs.tokens) == end + max_tokens
        assert choice.logprobs.tokens[:end] == [model.token_name(i) for i in prompt_ids]
        scores = choice.logprobs.token_logprobs[:end]
        assert scores == [None, *(score.logprob for score in wanted)]
        tops = [
            {model.token_name(i): logprob for i, logprob in reversed(score.top_logprobs)}
            for score in wanted
        ]
        assert choice.logprobs.top_logprobs[:end] == [None, *tops]
        text = model.echo(tuple(prompt_ids))
        assert choice.text.startswith(text)
        starts = choice.logprobs.text_offset[: end + 1] + [len(text)] * (1 - max_tokens)
        cut = [text[a:b] for a, b in pairwise(starts)]
        assert cut == model.echo_pieces(tuple(prompt_ids))


def test_generate_command_echoes_with_logprobs(
    model: ServedModel, engine: LocalEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = alone(engine, model.encode(PROMPT))
    for num_tokens in ("0", "3"):
        options = ["--echo", "--logprobs", "3", "--max-tokens", num_tokens, "--temperature", "0"]
        assert cli.main(["generate", "--json", PROMPT, *options]) == 0
        told = json.loads(capsys.readouterr().out)
        (choice,) = told["choices"]
        assert choice["text"].startswith(PROMPT)
        end = len(wanted) + 1
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[:end] == [None, *(score.logprob for score in wanted)]
        assert len(scores) == end + int(num_tokens)
        assert {len(column) for column in choice["logprobs"].values()} == {len(scores)}
        assert choice["finish_reason"] == "length"
        assert told["usage"]["completion_tokens"] == int(num_tokens)
    assert cli.main(["generate", "--echo", PROMPT, "--max-tokens", "2", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT)
    assert cli.main(["generate", PROMPT, "--max-tokens", "0"]) != 0
    assert "max_tokens" in capsys.readouterr().err


def test_grpc_gives_the_engines_scores(
    model: ServedModel, source: LocalSource, engine: LocalEngine
) -> None:
    sampling = sampling_pb2.SamplingParams(temperature=0)
    request = grpc_request(text=PROMPT, prompt_logprobs=3, sampling=sampling, max_tokens=4)
    responses = over_grpc(source, model, request)
    assert scores_of(responses) == wanted_scores(alone(engine, model.encode(PROMPT)))
    assert sum(len(response.events) for response in responses) > 0
