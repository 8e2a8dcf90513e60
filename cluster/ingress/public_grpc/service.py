"""GenerateService, the public gRPC API: decodes requests, streams tokens, answers with statuses."""

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc import aio

from milliways.cluster.ingress.ingress import Ingress, IngressEvent, PromptEvent, off_loop
from milliways.cluster.ingress.openai.requests import DEFAULT_MAX_TOKENS
from milliways.cluster.ingress.outcome import log_error
from milliways.cluster.ingress.request_id import is_request_id, new_request_id, seed_of
from milliways.cluster.ingress.resume import Received, ResumePoint, event_id
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError
from milliways.router.requests.messages import event_to_wire, rules_from_wire, scores_to_wire
from milliways.router.requests.request import GenerationRequest
from milliways.v1 import generate_pb2, generate_pb2_grpc
from milliways.wire.errors import LeavingError, code_of
from milliways.wire.sampling import decode_params
from milliways.wire.status_codes import GrpcStatus, Verbatim, abridged, status_of

SERVICE = "milliways.v1.GenerateService"

Message = TypeVar("Message")
Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class GrpcAsk:
    """A decoded request, and what its first response says."""

    request: GenerationRequest
    echo: str
    request_id: str
    resume: ResumePoint | None

    @property
    def counts(self) -> list[int]:
        """Number of tokens of each sample that the client sent back and need not be computed."""
        if self.resume is None:
            return [0] * self.request.num_samples
        return [len(received.token_ids) for received in self.resume.received]


def read_ask(message: generate_pb2.GenerateRequest, model: ServedModel) -> GrpcAsk:
    """Decodes a message. Slow for a long prompt: call it off the event loop.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
        UnknownModelError: the message names another model.
    """
    model.check_name(message.model or model.name)
    request_id = _request_id(message)
    prompt_ids = _prompt_ids(message, model)
    wanted = message.max_tokens if message.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    request = GenerationRequest(
        prompt_ids=prompt_ids,
        # A larger number means: until the context is full.
        max_tokens=min(wanted, model.config.sequence_len),
        sampling=decode_params(message.sampling, default_seed=seed_of(request_id)),
        num_samples=message.num_samples or 1,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        rules=rules_from_wire(message.rules, model.bad_word_runs(message.bad_words)),
    )
    if message.priority:
        raise InvalidRequestError("priority", message.priority, "0: there are no priorities")
    request.check_fits(model.config)
    return GrpcAsk(
        request, _echo(message, prompt_ids, model), request_id, _resume(message, request, model)
    )


def _echo(
    message: generate_pb2.GenerateRequest, prompt_ids: tuple[int, ...], model: ServedModel
) -> str:
    if not message.echo:
        return ""
    is_whole = message.WhichOneof("prompt") == "text" and not message.truncate_prompt_tokens
    return message.text if is_whole else model.echo(prompt_ids)


