"""The gRPC surface: GenerateService over an ingress."""

import secrets
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc import aio
from milliways.v1 import generate_pb2, generate_pb2_grpc

from cluster.errors import code_of
from cluster.ingress.codec import checked_seed, event_to_wire, sampling_from_wire
from cluster.ingress.ingress import Ingress, new_request_id, off_loop
from cluster.ingress.openai_requests import DEFAULT_MAX_TOKENS
from cluster.ingress.outcome import log_error
from cluster.ingress.served_model import ServedModel
from cluster.status_codes import GrpcStatus, status_of
from model.errors import InvalidRequestError
from router.request import GenerateRequest

SERVICE = "milliways.v1.GenerateService"

Message = TypeVar("Message")
Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class GrpcAsk:
    """A request and what its first response says of it."""

    request: GenerateRequest
    echo: str


def read_ask(message: generate_pb2.GenerateRequest, model: ServedModel) -> GrpcAsk:
    """A message as a request. Takes long for a long prompt: not for the event loop.

    Raises:
        InvalidRequestError: names field, value and limit.
        UnknownModelError: another model is meant.
    """
    model.check_name(message.model or model.name)
    prompt_ids = _prompt_ids(message, model)
    wanted = message.max_tokens if message.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    request = GenerateRequest(
        prompt_ids=prompt_ids,
        # More than the context holds is all that it holds.
        max_tokens=min(wanted, model.config.sequence_len),
        sampling=sampling_from_wire(message.sampling, _seed(message)),
        num_samples=message.num_samples or 1,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
    )
    request.check_fits(model.config)
    if not message.echo:
        return GrpcAsk(request, "")
    is_text = message.WhichOneof("prompt") == "text"
    return GrpcAsk(request, message.text if is_text else model.echo(prompt_ids))


def _prompt_ids(message: generate_pb2.GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    if message.WhichOneof("prompt") == "text":
        return model.encode(message.text)
    return tuple(message.tokens.token_ids)


def _seed(message: generate_pb2.GenerateRequest) -> int:
    if message.sampling.seed:
        limit = "unset: the seed is a field of the request itself"
        raise InvalidRequestError("sampling.seed", message.sampling.seed, limit)
    if message.HasField("seed"):
        return checked_seed(message.seed)
    return secrets.randbelow(2**63)


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """Answers with tokens, or with a status that says what was wrong."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def Generate(self, request: generate_pb2.GenerateRequest, context: Context) -> None:
        await self._answered(context, lambda: self._generate(request, context))

    async def Tokenize(
        self, request: generate_pb2.TokenizeRequest, context: Context
    ) -> generate_pb2.TokenizeResponse:
        return await self._answered(context, lambda: self._tokenize(request))

    async def Detokenize(
        self, request: generate_pb2.DetokenizeRequest, context: Context
    ) -> generate_pb2.DetokenizeResponse:
        return await self._answered(context, lambda: self._detokenize(request))

    async def ListModels(
        self, request: generate_pb2.ListModelsRequest, context: Context
    ) -> generate_pb2.ListModelsResponse:
        model = self._ingress.model
        served = generate_pb2.ServedModel(
            name=model.name,
            context_tokens=model.config.sequence_len,
            vocab_size=model.config.vocab_size,
            eos_token_id=model.config.eos_token,
            has_tokenizer=model.tokenizer is not None,
        )
        return generate_pb2.ListModelsResponse(models=[served])

    async def _generate(self, message: generate_pb2.GenerateRequest, context: Context) -> None:
        model = self._ingress.model
        with self._ingress.admit():
            ask = await off_loop(lambda: read_ask(message, model), message.ByteSize())
            request_id = new_request_id()
            started = generate_pb2.GenerationStarted(
                request_id=request_id,
                model=model.name,
                seed=ask.request.sampling.seed,
                echo=ask.echo,
                system_fingerprint=model.fingerprint,
            )
            counts = [0] * ask.request.num_samples
            timeout_s = context.time_remaining()
            stream = self._ingress.generate([ask.request], request_id, timeout_s)
            async with aclosing(stream) as events:
                async for choice in events:
                    wired = event_to_wire(choice.event, counts[choice.choice_index])
                    counts[choice.choice_index] += 1
                    is_first = sum(counts) == 1
                    await context.write(
                        generate_pb2.GenerateResponse(
                            started=started if is_first else None, events=[wired]
                        )
                    )
            usage = generate_pb2.Usage(
                num_prompt_tokens=len(ask.request.prompt_ids), num_completion_tokens=sum(counts)
            )
            await context.write(generate_pb2.GenerateResponse(usage=usage))

    async def _tokenize(
        self, request: generate_pb2.TokenizeRequest
    ) -> generate_pb2.TokenizeResponse:
        model = self._ingress.model
        model.check_name(request.model or model.name)
        with self._ingress.admit():
            token_ids = await off_loop(
                lambda: model.encode(request.text, "text"), len(request.text)
            )
        return generate_pb2.TokenizeResponse(token_ids=token_ids)

    async def _detokenize(
        self, request: generate_pb2.DetokenizeRequest
    ) -> generate_pb2.DetokenizeResponse:
        model = self._ingress.model
        model.check_name(request.model or model.name)
        with self._ingress.admit():
            token_ids = tuple(request.token_ids)
            text = await off_loop(lambda: model.decode(token_ids), len(token_ids))
        return generate_pb2.DetokenizeResponse(text=text)

    async def _answered(
        self, context: Context, work: Callable[[], Coroutine[Any, Any, Message]]
    ) -> Message:
        """Runs a call, counts it, and turns its error into a status."""
        code = grpc.StatusCode.CANCELLED.name
        try:
            answer = await work()
            code = grpc.StatusCode.OK.name
            return answer
        except Exception as error:
            status = status_of(error)
            code = status.code
            log_error(error, code_of(error).http, context.peer())
            return await abort(context, status)
        finally:
            self._ingress.metrics.count_request("grpc", self._ingress.model.name, code)


async def abort(context: Context, status: GrpcStatus) -> Any:
    """Ends a call with a status."""
    code = grpc.StatusCode[status.code]
    await context.abort(code, status.message, status.trailing_metadata)
