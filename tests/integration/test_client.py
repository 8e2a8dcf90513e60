"""The gRPC client: servers die under its streams, and what it gives is that of no death."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from grpc import aio

from milliways.api.resuming import GenerateClient, StreamChangedError
from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.served_model import ServedModel
from milliways.v1 import generate_pb2, sampling_pb2
from milliways.wire.errors import DeadlineError, OverloadedError, UnavailableError
from tests.ingresses import demo_model, local_source, make_ingress
from tests.sources import CountingSource, LocalSource, counted_events

ID = "019f00000000aaaaaaaaaaaaaaaaaaaa"


@dataclass
class Servers:
    """Servers of one model on ports of their own, that can be stopped and started again."""

    ingresses: list[Ingress]
    servers: list[IngressGrpcServer]

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{server.port}" for server in self.servers]

    def serving(self) -> int:
        """The one that has a request."""
        (index,) = [i for i, ingress in enumerate(self.ingresses) if ingress.num_ongoing]
        return index

    async def die_and_come_back(self, index: int) -> None:
        port = self.servers[index].port
        await self.servers[index].stop()
        self.servers[index] = IngressGrpcServer(self.ingresses[index], port=port)
        await self.servers[index].start()


@asynccontextmanager
async def running(
    model: ServedModel, *sources: CountingSource | LocalSource
) -> AsyncIterator[Servers]:
    ingresses = [make_ingress(source, model) for source in sources]
    servers = Servers(ingresses, [IngressGrpcServer(ingress) for ingress in ingresses])
    for server in servers.servers:
        await server.start()
    try:
        yield servers
    finally:
        for server in servers.servers:
            await server.stop()
        assert [ingress.num_ongoing for ingress in ingresses] == [0] * len(ingresses)


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def request_for(**fields: Any) -> generate_pb2.GenerateRequest:
    tokens = generate_pb2.TokenIds(token_ids=[7, 100])
    prompt = {} if "text" in fields else {"tokens": tokens}
    return generate_pb2.GenerateRequest(**({"max_tokens": 4} | prompt | fields))


AfterEvent = Callable[[int], Awaitable[None]]


async def told(
    client: GenerateClient,
    request: generate_pb2.GenerateRequest,
    after_event: AfterEvent | None = None,
) -> list[generate_pb2.GenerateResponse]:
    responses: list[generate_pb2.GenerateResponse] = []
    async with aclosing(client.generate(request, timeout_s=20)) as stream:
        async for response in stream:
            responses.append(response)
            if after_event is not None:
                await after_event(len(responses))
    return responses


def by_sample(responses: list[generate_pb2.GenerateResponse]) -> list[Any]:
    """All that a client sees, but for the order between samples and the request's own name."""
    assert [r.HasField("started") for r in responses] == [True] + [False] * (len(responses) - 1)
    assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
    events: dict[int, list[Any]] = {}
    for response in responses:
        for event in response.events:
            events.setdefault(event.sample_index, []).append(event)
    for sample in events.values():
        assert [event.index for event in sample] == list(range(len(sample)))
    return [sorted(events.items()), responses[-1].usage]


SEEDED = {"temperature": 0.9, "seed": 5, "num_logprobs": 2}
REQUESTS: list[dict[str, Any]] = [
    {"text": "The answer to life", "max_tokens": 10, "sampling": SEEDED},
    {"text": "Welcome to", "max_tokens": 5, "num_samples": 3, "sampling": SEEDED},
    {"text": "The answer", "max_tokens": 8, "stop": ["e", "42"], "sampling": SEEDED},
]


@pytest.fixture(scope="module")
def engine_source() -> Any:
    with local_source() as source:
        yield source


@pytest.mark.parametrize("fields", REQUESTS)
def test_server_that_dies_behind_any_event_costs_nothing(
    model: ServedModel, engine_source: LocalSource, fields: dict[str, Any]
) -> None:
    given = fields | {"sampling": sampling_pb2.SamplingParams(**fields["sampling"])}
    request = request_for(**given)

    async def main() -> None:
        async with (
            running(model, engine_source, engine_source) as servers,
            GenerateClient(servers.addresses) as client,
        ):
            whole = await told(client, request)
            for num_events in range(1, len(whole) + 1):

                async def die(num_received: int, num_events: int = num_events) -> None:
                    if num_received == num_events and any(i.num_ongoing for i in servers.ingresses):
                        await servers.die_and_come_back(servers.serving())

                assert by_sample(await told(client, request, die)) == by_sample(whole)

    asyncio.run(main())


def test_caller_hears_of_every_connection_that_broke(model: ServedModel) -> None:
    dying = CountingSource(error=UnavailableError("died"), num_before_error=1)
    broken: list[Exception] = []

    async def main() -> None:
        async with (
            running(model, dying, CountingSource()) as servers,
            GenerateClient(servers.addresses) as client,
        ):
            client._turn = 0
            stream = client.generate(request_for(), timeout_s=20, when_broken=broken.append)
            async with aclosing(stream) as responses:
                assert len([r async for r in responses if r.events]) == 4

    asyncio.run(main())
    assert [str(error) for error in broken if "died" in str(error)] and len(broken) == 1


def test_server_that_dies_behind_every_event_costs_nothing(model: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(0))
    request = request_for(max_tokens=5, num_samples=2)

    async def main() -> None:
        assert source.gate is not None
        async with (
            running(model, source, source) as servers,
            GenerateClient(servers.addresses) as client,
        ):
            source.gate.release()

            async def die(num_received: int) -> None:
                if num_received <= 9:
                    await servers.die_and_come_back(servers.serving())
                source.gate.release()

            responses = await told(client, request, die)
        expected = counted_events(source.requests[0])
        events = [event for response in responses for event in response.events]
        assert [e.token_id for e in events] == [e.token_id for e in expected]
        assert responses[-1].usage.num_completion_tokens == 10
        # One seed for all of them, though the request gives none.
        assert len({r.sampling.seed for r in source.requests}) == 1
        assert len(source.requests) == 10

    asyncio.run(main())


