"""The gRPC API over a token source that is computed by hand."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.public_grpc.service import SERVICE
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError
from milliways.v1 import generate_pb2, generate_pb2_grpc, router_pb2, sampling_pb2
from milliways.wire.errors import (
    DeadlineError,
    ModelFaultError,
    OverloadedError,
    PoisonedRequestError,
    UnavailableError,
)
from tests.ingresses import demo_model, make_ingress
from tests.sources import CountingSource

MAX_MESSAGE_BYTES = 64 << 10
Scenario = Callable[[aio.Channel, Ingress], Awaitable[Any]]


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def run(scenario: Scenario, source: CountingSource, model: ServedModel, **settings: int) -> Any:
    """Runs a scenario against a new server; no request may run after it."""

    async def main() -> Any:
        limits = {"max_body_bytes": MAX_MESSAGE_BYTES} | settings
        ingress = make_ingress(source, model, **limits)
        server = IngressGrpcServer(ingress)
        await server.start()
        try:
            async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                result = await scenario(channel, ingress)
                async with asyncio.timeout(5):
                    while ingress.num_ongoing or source.num_running:
                        await asyncio.sleep(0.005)
                return result
        finally:
            await server.stop()

    return asyncio.run(main())


def request_for(**fields: Any) -> generate_pb2.GenerateRequest:
    tokens = generate_pb2.TokenIds(token_ids=fields.pop("tokens", [7, 100]))
    prompt = {} if "text" in fields else {"tokens": tokens}
    return generate_pb2.GenerateRequest(**({"max_tokens": 3} | prompt | fields))


async def generate(
    channel: aio.Channel, request: generate_pb2.GenerateRequest, **options: Any
) -> list[generate_pb2.GenerateResponse]:
    stub = generate_pb2_grpc.GenerateServiceStub(channel)
    return [response async for response in stub.Generate(request, **options)]


def ask(
    source: CountingSource, served: ServedModel, /, **fields: Any
) -> list[generate_pb2.GenerateResponse]:
    request = request_for(**fields)
    return run(lambda channel, _: generate(channel, request), source, served)


def refusal(source: CountingSource, served: ServedModel, /, **fields: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        ask(source, served, **fields)
    return caught.value


def metadata_of(error: aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata() or ())


def test_tokens_stream_and_usage_ends_them(model: ServedModel) -> None:
    responses = ask(CountingSource(), model, num_samples=2, **sampling(seed=9))
    first, last = responses[0], responses[-1]
    assert first.HasField("started") and not any(r.HasField("started") for r in responses[1:])
    assert (first.started.model, first.started.seed) == ("demo", 9)
    assert len(first.started.request_id) == 32
    assert first.started.system_fingerprint == model.fingerprint
    events = [event for response in responses for event in response.events]
    received = [(event.sample_index, event.index, event.token_id) for event in events]
    assert received == [
        (0, 0, 101),
        (1, 0, 102),
        (0, 1, 102),
        (1, 1, 104),
        (0, 2, 103),
        (1, 2, 106),
    ]
    assert [event.text for event in events[:2]] == ["101,", "102,"]
    length = router_pb2.FINISH_REASON_LENGTH
    assert [event.finish_reason for event in events] == [0, 0, 0, 0, length, length]
    assert (last.usage.num_prompt_tokens, last.usage.num_completion_tokens) == (2, 6)


def test_every_field_reaches_the_request(model: ServedModel) -> None:
    source = CountingSource()
    given = {
        "temperature": 0.1,
        "top_p": 0.9,
        "top_k": 9,
        "min_p": 0.2,
        "repetition_penalty": 0.01,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.25,
        "num_logprobs": 4,
    }
    sampling = sampling_pb2.SamplingParams(**given, logit_bias={12: -3.0}, seed=0)
    ask(source, model, sampling=sampling, stop=["a", "b"], ignore_eos=True, num_samples=2)
    (request,) = source.requests
    # Not 0.10000000149011612: rounding to float32 must not cross a limit.
    assert {name: getattr(request.sampling, name) for name in given} == given
    assert (request.sampling.logit_bias, request.sampling.seed) == ({12: -3.0}, 0)
    assert (request.stop, request.ignore_eos, request.num_samples) == (("a", "b"), True, 2)


def test_defaults_are_those_of_completions(model: ServedModel) -> None:
    source = CountingSource()

    async def scenario(channel: aio.Channel, _: Ingress) -> Any:
        request = generate_pb2.GenerateRequest(text="Welcome to", echo=True)
        return [await generate(channel, request) for _ in range(2)]

    first, second = run(scenario, source, model)
    assert first[0].started.echo == "Welcome to"
    assert source.requests[0].prompt_ids == model.encode("Welcome to")
    assert source.requests[0].max_tokens == 16
    assert source.requests[0].sampling.temperature == 1.0
    assert first[0].started.seed != second[0].started.seed


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": sampling_pb2.SamplingParams(**fields)}


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"tokens": []}),
        ("prompt", {"text": ""}),
        ("prompt", {"tokens": [7] * 513}),
        ("prompt token", {"tokens": [1280]}),
        ("prompt token", {"tokens": [2**32 - 1], "echo": True}),
        ("max_tokens", {"max_tokens": 0}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": 2**32 - 1, "max_tokens": 0}),
        ("num_samples", {"num_samples": 65}),
        ("stop", {"stop": [""]}),
        ("stop", {"stop": ["x"] * 17}),
        ("min_tokens", {"rules": {"min_tokens": 2**31}}),
        ("temperature", sampling(temperature=-1)),
        ("temperature", sampling(temperature=float("nan"))),
        ("top_p", sampling(top_p=-0.1)),
        ("stop_token_ids", {"rules": {"stop_token_ids": [1280]}}),
        ("bad_words", {"bad_words": [""]}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
        ("priority", {"priority": 1}),
        ("top_k", sampling(top_k=2**32 - 1)),
        ("repetition_penalty", sampling(repetition_penalty=0)),
        ("logit_bias", sampling(logit_bias={1280: 1})),
        ("num_logprobs", sampling(num_logprobs=21)),
    ],
)
def test_bad_field_is_refused_by_name(
    model: ServedModel, field: str, fields: dict[str, Any]
) -> None:
    source = CountingSource()
    error = refusal(source, model, **fields)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert metadata_of(error)["milliways-field"] == field
    assert metadata_of(error)["milliways-limit"]
    assert (error.details() or "").startswith(f"{field} = ")
    assert source.requests == []


def test_unknown_model_is_not_found(model: ServedModel) -> None:
    error = refusal(CountingSource(), model, model="other")
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "demo" in (error.details() or "")


@pytest.mark.parametrize("num_before_error", [0, 2])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OverloadedError("full", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (UnavailableError("no router"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineError("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (PoisonedRequestError("twice"), grpc.StatusCode.ABORTED),
        (ModelFaultError("nan"), grpc.StatusCode.INTERNAL),
        (InvalidRequestError("stop", 1, "2"), grpc.StatusCode.INVALID_ARGUMENT),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_of_the_source_has_its_canonical_code(
    model: ServedModel, error: Exception, code: grpc.StatusCode, num_before_error: int
) -> None:
    source = CountingSource(error=error, num_before_error=num_before_error)
    refused = refusal(source, model)
    assert refused.code() is code
    assert "secret" not in (refused.details() or "")
    retry_after_ms = {OverloadedError: "2500", UnavailableError: "1000"}.get(type(error))
    assert metadata_of(refused).get("milliways-retry-after-ms") == retry_after_ms


def test_requests_above_the_limit_are_refused_at_once(model: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(0))

    async def scenario(channel: aio.Channel, ingress: Ingress) -> None:
        first = asyncio.create_task(generate(channel, request_for()))
        while source.num_running < 1:
            await asyncio.sleep(0.005)
        with pytest.raises(aio.AioRpcError) as caught:
            await generate(channel, request_for())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert source.gate is not None
        for _ in range(3):
            source.gate.release()
        assert len(await first) == 4

    run(scenario, source, model, max_ongoing_requests=1)


def test_deadline_of_the_call_is_that_of_the_request(model: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(0))

    async def scenario(channel: aio.Channel, ingress: Ingress) -> None:
        with pytest.raises(aio.AioRpcError) as caught:
            await generate(channel, request_for(), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(scenario, source, model)
    assert source.deadlines_s[0] < time.monotonic()


def test_cancelling_frees_the_request(model: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(1))

    async def scenario(channel: aio.Channel, ingress: Ingress) -> None:
        call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request_for())
        await call.read()
        call.cancel()

    run(scenario, source, model)
    assert source.num_closed_early == 1


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Detokenize"])
def test_malformed_message_is_refused_and_the_server_still_answers(
    model: ServedModel, method: str
) -> None:
    async def scenario(channel: aio.Channel, ingress: Ingress) -> None:
        path = f"/{SERVICE}/{method}"
        for raw in (b"\xff" * 20, b"\x0a\xff", b"\x08"):
            with pytest.raises(aio.AioRpcError) as caught:
                if method == "Generate":
                    call = channel.unary_stream(path, lambda raw: raw, lambda raw: raw)(raw)
                    assert [piece async for piece in call] == []
                else:
                    await channel.unary_unary(path, lambda raw: raw, lambda raw: raw)(raw)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert metadata_of(caught.value)["milliways-field"] == "request"
        assert len(await generate(channel, request_for())) == 4

    run(scenario, CountingSource(), model)


def test_giant_message_is_refused(model: ServedModel) -> None:
    error = refusal(CountingSource(), model, text="x" * MAX_MESSAGE_BYTES)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unknown_method_is_unimplemented(model: ServedModel) -> None:
    async def scenario(channel: aio.Channel, ingress: Ingress) -> None:
        with pytest.raises(aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{SERVICE}/Nothing", lambda raw: raw, lambda raw: raw)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    run(scenario, CountingSource(), model)


def test_text_is_tokenised_and_detokenised(model: ServedModel) -> None:
    text = "The answer to life"

    async def scenario(channel: aio.Channel, ingress: Ingress) -> None:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        tokens = await stub.Tokenize(generate_pb2.TokenizeRequest(text=text))
        assert tuple(tokens.token_ids) == model.encode(text)
        request = generate_pb2.DetokenizeRequest(token_ids=tokens.token_ids, model="demo")
        assert (await stub.Detokenize(request)).text == text
        for bad in (
            stub.Detokenize(generate_pb2.DetokenizeRequest(token_ids=[1280])),
            stub.Tokenize(generate_pb2.TokenizeRequest(text=text, model="x")),
        ):
            with pytest.raises(aio.AioRpcError):
                await bad

    run(scenario, CountingSource(), model)


def test_models_are_listed(model: ServedModel) -> None:
    async def scenario(channel: aio.Channel, ingress: Ingress) -> Any:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        return await stub.ListModels(generate_pb2.ListModelsRequest())

    (served,) = run(scenario, CountingSource(), model).models
    assert (served.name, served.context_tokens, served.vocab_size) == ("demo", 512, 1280)
    assert (served.eos_token_id, served.has_tokenizer) == (2, True)


def test_health_is_checked_and_watched(model: ServedModel) -> None:
    source = CountingSource(probe_error=UnavailableError("no router"))
    status = health_pb2.HealthCheckResponse

    async def scenario(channel: aio.Channel, ingress: Ingress) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
        assert (await unknown.read()).status == status.SERVICE_UNKNOWN
        assert (await watch.read()).status == status.NOT_SERVING
        source.probe_error = None
        assert (await watch.read()).status == status.SERVING
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == status.SERVING
        ingress.readiness.drain("stopping")
        assert (await watch.read()).status == status.NOT_SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch.cancel()
        unknown.cancel()

    run(scenario, source, model)


def test_reflection_describes_the_service(model: ServedModel) -> None:
    async def scenario(channel: aio.Channel, ingress: Ingress) -> list[Any]:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        return [answer async for answer in stub.ServerReflectionInfo(iter(asked))]

    listed, described = run(scenario, CountingSource(), model)
    assert SERVICE in {service.name for service in listed.list_services_response.service}
    (raw, *_) = described.file_descriptor_response.file_descriptor_proto
    file = descriptor_pb2.FileDescriptorProto.FromString(raw)
    assert [service.name for service in file.service] == ["GenerateService"]
