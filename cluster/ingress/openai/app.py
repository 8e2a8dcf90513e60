"""The FastAPI application: routes, middleware, and errors in OpenAI's shape."""

import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.errors import error_response, http_status
from milliways.cluster.ingress.openai.exchange import CLIENT_GONE, Pace
from milliways.cluster.ingress.openai.fields import IGNORED_FIELDS_HEADER
from milliways.cluster.ingress.openai.routes import openai_routes
from milliways.cluster.ingress.openai.tokenizing import tokenizing_routes
from milliways.cluster.ingress.outcome import Outcome, log_error, outcome_of, put_outcome
from milliways.cluster.ingress.request_id import name_of
from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import ClusterError

logger = logging.getLogger(__name__)

MetricsText = Callable[[], Awaitable[str]]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_http_app(
    ingress: Ingress,
    worker_metrics: MetricsText | None = None,
    *,
    echoes_request_id: bool = True,
    pace: Pace | None = None,
) -> FastAPI:
    """Builds the application of one ingress. /metrics appends what `worker_metrics` returns.

    `pace` is that of streams which have nothing to send.

    Set `echoes_request_id` to False behind a proxy that adds x-request-id to responses itself, as
    Ray Serve does.
    """
    app = FastAPI(
        title="Milliways", docs_url=None, redoc_url=None, redirect_slashes=False, version="1"
    )
    app.include_router(openai_routes(ingress, pace or Pace()))
    app.include_router(tokenizing_routes(ingress))
    _add_operations(app, ingress, worker_metrics)
    for kind in (HTTPException, InvalidRequestError, ClusterError):
        app.add_exception_handler(kind, _answer_error)
    # Starlette's own handler for uncaught exceptions is outside it, and would not answer in
    # OpenAI's shape.
    app.add_middleware(_Recorder, ingress=ingress, echoes_request_id=echoes_request_id)
    if origins := ingress.settings.cors_origins.split():
        # Outside, so that browsers may read errors as well.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=[IGNORED_FIELDS_HEADER, "x-request-id", "retry-after"],
        )
    return app


def _add_operations(app: FastAPI, ingress: Ingress, worker_metrics: MetricsText | None) -> None:
    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        await ingress.readiness.check()
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version_of_server() -> Response:
        return JSONResponse({"version": version("milliways")})

    @app.get("/load")
    async def load() -> Response:
        return JSONResponse({"server_load": ingress.num_ongoing})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = ingress.metrics.text()
        if worker_metrics is not None:
            text += await _text_or_nothing(worker_metrics)
        return PlainTextResponse(text, media_type=METRICS_TYPE)

    for route in (health, ready, version_of_server, load, metrics):
        assert callable(route)


async def _text_or_nothing(worker_metrics: MetricsText) -> str:
    """The workers' metrics; an error there must not hide the metrics of this process."""
    try:
        return await worker_metrics()
    except Exception:
        logger.exception("cannot read the workers' metrics; /metrics leaves them out")
        return ""


async def _answer_error(request: Request, error: Exception) -> Response:
    log_error(error, http_status(error), outcome_of(request.scope).request_id)
    return error_response(error)


class _Recorder:
    """Gives each request an id, answers uncaught exceptions, and counts the result."""

    def __init__(self, app: ASGIApp, ingress: Ingress, echoes_request_id: bool) -> None:
        self._app = app
        self._ingress = ingress
        self._echoes_request_id = echoes_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # What GET answers, without its body. FastAPI's routes for GET do not take HEAD.
        wants_body = scope["method"] != "HEAD"
        if not wants_body:
            scope = {**scope, "method": "GET"}
        outcome = Outcome(request_id=_request_name(scope))
        put_outcome(scope, outcome)
        status: list[int] = []

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                if self._echoes_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = outcome.request_id
            elif not wants_body:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log_error(error, http_status(error), outcome.request_id)
            if not status:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            code = outcome.code or (str(status[0]) if status else CLIENT_GONE)
            if scope["path"].startswith("/v1/"):
                self._ingress.metrics.count_request("http", outcome.model, code)


def _request_name(scope: Scope) -> str:
    headers = dict(reversed(scope["headers"]))
    return name_of(headers.get(b"x-request-id"), headers.get(b"last-event-id"))
