"""Streams an answer as server-sent events.

An event is one line, `data: ` and JSON, and a blank line: several clients of the field know no
other lines. What a client needs to resume (see `resume.py`) it gets only if it asks for it, as a
line `id:` of each event, or as a field of its JSON.

While nothing is sent, a blank line keeps proxies awake. Parsers of events skip blank lines, and so
do the clients that read line by line; a comment would break these. After a line `id:`, however, a
blank line is an event without data to OpenAI's client. So such a stream has comments.
"""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from milliways.cluster.ingress.ingress import IngressEvent, PromptEvent, off_loop
from milliways.cluster.ingress.openai.errors import error_body, http_status
from milliways.cluster.ingress.openai.exchange import Pace, Sender
from milliways.cluster.ingress.openai.responses import Answer
from milliways.cluster.ingress.outcome import Outcome
from milliways.cluster.ingress.resume import CursorForm, event_id
from milliways.wire.errors import LeavingError

# Made once: `json.dumps` would make one for each token.
_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DONE = "data: [DONE]\n\n"
# Approximate size in JSON of one log-probability.
_BYTES_PER_SCORE = 30
_BLANK = "\n"
_COMMENT = ":\n"
CURSOR_FIELD = "milliways_cursor"

Packed = TypeVar("Packed")


class EventStream:
    """The events of one answer.

    *Invariant:* `_cursor` is that of the last event sent, "" before the first.
    """

    def __init__(
        self,
        answer: Answer,
        sender: Sender,
        request_id: str,
        form: CursorForm,
        pace: Pace,
    ) -> None:
        self._answer = answer
        self._sender = sender
        self._request_id = request_id
        self._form = form
        self._pace = pace
        self._cursor = ""

    async def run(self, events: AsyncGenerator[IngressEvent], outcome: Outcome) -> None:
        """Sends chunks, then [DONE]. A client may resume a stream that ended without [DONE].

        If this server stops before, an error event takes the place of [DONE].

        An error before the status is sent is raised, and becomes an HTTP error.
        """
        line = _COMMENT if self._form is CursorForm.LINE else _BLANK
        async with self._sender.kept_awake(line, self._pace):
            try:
                await self._send_chunks(events)
            except Exception as error:
                if not self._sender.has_begun:
                    raise
                await self._fail(error, outcome)
                return
            await self.end()

    async def end(self, *, has_usage: bool = False) -> None:
        """Sends the usage, if the client asked for it and lacks it, and [DONE]."""
        if not self._sender.has_begun:
            await self._sender.begin_events()
        if self._answer.ask.include_usage and not has_usage:
            self._cursor = self._cursor_now(has_usage=True)
            await self._send(self._answer.usage_chunk())
        await self._sender.send_piece(_DONE, is_last=True)

    async def _send_chunks(self, events: AsyncGenerator[IngressEvent]) -> None:
        async for event in events:
            if isinstance(event, PromptEvent):
                self._answer.keep_scores(event)
                continue
            chunk = self._answer.chunk(event)
            if chunk is not None and event.is_new:
                if not self._sender.has_begun:
                    await self._sender.begin_events()
                self._cursor = self._cursor_now()
                await self._send(chunk)
        # A client that resumed after the last token has no chunk to receive.
        if not self._sender.has_begun:
            await self._sender.begin_events()
        if self._answer.ask.draws_nothing:
            self._cursor = self._cursor_now()
            piece = await run_off_loop(self._answer, self._answer.only_chunk, self._event)
            await self._sender.send_piece(piece)

    async def _fail(self, error: Exception, outcome: Outcome) -> None:
        outcome.fail(error, http_status(error))
        # With the cursor of the last event, since the client has received as much as before.
        await self._send(error_body(error))
        if isinstance(error, LeavingError):
            # Not the end of the stream: the client gets the rest elsewhere.
            await self._sender.end()
        else:
            await self._sender.send_piece(_DONE, is_last=True)

    async def _send(self, data: dict[str, Any]) -> None:
        await self._sender.send_piece(self._event(data))

    def _event(self, data: dict[str, Any]) -> str:
        """One event; its cursor says how much a client has received up to and including it."""
        head = ""
        if self._cursor and self._form is CursorForm.LINE:
            head = f"id: {self._cursor}\n"
        elif self._cursor and self._form is CursorForm.JSON:
            data = data | {CURSOR_FIELD: self._cursor}
        return f"{head}data: {_JSON.encode(data)}\n\n"

    def _cursor_now(self, *, has_usage: bool = False) -> str:
        if self._form is CursorForm.NONE:
            return ""
        answer = self._answer
        return event_id(
            self._request_id, answer.counts, answer.model.fingerprint, has_usage=has_usage
        )


async def run_off_loop(
    answer: Answer, make: Callable[[], dict[str, Any]], pack: Callable[[dict[str, Any]], Packed]
) -> Packed:
    """Makes a piece of JSON; on a thread if it holds the log-probabilities of long prompts."""
    return await off_loop(lambda: pack(make()), answer.num_scores * _BYTES_PER_SCORE)
