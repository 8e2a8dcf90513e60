"""The HTTP surface: one FastAPI application, whose every answer has OpenAI's shape."""

import logging
import re
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.errors import error_response, http_status
from milliways.cluster.ingress.openai.routes import openai_routes
from milliways.cluster.ingress.outcome import Outcome, log_error, outcome_of, put_outcome
from milliways.cluster.ingress.request_id import new_request_id
from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import ClusterError

logger = logging.getLogger(__name__)

MoreMetrics = Callable[[], Awaitable[str]]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_REQUEST_ID_CHARS = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:/+=-]")


def make_http_app(
    ingress: Ingress,
    more_metrics: MoreMetrics | None = None,
    *,
    echoes_request_id: bool = True,
) -> FastAPI:
    """The application of one ingress; `more_metrics` gives text of others for /metrics.

    Whoever stands before it and answers with x-request-id already, as Ray Serve does, turns
    `echoes_request_id` off.
    """
    app = FastAPI(
        title="Milliways", docs_url=None, redoc_url=None, redirect_slashes=False, version="1"
    )
    app.include_router(openai_routes(ingress))
    _add_operations(app, ingress, more_metrics)
    for kind in (HTTPException, InvalidRequestError, ClusterError):
        app.add_exception_handler(kind, _answer_error)
    # Inside Starlette's own catch-all, which would answer in another shape.
    app.add_middleware(_Recorder, ingress=ingress, echoes_request_id=echoes_request_id)
    return app


def _add_operations(app: FastAPI, ingress: Ingress, more_metrics: MoreMetrics | None) -> None:
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        await ingress.readiness.check()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = ingress.metrics.text()
        if more_metrics is not None:
            text += await _more_text(more_metrics)
        return PlainTextResponse(text, media_type=METRICS_TYPE)

    for route in (health, ready, metrics):
        assert callable(route)


async def _more_text(more_metrics: MoreMetrics) -> str:
    """What others count; that they cannot say it hides nothing of ours."""
    try:
        return await more_metrics()
    except Exception:
        logger.exception("the metrics of others are missing")
        return ""


async def _answer_error(request: Request, error: Exception) -> Response:
    log_error(error, http_status(error), outcome_of(request.scope).request_id)
    return error_response(error)


class _Recorder:
    """Names every request, answers what nobody caught, and counts what became of it."""

    def __init__(self, app: ASGIApp, ingress: Ingress, echoes_request_id: bool) -> None:
        self._app = app
        self._ingress = ingress
        self._echoes_request_id = echoes_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outcome = Outcome(request_id=_request_id(scope))
        put_outcome(scope, outcome)
        status: list[int] = []

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                if self._echoes_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = outcome.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            log_error(error, http_status(error), outcome.request_id)
            if not status:
                await error_response(error)(scope, receive, send_named)
        finally:
            code = outcome.code or (str(status[0]) if status else "499")
            if scope["path"].startswith("/v1/"):
                self._ingress.metrics.count_request("http", outcome.model, code)


def _request_id(scope: Scope) -> str:
    """The client's own name for it, as far as it is fit for logs and headers; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            kept = _NOT_IN_REQUEST_ID.sub("", value.decode("latin-1"))[:_MAX_REQUEST_ID_CHARS]
            return kept or new_request_id()
    return new_request_id()
