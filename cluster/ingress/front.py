"""What stands before everything else in the proxy: it lets in only what the rest can take.

    app = Front(app)  # an ASGI application

- A request is passed on when its body is here. One that does not come within ten seconds is
  answered with 408: it has held a task of the proxy, and no place in the queue of a replica.
- Headers that Ray Serve takes as orders, such as a time limit, are for its own clients: those of
  strangers are dropped. Serve also fails on bytes that are no UTF-8; they are written as UTF-8.
- A request without an id gets one, which is that of its answer and of logs.

*Invariant:* the bodies that are held together have at most `max_held_bytes`; what comes beyond them
is passed on as it comes.
"""

import asyncio
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milliways.cluster.ingress.openai.errors import error_response, refusal
from milliways.cluster.ingress.openai.exchange import BODY_WITHIN_S
from milliways.cluster.ingress.request_id import name_of

_MAX_HELD_BYTES = 256 << 20
# In lower case, with - for _: Serve takes both.
_ORDERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"x-session-id",
    }
)
_BODILESS = ("GET", "HEAD", "OPTIONS")
Headers = list[tuple[bytes, bytes]]


class Front:
    """Wraps an application; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        body_within_s: float = BODY_WITHIN_S,
        max_held_bytes: int = _MAX_HELD_BYTES,
    ) -> None:
        self._app = app
        self._body_within_s = body_within_s
        self._max_held_bytes = max_held_bytes
        self._num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": fit_headers(scope["headers"])}
        if scope["method"] in _BODILESS:
            await self._app(scope, receive, send)
            return
        held: list[Message] = []
        try:
            if not await self._read(receive, held):
                message = f"the body did not come within {self._body_within_s:g} s"
                response = error_response(refusal(HTTPStatus.REQUEST_TIMEOUT, message))
                # What still comes of this body is not the next request.
                response.headers["connection"] = "close"
                await response(scope, receive, send)
                return
            await self._app(scope, _first(held, receive), send)
        finally:
            self._num_held_bytes -= sum(map(_size, held))

    async def _read(self, receive: Receive, held: list[Message]) -> bool:
        """Reads a body, as far as there is room; False if it does not come in time."""
        try:
            async with asyncio.timeout(self._body_within_s):
                while self._num_held_bytes < self._max_held_bytes:
                    message = await receive()
                    held.append(message)
                    self._num_held_bytes += _size(message)
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        break
        except TimeoutError:
            return False
        return True


def fit_headers(headers: Headers) -> Headers:
    """Headers as Serve can read them, with an id of the request."""
    kept = [(name, _as_utf8(value)) for name, value in headers if not _is_order(name)]
    given = dict(reversed(headers))
    name = name_of(given.get(b"x-request-id"), given.get(b"last-event-id"))
    others = [header for header in kept if header[0] != b"x-request-id"]
    return [*others, (b"x-request-id", name.encode())]


def _is_order(name: bytes) -> bool:
    return name.lower().replace(b"_", b"-") in _ORDERS


def _as_utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value


def _size(message: Message) -> int:
    return len(message.get("body", b""))


def _first(held: list[Message], receive: Receive) -> Receive:
    """Gives the messages that were held, then those that come."""
    messages = iter(held)

    async def next_message() -> Message:
        message = next(messages, None)
        return await receive() if message is None else message

    return next_message
