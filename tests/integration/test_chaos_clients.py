"""The clients of `milliways chaos`: they go on where a connection broke, and say that it did."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milliways.benchmarks.chaos.answers import Answer, difference
from milliways.benchmarks.chaos.asks import MODES, Ask, Surface, draw_asks
from milliways.benchmarks.chaos.clients import AnswerError, HttpClient
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.served_model import ServedModel
from tests.ingresses import demo_model, local_source, make_ingress, served
from tests.sources import LocalSource

EVERY_ASK = draw_asks(2 * len(MODES), max_tokens=6, seed=1)
ASKS = [ask for ask in EVERY_ASK if ask.surface is Surface.HTTP]


class ConnectionCutError(Exception):
    """As if the process had died."""


@dataclass
class Cutting:
    """Cuts streams before they have sent so many pieces; says why nothing comes at first."""

    app: ASGIApp
    before_pieces: list[int] = field(default_factory=list)
    refusals: list[Message] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.refusals:
            await send(self.refusals.pop(0))
            await send({"type": "http.response.body", "body": b"{}"})
            return
        num_left = self.before_pieces.pop(0) if self.before_pieces else -1

        async def send_some(message: Message) -> None:
            nonlocal num_left
            if message["type"] == "http.response.body":
                if num_left == 0:
                    # A part of an event is worth nothing.
                    cut = message | {"body": message["body"][:-3], "more_body": True}
                    await send(cut)
                    raise ConnectionCutError
                num_left -= 1
            await send(message)

        await self.app(scope, receive, send_some)


def refusal(status: int, kind: bytes) -> Message:
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", kind)],
    }


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


@pytest.fixture(scope="module")
def source() -> Iterator[LocalSource]:
    with local_source() as source:
        yield source


@pytest.fixture
def cutting(model: ServedModel, source: LocalSource) -> Iterator[tuple[Cutting, HttpClient]]:
    cutting = Cutting(make_http_app(make_ingress(source, model)))
    with served(lambda: cutting) as url:
        yield cutting, HttpClient(url, "demo")


def asked(client: HttpClient, ask: Ask) -> Answer:
    answer = Answer.of(ask)
    client.ask(ask, answer)
    assert answer.is_complete
    return answer


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.mode)
def test_stream_that_is_cut_anywhere_is_the_same_answer(
    cutting: tuple[Cutting, HttpClient], ask: Ask
) -> None:
    app, client = cutting
    whole = asked(client, ask)
    assert whole.breaks == []
    for cuts in ([0], [1], [2, 0, 1], [3, 3]):
        app.before_pieces = list(cuts)
        again = asked(client, ask)
        assert difference(whole, again) == ""
        assert len(again.breaks) == len(cuts) - len(app.before_pieces)
        assert again.breaks


@pytest.mark.parametrize(
    "told", [(503, b"application/json"), (429, b"application/json"), (500, b"text/plain")]
)
def test_who_cannot_serve_now_is_asked_again(
    cutting: tuple[Cutting, HttpClient], told: tuple[int, bytes]
) -> None:
    app, client = cutting
    app.refusals = [refusal(*told)]
    assert len(asked(client, ASKS[0]).breaks) == 1


@pytest.mark.parametrize("told", [(400, b"application/json"), (500, b"application/json")])
def test_refusal_is_no_break(cutting: tuple[Cutting, HttpClient], told: tuple[int, bytes]) -> None:
    app, client = cutting
    app.refusals = [refusal(*told)]
    answer = Answer.of(ASKS[0])
    with pytest.raises(AnswerError, match=f"HTTP {told[0]}"):
        client.ask(ASKS[0], answer)
    assert answer.breaks == []
