"""The HTTP API over a token source that is computed by hand."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.app import MetricsText, make_http_app
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import FinishReason, TokenEvent
from milliways.wire.errors import (
    DeadlineError,
    ModelFaultError,
    OverloadedError,
    PoisonedRequestError,
    UnavailableError,
)
from tests.http_apps import CHAT, COMPLETIONS, body, chat_body, post, run, sse_data
from tests.ingresses import demo_model, make_ingress
from tests.sources import CountingSource, counted_events


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def usage(num_prompt: int, num_completion: int, num_cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def test_completion_has_openai_shape_and_exact_usage(model: ServedModel) -> None:
    answer = post(CountingSource(), model, COMPLETIONS, json=body(seed=5)).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "demo"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "101,102,103,",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == usage(2, 3)


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(model: ServedModel) -> None:
    prompts = {"prompt": [[7, 100], [7, 200]], "n": 2, "max_tokens": 2, "return_token_ids": True}
    answer = post(CountingSource(), model, COMPLETIONS, json=body(**prompts)).json()
    tokens = [(choice["index"], choice["token_ids"]) for choice in answer["choices"]]
    assert tokens == [(0, [101, 102]), (1, [102, 104]), (2, [201, 202]), (3, [202, 204])]
    assert answer["usage"] == usage(4, 8)


def test_stream_gives_the_text_of_the_whole_answer(model: ServedModel) -> None:
    fields = {"n": 2, "prompt": ["Welcome to", "The"], "echo": True}
    whole = post(CountingSource(), model, COMPLETIONS, json=body(**fields)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = post(CountingSource(), model, COMPLETIONS, json=body(**fields, **options))
    *chunks, last = sse_data(streamed)
    texts = ["", "", "", ""]
    for chunk in chunks:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert texts[0].startswith("Welcome to")
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_every_event_says_how_many_tokens_came_with_it(model: ServedModel) -> None:
    headers = {"x-milliways-event-ids": "1"}
    response = post(CountingSource(), model, COMPLETIONS, json=body(stream=True), headers=headers)
    ids = [line for line in response.text.split("\n") if line.startswith("id: ")]
    name = json.loads(response.text.split("data: ")[1].split("\n")[0])["id"].removeprefix("cmpl-")
    assert ids == [f"id: {name}/{n}/{model.fingerprint}" for n in (1, 2, 3)]


def test_chat_has_openai_shape(model: ServedModel) -> None:
    answer = post(CountingSource(), model, CHAT, json=chat_body()).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    last = model.encode("Welcome to")[-1]
    assert choice["message"]["content"] == f"{last + 1},{last + 2},{last + 3},"
    assert choice["finish_reason"] == "length"


def test_chat_stream_begins_with_the_role_and_ends_with_the_reason(model: ServedModel) -> None:
    fields = {"stream": True, "logprobs": True, "top_logprobs": 1}
    chunks = sse_data(post(CountingSource(), model, CHAT, json=chat_body(**fields)))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant", None, None]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]
    assert all(len(choice["logprobs"]["content"]) == 1 for choice in choices)
    (top,) = choices[0]["logprobs"]["content"][0]["top_logprobs"]
    assert top == {key: choices[0]["logprobs"]["content"][0][key] for key in top}


def test_chat_fills_the_context_by_default(model: ServedModel) -> None:
    source = CountingSource()
    fields = chat_body()
    del fields["max_tokens"]
    answer = post(source, model, CHAT, json=fields).json()
    room = model.config.sequence_len - answer["usage"]["prompt_tokens"]
    assert source.requests[0].max_tokens == room == answer["usage"]["completion_tokens"]


def test_completion_gives_16_tokens_by_default(model: ServedModel) -> None:
    answer = post(CountingSource(), model, COMPLETIONS, json={"model": "demo", "prompt": "A"})
    assert answer.json()["usage"]["completion_tokens"] == 16


def test_every_field_reaches_the_request(model: ServedModel) -> None:
    source = CountingSource()
    given = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 9,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 1.25,
        "seed": 77,
    }
    more = {"logit_bias": {"12": -3}, "stop": ["a", "b"], "ignore_eos": True, "logprobs": 4}
    post(source, model, COMPLETIONS, json=body(**given, **more, best_of=2, n=2))
    (request,) = source.requests
    assert {name: getattr(request.sampling, name) for name in given} == given
    assert request.sampling.logit_bias == {12: -3.0}
    assert request.sampling.num_logprobs == 4
    assert (request.stop, request.ignore_eos, request.num_samples) == (("a", "b"), True, 2)


def test_absent_seed_is_drawn_anew(model: ServedModel) -> None:
    source = CountingSource()
    for _ in range(2):
        post(source, model, COMPLETIONS, json=body(prompt=[[5], [5]]))
    assert len({request.sampling.seed for request in source.requests}) == 4


def test_harmless_fields_are_ignored(model: ServedModel) -> None:
    fields = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    neutral = {"suffix": None, "tools": [], "response_format": {"type": "text"}}
    response = post(CountingSource(), model, COMPLETIONS, json=body(**fields, **neutral))
    assert response.status_code == 200


def test_models_are_listed_and_found(model: ServedModel) -> None:
    async def ask(client: httpx.AsyncClient, _: Ingress) -> tuple[Any, Any]:
        listed, found = await client.get("/v1/models"), await client.get("/v1/models/demo")
        return listed.json(), found.json()

    listed, found = run(ask, CountingSource(), model)
    assert listed == {"object": "list", "data": [found]}
    assert (found["id"], found["object"]) == ("demo", "model")


ERRORS = [
    (InvalidRequestError("prompt", 5, "short"), 400),
    (OverloadedError("full", retry_after_s=2.5), 429),
    (UnavailableError("no router"), 503),
    (DeadlineError("too late"), 504),
    (PoisonedRequestError("twice"), 500),
    (ModelFaultError("nan"), 500),
    (RuntimeError("secret"), 500),
]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_token_is_an_http_error(
    model: ServedModel, error: Exception, status: int, stream: bool
) -> None:
    response = post(CountingSource(error=error), model, COMPLETIONS, json=body(stream=stream))
    assert response.status_code == status
    error_object = response.json()["error"]
    assert set(error_object) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    retry_after = {429: "3", 503: "1"}.get(status)
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: type(value).__name__)
def test_error_after_the_first_token_is_an_event(
    model: ServedModel, error: Exception, status: int
) -> None:
    source = CountingSource(error=error, num_before_error=2)

    async def ask(client: httpx.AsyncClient, _: Ingress) -> tuple[httpx.Response, str]:
        response = await client.post(COMPLETIONS, json=body(stream=True))
        return response, (await client.get("/metrics")).text

    response, metrics = run(ask, source, model)
    *chunks, last = sse_data(response)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["101,", "102,"]
    assert set(last) == {"error"}
    assert "secret" not in last["error"]["message"]
    counted = f'milliways_requests_total{{code="{status}",model="demo",surface="http"}} 1.0'
    assert counted in metrics


def test_nan_logits_are_an_error(model: ServedModel) -> None:
    def break_second(request: GenerationRequest) -> list[TokenEvent]:
        first, second, *_ = counted_events(request)
        return [first, replace(second, finish_reason=FinishReason.ERROR, token_id=-1, text="")]

    source = CountingSource(make_events=break_second)
    whole = post(source, model, COMPLETIONS, json=body())
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
    *_, last = sse_data(post(source, model, COMPLETIONS, json=body(stream=True)))
    assert "finite" in last["error"]["message"]


def test_requests_above_the_limit_are_refused_at_once(model: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(0))

    async def ask(client: httpx.AsyncClient, ingress: Ingress) -> None:
        first = [asyncio.create_task(client.post(COMPLETIONS, json=body())) for _ in range(2)]
        while source.num_running < 2:
            await asyncio.sleep(0)
        refused = await client.post(COMPLETIONS, json=body())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert source.gate is not None
        for _ in range(6):
            source.gate.release()
        assert [(await task).status_code for task in first] == [200, 200]

    run(ask, source, model, max_ongoing_requests=2)


def test_ready_probes_the_source_at_most_once_a_second(model: ServedModel) -> None:
    source = CountingSource(probe_error=UnavailableError("no router is available"))

    async def ask(client: httpx.AsyncClient, ingress: Ingress) -> list[httpx.Response]:
        assert (await client.get("/health")).status_code == 200
        return await asyncio.gather(*(client.get("/ready") for _ in range(5)))

    answers = run(ask, source, model)
    assert {answer.status_code for answer in answers} == {503}
    assert "no router is available" in answers[0].json()["error"]["message"]
    assert answers[0].headers["retry-after"] == "1"
    assert source.num_probes == 1
    source = CountingSource()
    assert {answer.status_code for answer in run(ask, source, model)} == {200}


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1", "abc-1"), ("a b\tc", "abc"), ("x" * 500, "x" * 128), ("é", None)],
)
def test_request_id_is_echoed_without_unfit_characters(
    model: ServedModel, given: str, kept: str | None
) -> None:
    headers = {"x-request-id": given.encode("latin-1")}

    async def ask(client: httpx.AsyncClient, _: Ingress) -> httpx.Response:
        return await client.get("/v1/nothing", headers=headers)

    echoed = run(ask, CountingSource(), model).headers["x-request-id"]
    assert echoed == kept if kept else len(echoed) == 32


def test_metrics_count_requests_and_tokens(model: ServedModel) -> None:
    async def ask(client: httpx.AsyncClient, _: Ingress) -> str:
        await client.post(COMPLETIONS, json=body(n=2))
        await client.post(COMPLETIONS, json=body(n=0))
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return response.text

    lines = run(ask, CountingSource(), model).splitlines()
    assert 'milliways_requests_total{code="200",model="demo",surface="http"} 1.0' in lines
    assert 'milliways_requests_total{code="400",model="",surface="http"} 1.0' in lines
    assert 'milliways_tokens_total{kind="prompt"} 2.0' in lines
    assert 'milliways_tokens_total{kind="completion"} 6.0' in lines
    assert "milliways_time_to_first_token_seconds_count 1.0" in lines
    assert "milliways_time_per_output_token_seconds_count 2.0" in lines


def test_proxy_may_name_requests_and_workers_add_metrics(model: ServedModel) -> None:
    async def more() -> str:
        return "others_total 5\n"

    async def broken() -> str:
        raise RuntimeError("they are gone")

    async def ask(worker_metrics: MetricsText) -> httpx.Response:
        ingress = make_ingress(CountingSource(), model)
        app = make_http_app(ingress, worker_metrics, echoes_request_id=False)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/metrics")

    answer = asyncio.run(ask(more))
    assert "milliways_ongoing_requests 0.0\nothers_total 5\n" in answer.text
    assert "x-request-id" not in answer.headers
    assert "milliways_ongoing_requests 0.0" in asyncio.run(ask(broken)).text


@pytest.mark.parametrize("stream", [False, True])
def test_response_names_the_fields_that_were_ignored(model: ServedModel, stream: bool) -> None:
    fields = {"no_such": 1, "user": "me", "stream": stream}
    response = post(CountingSource(), model, COMPLETIONS, json=body(**fields))
    assert response.headers["x-milliways-ignored-fields"] == "no_such"
    plain = post(CountingSource(), model, COMPLETIONS, json=body(stream=stream))
    assert "x-milliways-ignored-fields" not in plain.headers


def test_unknown_fields_are_refused_where_the_settings_say_so(model: ServedModel) -> None:
    async def ask(client: httpx.AsyncClient, _: Ingress) -> httpx.Response:
        return await client.post(COMPLETIONS, json=body(no_such=1))

    response = run(ask, CountingSource(), model, unknown_fields="refuse")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "no_such")


@pytest.mark.parametrize("given", ["bench-7", "", "0" * 32])
def test_body_header_and_routers_have_one_id(model: ServedModel, given: str) -> None:
    source = CountingSource()
    headers = {"x-request-id": given} if given else {}
    responses = [
        post(source, model, path, json=ask, headers=headers)
        for path, ask in ((COMPLETIONS, body()), (CHAT, chat_body()))
    ]
    for response, prefix, sent in zip(
        responses, ("cmpl", "chatcmpl"), source.request_ids, strict=True
    ):
        name = response.headers["x-request-id"]
        assert name == given or (not given and len(name) == 32)
        assert response.json()["id"] == f"{prefix}-{name}"
        assert sent.startswith(f"{name}-")
        # Also where the name holds no time.
        assert abs(response.json()["created"] - time.time()) < 60
    # Requests of one name are different requests.
    first, second = source.requests
    assert first.sampling.seed != second.sampling.seed


def test_stream_that_is_resumed_keeps_its_id(model: ServedModel) -> None:
    headers = {"x-milliways-event-ids": "json"}
    whole = post(CountingSource(), model, COMPLETIONS, json=body(stream=True), headers=headers)
    first = sse_data(whole)[0]
    again = headers | {"last-event-id": first["milliways_cursor"]}
    rest = post(CountingSource(), model, COMPLETIONS, json=body(stream=True), headers=again)
    assert rest.headers["x-request-id"] == whole.headers["x-request-id"]
    assert sse_data(rest) == sse_data(whole)[1:]
