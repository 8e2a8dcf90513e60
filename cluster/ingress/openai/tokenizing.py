"""Endpoints around text and tokens, in vLLM's form: /tokenize, /detokenize and /tokenizer_info.

Evaluation harnesses count and cut prompts with them. They are without a version, as there.
"""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from milliways.cluster.ingress.ingress import Ingress, off_loop
from milliways.cluster.ingress.openai.bodies import DetokenizeBody, TokenizeBody, read_body
from milliways.cluster.ingress.openai.exchange import Exchange, Sender
from milliways.cluster.ingress.openai.fields import ignored_fields_header
from milliways.cluster.ingress.openai.requests import chat_prompt
from milliways.cluster.ingress.openai.values import checked_text
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError

Answer = tuple[dict[str, Any], tuple[str, ...]]
Work = Callable[[bytes, ServedModel, bool], Answer]


def tokenizing_routes(ingress: Ingress) -> APIRouter:
    """Builds the routes of one ingress."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return _exchange(ingress, tokenized)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return _exchange(ingress, detokenized)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return JSONResponse(described(ingress.model))

    for route in (tokenize, detokenize, tokenizer_info):
        assert callable(route)
    return router


def _exchange(ingress: Ingress, work: Work) -> Exchange:
    refuses_unknown = ingress.settings.unknown_fields == "refuse"

    async def handle(body: bytes, sender: Sender) -> None:
        with ingress.admit():
            answer, ignored = await off_loop(
                lambda: work(body, ingress.model, refuses_unknown), len(body)
            )
        sender.headers |= ignored_fields_header(ignored)
        await sender.respond(JSONResponse(answer))

    return Exchange(handle, ingress.settings.max_body_bytes)


def tokenized(raw: bytes, model: ServedModel, refuses_unknown: bool) -> Answer:
    """The tokens of a prompt, or of a chat as its template makes it.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
        UnknownModelError: another model is meant.
    """
    body, ignored = read_body(TokenizeBody, raw, model, refuses_unknown=refuses_unknown)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", body.prompt, "given, or messages, and not both")
    if body.messages is not None:
        token_ids = chat_prompt(body, body.messages, model)
    else:
        token_ids = model.encode(checked_text("prompt", body.prompt))
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": model.config.sequence_len,
        "tokens": list(token_ids),
    }
    if body.return_token_strs:
        answer["token_strs"] = [model.token_name(token_id) for token_id in token_ids]
    return answer, ignored


def detokenized(raw: bytes, model: ServedModel, refuses_unknown: bool) -> Answer:
    """The text of tokens.

    Raises:
        InvalidRequestError, UnknownModelError: as `tokenized`.
    """
    body, ignored = read_body(DetokenizeBody, raw, model, refuses_unknown=refuses_unknown)
    return {"prompt": model.decode(tuple(body.tokens))}, ignored


def described(model: ServedModel) -> dict[str, Any]:
    """What clients want to know of the tokenizer.

    Raises:
        InvalidRequestError: the model has none.
    """
    if model.tokenizer is None:
        raise InvalidRequestError("model", model.name, "a model with a tokenizer")
    bos_id = model.tokenizer.bos_id
    return {
        "tokenizer_class": "SentencePieceProcessor",
        "vocab_size": model.config.vocab_size,
        "model_max_length": model.config.sequence_len,
        "bos_token": None if bos_id is None else model.token_name(bos_id),
        "eos_token": model.token_name(model.config.eos_token),
        "pad_token": model.token_name(model.config.pad_token),
        "eos_token_id": model.config.eos_token,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": model.chat_template.source,
    }
