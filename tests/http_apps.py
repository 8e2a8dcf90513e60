"""Sends requests to an HTTP ingress in this process, and reads the responses."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.served_model import ServedModel
from tests.ingresses import make_ingress
from tests.sources import CountingSource

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MAX_BODY_BYTES = 64 << 10


def run(
    scenario: Callable[[httpx.AsyncClient, Ingress], Awaitable[Any]],
    source: CountingSource,
    model: ServedModel,
    **settings: Any,
) -> Any:
    """Runs a scenario against an app in this process; no request may run after it."""

    async def main() -> Any:
        limits = {"max_body_bytes": MAX_BODY_BYTES} | settings
        ingress = make_ingress(source, model, **limits)
        transport = httpx.ASGITransport(make_http_app(ingress), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            result = await scenario(client, ingress)
        assert (ingress.num_ongoing, source.num_running) == (0, 0)
        return result

    return asyncio.run(main())


def post(source: CountingSource, model: ServedModel, path: str, **kwargs: Any) -> httpx.Response:
    return run(lambda client, _: client.post(path, **kwargs), source, model)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": [7, 100], "max_tokens": 3} | fields


def chat_body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Welcome to"}]
    return {"model": "demo", "messages": messages, "max_tokens": 3} | fields


def sse_data(response: httpx.Response) -> list[Any]:
    """The data of every event but the last, which must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
