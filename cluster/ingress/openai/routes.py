"""The routes of OpenAI's API: completions, chat completions, models."""

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

_DONE = "data: [DONE]\n\n"
# Of JSON, about.
_BYTES_EACH_SCORE = 30

Packed = TypeVar("Packed")

ReadAsk = Callable[[bytes, ServedModel, str], Ask]


def openai_routes(ingress: Ingress) -> APIRouter:
    """The routes, bound to an ingress."""
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

    # A name may hold a slash.
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

    async def work(body: bytes, sender: Sender) -> None:
        with ingress.admit():
            resume = None if last_event_id is None else parse_event_id(last_event_id)
            request_id = resume.request_id if resume else new_request_id()
            ask = await off_loop(lambda: read_ask(body, ingress.model, request_id), len(body))
            outcome.model = ingress.model.name
            _check_resume(resume, ask)
            answer = make_answer(ask, ingress.model, request_id)
            stream = ingress.generate(ask.requests, request_id, resume=resume)
            async with aclosing(stream) as events:
                if resume is not None and (resume.has_usage or ask.draws_nothing):
                    # Where nothing is drawn there is one event with an id: who has that has all.
                    await sender.begin_events()
                    await _end(answer, sender, request_id, has_usage=resume.has_usage)
                elif ask.stream:
                    await _stream(events, answer, sender, request_id, outcome)
                else:
                    await _collect(events, answer)
                    await sender.respond(await _off_loop(answer, answer.whole, JSONResponse))

    def when_gone() -> None:
        outcome.code = CLIENT_GONE

    return Exchange(work, ingress.settings.max_body_bytes, when_gone)


def _check_resume(resume: ResumePoint | None, ask: Ask) -> None:
    if resume is None:
        return
    if not ask.stream:
        raise InvalidRequestError(LAST_EVENT_ID, "given", "left out without stream")
    resume.check_fits(ask.requests)


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
    """Sends chunks, then [DONE]: a stream without it was cut off, and may be asked for again.

    Until the first token, an error is still an error of HTTP.
    """
    try:
        async for event in events:
            if isinstance(event, PromptEvent):
                answer.keep_scores(event)
                continue
            chunk = answer.chunk(event)
            if chunk is not None and event.is_news:
                if not sender.has_begun:
                    await sender.begin_events()
                await sender.send_piece(_sse(chunk, event_id(request_id, answer.counts)))
        # There is nothing more to say to a client that has had it all.
        if not sender.has_begun:
            await sender.begin_events()
        if answer.ask.draws_nothing:
            name = event_id(request_id, answer.counts)
            piece = await _off_loop(answer, answer.only_chunk, lambda chunk: _sse(chunk, name))
            await sender.send_piece(piece)
    except Exception as error:
        if not sender.has_begun:
            raise
        outcome.fail(error, http_status(error))
        await sender.send_piece(_sse(error_body(error)))
        await sender.send_piece(_DONE, is_last=True)
        return
    await _end(answer, sender, request_id)


async def _off_loop(
    answer: Answer, make: Callable[[], dict[str, Any]], pack: Callable[[dict[str, Any]], Packed]
) -> Packed:
    """Makes a piece of JSON, on a thread where it holds the log-probabilities of long prompts."""
    return await off_loop(lambda: pack(make()), answer.num_scores * _BYTES_EACH_SCORE)


async def _end(answer: Answer, sender: Sender, request_id: str, *, has_usage: bool = False) -> None:
    """What follows the last token."""
    if answer.ask.include_usage and not has_usage:
        name = event_id(request_id, answer.counts, has_usage=True)
        await sender.send_piece(_sse(answer.usage_chunk(), name))
    await sender.send_piece(_DONE, is_last=True)


def _sse(data: dict[str, Any], event_id: str = "") -> str:
    """One server-sent event; its id says what a client has had with it."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n"


def _documented(body: type[CompletionBody] | type[ChatBody]) -> dict[str, Any]:
    """Bodies are read by hand, so their schema has to be told."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
