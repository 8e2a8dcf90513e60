"""The routes of OpenAI's API: /v1/completions, /v1/chat/completions and /v1/models."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from milliways.cluster.ingress.ingress import Ingress, IngressEvent, PromptEvent, off_loop
from milliways.cluster.ingress.openai.bodies import ChatBody, CompletionBody
from milliways.cluster.ingress.openai.exchange import CLIENT_GONE, Exchange, Pace, Sender
from milliways.cluster.ingress.openai.fields import ignored_fields_header
from milliways.cluster.ingress.openai.requests import Ask, chat_ask, completion_ask
from milliways.cluster.ingress.openai.responses import (
    Answer,
    ChatAnswer,
    CompletionAnswer,
    model_object,
)
from milliways.cluster.ingress.openai.streaming import EventStream, run_off_loop
from milliways.cluster.ingress.outcome import outcome_of
from milliways.cluster.ingress.request_id import id_behind
from milliways.cluster.ingress.resume import (
    EVENT_IDS,
    LAST_EVENT_ID,
    ResumePoint,
    cursor_form,
    parse_event_id,
)
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError


class ReadAsk(Protocol):
    """`completion_ask` or `chat_ask`."""

    def __call__(
        self, raw: bytes, model: ServedModel, request_id: str, *, refuses_unknown: bool
    ) -> Ask: ...


def openai_routes(ingress: Ingress, pace: Pace) -> APIRouter:
    """Builds the routes of one ingress; `pace` is that of streams."""
    router = APIRouter(prefix="/v1")

    @router.post("/completions", openapi_extra=_documented(CompletionBody))
    async def completions(request: Request) -> Response:
        return _exchange(ingress, request, completion_ask, CompletionAnswer, pace)

    @router.post("/chat/completions", openapi_extra=_documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return _exchange(ingress, request, chat_ask, ChatAnswer, pace)

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
    ingress: Ingress,
    request: Request,
    read_ask: ReadAsk,
    make_answer: type[Answer],
    pace: Pace,
) -> Exchange:
    outcome = outcome_of(request.scope)
    last_event_id = request.headers.get(LAST_EVENT_ID)
    refuses_unknown = ingress.settings.unknown_fields == "refuse"

    async def handle(body: bytes, sender: Sender) -> None:
        with ingress.admit():
            form = cursor_form(request.headers.get(EVENT_IDS), resumes=last_event_id is not None)
            resume = None if last_event_id is None else parse_event_id(last_event_id)
            request_id = resume.request_id if resume else id_behind(outcome.request_id)
            ask = await off_loop(
                lambda: read_ask(body, ingress.model, request_id, refuses_unknown=refuses_unknown),
                len(body),
            )
            sender.headers |= ignored_fields_header(ask.ignored_fields)
            outcome.model = ingress.model.name
            _check_resume(resume, ask, ingress.model)
            answer = make_answer(ask, ingress.model, request_id, outcome.request_id)
            event_stream = EventStream(answer, sender, request_id, form, pace)
            stream = ingress.generate(ask.requests, outcome.request_id, resume=resume)
            async with aclosing(stream) as events:
                if resume is not None and (resume.has_usage or ask.draws_nothing):
                    # The client has received everything. (A stream that draws no token has only
                    # one event with a cursor.)
                    await event_stream.end(has_usage=resume.has_usage)
                elif ask.stream:
                    await event_stream.run(events, outcome)
                else:
                    await _collect(events, answer)
                    await sender.respond(await run_off_loop(answer, answer.whole, JSONResponse))

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


def _documented(body: type[CompletionBody] | type[ChatBody]) -> dict[str, Any]:
    """The OpenAPI schema of a body, which FastAPI cannot know: we parse bodies ourselves."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
