"""The routes of OpenAI's API: /v1/completions, /v1/chat/completions and /v1/models."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from milliways.cluster.ingress.ingress import Ingress, IngressEvent, PromptEvent, off_loop
from milliways.cluster.ingress.openai.errors import error_body, http_status
from milliways.cluster.ingress.openai.exchange import CLIENT_GONE, Exchange, Sender
from milliways.cluster.ingress.openai.requests import (
    Ask,
    ChatBody,
    CompletionBody,
    chat_ask,
    completion_ask,
)
from milliways.cluster.ingress.openai.responses import (
    Answer,
    ChatAnswer,
    CompletionAnswer,
    model_object,
)
from milliways.cluster.ingress.outcome import Outcome, outcome_of
from milliways.cluster.ingress.request_id import new_request_id
from milliways.cluster.ingress.resume import LAST_EVENT_ID, ResumePoint, event_id, parse_event_id
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import LeavingError

# Made once: `json.dumps` would make one for each token.
_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DONE = "data: [DONE]\n\n"
# Approximate size in JSON of one log-probability.
_BYTES_PER_SCORE = 30

Packed = TypeVar("Packed")

ReadAsk = Callable[[bytes, ServedModel, str], Ask]


def openai_routes(ingress: Ingress) -> APIRouter:
    """Builds the routes of one ingress."""
    router = APIRouter(prefix="/v1")

    @router.post("/completions", openapi_extra=_documented(CompletionBody))
    async def completions(request: Request) -> Response:
        return _exchange(ingress, request, completion_ask, CompletionAnswer)

    @router.post("/chat/completions", openapi_extra=_documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return _exchange(ingress, request, chat_ask, ChatAnswer)

    @router.get("/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_object(ingress.model)]})

    # A model's name may contain a slash.
    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        ingress.model.check_name(name)
        return JSONResponse(model_object(ingress.model))

    for route in (completions, chat_completions, models, model):
        assert callable(route)
    return router


def _exchange(
    ingress: Ingress, request: Request, read_ask: ReadAsk, make_answer: type[Answer]
) -> Exchange:
    outcome = outcome_of(request.scope)
    last_event_id = request.headers.get(LAST_EVENT_ID)

    async def handle(body: bytes, sender: Sender) -> None:
        with ingress.admit():
            resume = None if last_event_id is None else parse_event_id(last_event_id)
            request_id = resume.request_id if resume else new_request_id()
            ask = await off_loop(lambda: read_ask(body, ingress.model, request_id), len(body))
            outcome.model = ingress.model.name
            _check_resume(resume, ask, ingress.model)
            answer = make_answer(ask, ingress.model, request_id)
            stream = ingress.generate(ask.requests, request_id, resume=resume)
            async with aclosing(stream) as events:
                if resume is not None and (resume.has_usage or ask.draws_nothing):
                    # The client has received everything. (A stream that draws no token has only
                    # one event with an id.)
                    await sender.begin_events()
                    await _end(answer, sender, request_id, has_usage=resume.has_usage)
                elif ask.stream:
                    await _stream(events, answer, sender, request_id, outcome)
                else:
                    await _collect(events, answer)
                    await sender.respond(await _off_loop(answer, answer.whole, JSONResponse))

    def on_disconnect() -> None:
        outcome.code = CLIENT_GONE

    return Exchange(handle, ingress.settings.max_body_bytes, on_disconnect)


def _check_resume(resume: ResumePoint | None, ask: Ask, model: ServedModel) -> None:
    if resume is None:
        return
    if not ask.stream:
        raise InvalidRequestError(LAST_EVENT_ID, "given", "left out without stream")
    resume.check_fits(ask.requests)
    model.check_resume(resume.field, resume.fingerprint)


async def _collect(events: AsyncGenerator[IngressEvent], answer: Answer) -> None:
    async for event in events:
        if isinstance(event, PromptEvent):
            answer.keep_scores(event)
        else:
            answer.keep(event)


async def _stream(
    events: AsyncGenerator[IngressEvent],
    answer: Answer,
    sender: Sender,
    request_id: str,
    outcome: Outcome,
) -> None:
    """Sends chunks, then [DONE]. A client may resume a stream that ended without [DONE].

    If this server stops before, an error event takes the place of [DONE].

    An error before the first chunk is raised, and becomes an HTTP error.
    """
    sent_id = ""
    try:
        async for event in events:
            if isinstance(event, PromptEvent):
                answer.keep_scores(event)
                continue
            chunk = answer.chunk(event)
            if chunk is not None and event.is_new:
                if not sender.has_begun:
                    await sender.begin_events()
                sent_id = _name(answer, request_id)
                await sender.send_piece(_sse(chunk, sent_id))
        # A client that resumed after the last token has no chunk to receive.
        if not sender.has_begun:
            await sender.begin_events()
        if answer.ask.draws_nothing:
            name = _name(answer, request_id)
            piece = await _off_loop(answer, answer.only_chunk, lambda chunk: _sse(chunk, name))
            await sender.send_piece(piece)
    except Exception as error:
        if not sender.has_begun:
            raise
        outcome.fail(error, http_status(error))
        # With the id of the last event, since the client has received as much as before.
        await sender.send_piece(_sse(error_body(error), sent_id))
        if isinstance(error, LeavingError):
            # Not the end of the stream: the client gets the rest elsewhere.
            await sender.end()
        else:
            await sender.send_piece(_DONE, is_last=True)
        return
    await _end(answer, sender, request_id)


async def _off_loop(
    answer: Answer, make: Callable[[], dict[str, Any]], pack: Callable[[dict[str, Any]], Packed]
) -> Packed:
    """Makes a piece of JSON; on a thread if it holds the log-probabilities of long prompts."""
    return await off_loop(lambda: pack(make()), answer.num_scores * _BYTES_PER_SCORE)


async def _end(answer: Answer, sender: Sender, request_id: str, *, has_usage: bool = False) -> None:
    """Sends the usage, if the client asked for it, and [DONE]."""
    if answer.ask.include_usage and not has_usage:
        name = _name(answer, request_id, has_usage=True)
        await sender.send_piece(_sse(answer.usage_chunk(), name))
    await sender.send_piece(_DONE, is_last=True)


def _name(answer: Answer, request_id: str, *, has_usage: bool = False) -> str:
    """The id of an event that comes now."""
    return event_id(request_id, answer.counts, answer.model.fingerprint, has_usage=has_usage)


def _sse(data: dict[str, Any], event_id: str = "") -> str:
    """One server-sent event; its id says how much a client has received up to and including it."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}data: {_JSON.encode(data)}\n\n"


def _documented(body: type[CompletionBody] | type[ChatBody]) -> dict[str, Any]:
    """The OpenAPI schema of a body, which FastAPI cannot know: we parse bodies ourselves."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