async def ask(
    model: ServedModel,
    source: CountingSource,
    request: generate_pb2.GenerateRequest,
    **options: Any,
) -> list[generate_pb2.GenerateResponse]:
    async with running(model, source) as servers, GenerateClient(servers.addresses) as client:
        stream = client.generate(request, **options)
        async with aclosing(stream) as responses:
            return [response async for response in responses]


def resume_of(*received: dict[str, Any], request_id: str = ID) -> generate_pb2.Resume:
    told = [generate_pb2.ReceivedTokens(**had) for had in received]
    return generate_pb2.Resume(request_id=request_id, received=told)


@pytest.mark.parametrize("with_ids", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (2, 3), (4, 2), (4, 4)])
def test_rest_follows_what_was_counted_or_told(
    model: ServedModel, counts: tuple[int, int], with_ids: tuple[int, ...]
) -> None:
    source = CountingSource()
    plain = request_for(num_samples=2)
    (whole, usage) = by_sample(asyncio.run(ask(model, CountingSource(), plain)))
    received = [
        {"sample_index": i, "num_tokens": count}
        | ({"token_ids": [e.token_id for e in whole[i][1][:count]]} if i in with_ids else {})
        | ({"is_finished": True} if i in with_ids and count == 4 else {})
        for i, count in enumerate(counts)
    ]
    resumed = request_for(num_samples=2, resume=resume_of(*received))
    responses = asyncio.run(ask(model, source, resumed))
    assert responses[0].started.request_id == ID
    assert responses[-1].usage == usage
    events = [event for response in responses for event in response.events]
    for i, count in enumerate(counts):
        assert [e for e in events if e.sample_index == i] == whole[i][1][count:]


@pytest.mark.parametrize(
    ("field", "resume"),
    [
        ("resume.request_id", resume_of(request_id="")),
        ("resume.request_id", resume_of(request_id="x" * 32)),
        ("resume.received.sample_index", resume_of({"sample_index": 1})),
        ("resume.received.num_tokens", resume_of({"num_tokens": 5})),
        ("resume.received.token_ids", resume_of({"num_tokens": 2, "token_ids": [101]})),
        ("resume.received.token_ids", resume_of({"num_tokens": 1, "token_ids": [1280]})),
        ("resume.received.token_ids", resume_of({"num_tokens": 4, "token_ids": [1, 2, 3, 4]})),
        ("resume.received.is_finished", resume_of({"num_tokens": 4, "is_finished": True})),
    ],
)
def test_bad_resume_is_refused_by_name(
    model: ServedModel, field: str, resume: generate_pb2.Resume
) -> None:
    source = CountingSource()
    with pytest.raises(aio.AioRpcError) as caught:
        asyncio.run(ask(model, source, request_for(resume=resume)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata() or ())["milliways-field"] == field
    assert source.requests == []


def test_refusal_is_not_tried_again(model: ServedModel) -> None:
    for error in (OverloadedError("full"), DeadlineError("late")):
        source = CountingSource(error=error)
        with pytest.raises(aio.AioRpcError):
            asyncio.run(ask(model, source, request_for()))
        assert len(source.requests) == 1


def test_client_waits_for_a_server_until_its_deadline(model: ServedModel) -> None:
    source = CountingSource(error=UnavailableError("no router"))
    began_s = time.monotonic()
    with pytest.raises(aio.AioRpcError) as caught:
        asyncio.run(ask(model, source, request_for(), timeout_s=0.5))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began_s < 5
    assert len(source.requests) > 2


def test_full_server_is_no_refusal_once_the_stream_has_begun(model: ServedModel) -> None:
    # Fails behind two tokens, and so not when two of four are left.
    dying = CountingSource(error=UnavailableError("died"), num_before_error=2)
    full = CountingSource(error=OverloadedError("full", retry_after_s=0.05))

    async def main() -> list[generate_pb2.GenerateResponse]:
        async with (
            running(model, dying, full) as servers,
            GenerateClient(servers.addresses) as client,
        ):
            client._turn = 0
            return await told(client, request_for())

    responses = asyncio.run(main())
    assert [e.index for r in responses for e in r.events] == [0, 1, 2, 3]
    assert (len(dying.requests), len(full.requests)) == (2, 1)


def test_another_model_does_not_go_on_unnoticed(model: ServedModel) -> None:
    first = CountingSource(error=UnavailableError("died"), num_before_error=1)
    other = replace(model, revision="other numbers")

    async def main() -> None:
        async with running(model, first) as servers, running(other, CountingSource()) as others:
            addresses = [*servers.addresses, *others.addresses]
            async with GenerateClient(addresses) as client:
                client._turn = 0
                with pytest.raises(StreamChangedError):
                    await told(client, request_for())

    asyncio.run(main())


def test_caller_that_died_itself_goes_on_with_what_it_kept(model: ServedModel) -> None:
    request = request_for(resume=resume_of({"num_tokens": 1}))
    responses = asyncio.run(ask(model, CountingSource(), request))
    assert [e.index for r in responses for e in r.events] == [1, 2, 3]


def test_no_address_is_no_client() -> None:
    with pytest.raises(ValueError, match="addresses"):
        GenerateClient([])
