"""One HTTP request with its response, cancelled as a whole when the client disconnects.

`Exchange` is a Starlette response whose handler runs while the response is sent. Reading the body,
computing and sending are then one task, so that one cancellation stops them all.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from milliways.cluster.ingress.openai.errors import refusal

# nginx's code for a client that disconnected. Only logs and metrics show it; it is never sent.
CLIENT_GONE = "499"
# A client that is slower with its body gives up its place to others.
BODY_WITHIN_S = 10.0

Handler = Callable[[bytes, "Sender"], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a stream sends while it has nothing to say.

    `headers_after_s`: status and headers do not wait longer for the first event. Refusals come
    sooner than that, and so have a status of their own. `quiet_s`: the longest silence after that.
    """

    headers_after_s: float = 1.0
    quiet_s: float = 15.0


class Sender:
    """Sends one whole response, or a stream of server-sent events in pieces.

    *Invariant:* once `has_begun` is set, the status line may be on the wire: an error can no longer
    change the status.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connection = (scope, receive, send)
        self.has_begun = False
        # More headers of the response, if it is not an error.
        self.headers: dict[str, str] = {}
        self._sent_at_s = 0.0
        # Two tasks send: one the events, one the lines between them.
        self._sending = asyncio.Lock()

    async def respond(self, response: Response) -> None:
        """Sends a whole response."""
        self.has_begun = True
        response.headers.update(self.headers)
        await response(*self._connection)

    async def begin_events(self) -> None:
        """Sends the status and the headers of a stream of server-sent events."""
        self.has_begun = True
        head = Response(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | self.headers,
        )
        # A stream's length is not known when it begins.
        headers = [(name, value) for name, value in head.raw_headers if name != b"content-length"]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_piece(self, piece: str, *, is_last: bool = False) -> None:
        """Sends a piece of the body; waits while the client is slow to read."""
        body = piece.encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def end(self) -> None:
        """Ends the body."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def kept_awake(self, line: str, pace: Pace) -> AsyncGenerator[None]:
        """Inside this block, a stream begins soon, and sends `line` when it is long silent."""
        task = asyncio.create_task(self._keep_awake(line, pace))
        try:
            yield
        finally:
            # Not awaited: once the last piece is sent, the client may be gone, and a handler that
            # still runs then counts as cancelled.
            task.cancel()

    async def _keep_awake(self, line: str, pace: Pace) -> None:
        await asyncio.sleep(pace.headers_after_s)
        if not self.has_begun:
            await self.begin_events()
        while True:
            left_s = self._sent_at_s + pace.quiet_s - time.monotonic()
            if left_s <= 0:
                await self.send_piece(line)
            else:
                await asyncio.sleep(left_s)

    async def _send(self, message: dict[str, object]) -> None:
        async with self._sending:
            await self._connection[2](message)
            self._sent_at_s = time.monotonic()


class Exchange(Response):
    """Reads a JSON body of limited size, then runs the handler until it ends or the client leaves.

    `on_disconnect` is called if the client left first.
    """

    def __init__(
        self,
        handler: Handler,
        max_body_bytes: int,
        on_disconnect: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._handler = handler
        self._max_body_bytes = max_body_bytes
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(Request(scope, receive), self._max_body_bytes)
        except ClientDisconnect:
            # Nobody reads an answer.
            self._on_disconnect()
            return
        handling = asyncio.ensure_future(self._handler(body, Sender(scope, receive, send)))
        disconnect = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((handling, disconnect), return_when=asyncio.FIRST_COMPLETED)
        finally:
            has_left = not handling.done()
            for task in (handling, disconnect):
                task.cancel()
            await asyncio.gather(handling, disconnect, return_exceptions=True)
        if has_left:
            self._on_disconnect()
        else:
            handling.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Reads the body, with or without a content-length header.

    Raises:
        HTTPException: the content type is not JSON, the body is longer than the limit, or it does
            not come in time.
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
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large)
    except TimeoutError:
        message = f"the body did not come within {BODY_WITHIN_S:g} s"
        raise refusal(HTTPStatus.REQUEST_TIMEOUT, message) from None
    return bytes(body)
