"""One HTTP exchange that works for as long as its client listens, and not a moment longer.

A response that does its work when it is sent: reading, computing and sending are then one
coroutine, which is cancelled as a whole when the client goes away.
"""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from milliways.cluster.ingress.openai.errors import refusal

# nginx's code for it: for logs and metrics, nobody receives it.
CLIENT_GONE = "499"

Work = Callable[[bytes, "Sender"], Awaitable[None]]


class Sender:
    """What a work sends with: one response, or the pieces of a stream."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connection = (scope, receive, send)
        self.has_begun = False

    async def respond(self, response: Response) -> None:
        """Sends a whole response."""
        self.has_begun = True
        await response(*self._connection)

    async def begin_events(self) -> None:
        """Sends the head of a stream of server-sent events."""
        self.has_begun = True
        head = Response(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        # The length of a body that has just begun is not known.
        headers = [(name, value) for name, value in head.raw_headers if name != b"content-length"]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_piece(self, piece: str, *, is_last: bool = False) -> None:
        """Sends a piece; waits while the client is slow."""
        body = piece.encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def _send(self, message: dict[str, object]) -> None:
        await self._connection[2](message)


class Exchange(Response):
    """Reads a bounded JSON body, then works until done or until the client is gone."""

    def __init__(
        self, work: Work, max_body_bytes: int, when_gone: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._work = work
        self._max_body_bytes = max_body_bytes
        self._when_gone = when_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(Request(scope, receive), self._max_body_bytes)
        work = asyncio.ensure_future(self._work(body, Sender(scope, receive, send)))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            was_cut_off = not work.done()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if was_cut_off:
            self._when_gone()
        else:
            work.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The body, whether its length was announced or not.

    Raises:
        HTTPException: it is no JSON by its type, or longer than the limit.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        message = f"content-type = {kind[:100]!r}: must be 'application/json'"
        raise refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message)
    too_large = f"the body must be at most {max_bytes} bytes long"
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > max_bytes:
        raise refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large)
    return bytes(body)