def _prompt_ids(message: generate_pb2.GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    prompt_ids = tuple(message.tokens.token_ids)
    if message.WhichOneof("prompt") == "text":
        prompt_ids = model.encode(message.text)
    has_limit = message.HasField("truncate_prompt_tokens")
    return model.truncated(prompt_ids, message.truncate_prompt_tokens if has_limit else None)


def _request_id(message: generate_pb2.GenerateRequest) -> str:
    if not message.HasField("resume"):
        return new_request_id()
    request_id = message.resume.request_id
    if not is_request_id(request_id):
        limit = "the request_id of the first response"
        raise InvalidRequestError("resume.request_id", abridged(request_id), limit)
    return request_id


def _resume(
    message: generate_pb2.GenerateRequest, request: GenerationRequest, model: ServedModel
) -> ResumePoint | None:
    if not message.HasField("resume"):
        return None
    received = [Received()] * request.num_samples
    for had in message.resume.received:
        if had.sample_index >= request.num_samples:
            limit = f"below num_samples = {request.num_samples}"
            raise InvalidRequestError("resume.received.sample_index", had.sample_index, limit)
        received[had.sample_index] = _received(had, request, model)
    _check_scored(message.resume.num_prompt_logprobs, received, request)
    point = ResumePoint(
        request_id=message.resume.request_id,
        received=tuple(received),
        field="resume.received.num_tokens",
        num_scored=message.resume.num_prompt_logprobs,
        fingerprint=message.resume.system_fingerprint,
    )
    point.check_fits([request])
    model.check_resume("resume.system_fingerprint", point.fingerprint)
    return point


def _check_scored(count: int, received: list[Received], request: GenerationRequest) -> None:
    """Raises unless the count is possible: a prompt's scores all come before the first token."""
    most = request.num_to_score
    least = most if any(had.num_tokens for had in received) else 0
    if not least <= count <= most:
        limit = f"{most}, since a token was received" if least else f"at most {most}"
        raise InvalidRequestError("resume.num_prompt_logprobs", count, limit)


def _received(
    had: generate_pb2.ReceivedTokens, request: GenerationRequest, model: ServedModel
) -> Received:
    token_ids = tuple(had.token_ids)
    field = "resume.received.token_ids"
    if token_ids and len(token_ids) != had.num_tokens:
        limit = f"all {had.num_tokens} of the sample, or none"
        raise InvalidRequestError(field, Verbatim(f"{len(token_ids)} tokens"), limit)
    if had.is_finished and not token_ids:
        limit = "unset without the tokens that ended"
        raise InvalidRequestError("resume.received.is_finished", True, limit)
    if len(token_ids) >= request.max_tokens and not had.is_finished:
        limit = f"fewer than max_tokens = {request.max_tokens}, or finished"
        raise InvalidRequestError(field, Verbatim(f"{len(token_ids)} tokens"), limit)
    for token_id in token_ids:
        if token_id >= model.config.vocab_size:
            limit = f"token ids in 0..{model.config.vocab_size - 1}"
            raise InvalidRequestError(field, token_id, limit)
    return Received(num_tokens=had.num_tokens, token_ids=token_ids, is_finished=had.is_finished)


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """Serves the calls of GenerateService; an error becomes a status that names it."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress
        # Calls that have not ended.
        self.num_calls = 0

    async def Generate(self, request: generate_pb2.GenerateRequest, context: Context) -> None:
        await self._run(context, lambda: self._generate(request, context))

    async def Tokenize(
        self, request: generate_pb2.TokenizeRequest, context: Context
    ) -> generate_pb2.TokenizeResponse:
        return await self._run(context, lambda: self._tokenize(request))

    async def Detokenize(
        self, request: generate_pb2.DetokenizeRequest, context: Context
    ) -> generate_pb2.DetokenizeResponse:
        return await self._run(context, lambda: self._detokenize(request))

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
            # Sent with the first response, whether that holds scores, a token or the usage.
            started: generate_pb2.GenerationStarted | None = _started(ask, model)
            counts, num_cached = ask.counts, 0
            timeout_s = context.time_remaining()
            stream = self._ingress.generate([ask.request], ask.request_id, timeout_s, ask.resume)
            async with aclosing(_with_cursor(stream, ask, counts, model)) as events:
                async for choice in events:
                    if isinstance(choice, PromptEvent):
                        scores = scores_to_wire(choice.scores)
                        await context.write(
                            generate_pb2.GenerateResponse(started=started, prompt_logprobs=scores)
                        )
                        started = None
                        continue
                    counts[choice.choice_index] = choice.index + 1
                    if choice.choice_index == 0:
                        num_cached += choice.event.num_cached
                    if choice.is_new:
                        wired = event_to_wire(choice.event, choice.index)
                        response = generate_pb2.GenerateResponse(started=started, events=[wired])
                        await context.write(response)
                        started = None
            usage = generate_pb2.Usage(
                num_prompt_tokens=len(ask.request.prompt_ids),
                num_completion_tokens=sum(counts),
                num_cached_prompt_tokens=num_cached,
            )
            await context.write(generate_pb2.GenerateResponse(started=started, usage=usage))

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

    async def _run(
        self, context: Context, work: Callable[[], Coroutine[Any, Any, Message]]
    ) -> Message:
        """Runs one call, counts it, and turns an error into a status."""
        code = grpc.StatusCode.CANCELLED.name
        self.num_calls += 1
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
            self.num_calls -= 1
            self._ingress.metrics.count_request("grpc", self._ingress.model.name, code)


async def _with_cursor(
    stream: AsyncGenerator[IngressEvent], ask: GrpcAsk, counts: list[int], model: ServedModel
) -> AsyncGenerator[IngressEvent]:
    """The same stream. If this server stops before its end, the error says what was sent."""
    async with aclosing(stream) as events:
        try:
            async for event in events:
                yield event
        except LeavingError as error:
            cursor = event_id(ask.request_id, counts, model.fingerprint)
            raise LeavingError(str(error), error.retry_after_s, cursor=cursor) from error


def _started(ask: GrpcAsk, model: ServedModel) -> generate_pb2.GenerationStarted:
    return generate_pb2.GenerationStarted(
        request_id=ask.request_id,
        model=model.name,
        seed=ask.request.sampling.seed,
        echo=ask.echo,
        system_fingerprint=model.fingerprint,
    )


async def abort(context: Context, status: GrpcStatus) -> Any:
    """Ends a call with an error status."""
    code = grpc.StatusCode[status.code]
    await context.abort(code, status.message, status.trailing_metadata)
