"""The clients of `milliways chaos`: they resume a broken stream, and record the break."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milliways.benchmarks.chaos.answers import Answer, difference
from milliways.benchmarks.chaos.clients import AnswerError, HttpClient
from milliways.benchmarks.chaos.requests import MODES, ChaosRequest, Surface, draw_requests
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.served_model import ServedModel
from tests.ingresses import demo_model, local_source, make_ingress, served
from tests.sources import LocalSource

EVERY_REQUEST = draw_requests(2 * len(MODES), max_tokens=6, seed=1)
REQUESTS = [request for request in EVERY_REQUEST if request.surface is Surface.HTTP]


class ConnectionCutError(Exception):
    """Stands for the death of the ingress process."""


@dataclass
class Cutting:
    """Cuts each stream after some pieces, and answers first with the given refusals."""

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

        is_cut = False

        async def send_some(message: Message) -> None:
            nonlocal num_left, is_cut
            if is_cut:
                # A dead process sends nothing any more, whatever it would like to say.
                raise ConnectionCutError
            if message["type"] == "http.response.body":
                if num_left == 0:
                    # A client must ignore an incomplete event.
                    cut = message | {"body": message["body"][:-3], "more_body": True}
                    await send(cut)
                    is_cut = True
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


def answer_to(client: HttpClient, sent: ChaosRequest) -> Answer:
    answer = Answer.of(sent)
    client.send(sent, answer)
    assert answer.is_complete
    return answer


@pytest.mark.parametrize("sent", REQUESTS, ids=lambda sent: sent.mode)
def test_stream_that_is_cut_anywhere_is_the_same_answer(
    cutting: tuple[Cutting, HttpClient], sent: ChaosRequest
) -> None:
    app, client = cutting
    whole = answer_to(client, sent)
    assert whole.breaks == []
    for cuts in ([0], [1], [2, 0, 1], [3, 3]):
        app.before_pieces = list(cuts)
        again = answer_to(client, sent)
        assert difference(whole, again) == ""
        assert len(again.breaks) == len(cuts) - len(app.before_pieces)
        assert again.breaks


@pytest.mark.parametrize(
    "status_and_type",
    [(503, b"application/json"), (429, b"application/json"), (500, b"text/plain")],
)
def test_server_that_cannot_serve_now_gets_the_request_again(
    cutting: tuple[Cutting, HttpClient], status_and_type: tuple[int, bytes]
) -> None:
    app, client = cutting
    app.refusals = [refusal(*status_and_type)]
    assert len(answer_to(client, REQUESTS[0]).breaks) == 1


@pytest.mark.parametrize(
    "status_and_type", [(400, b"application/json"), (500, b"application/json")]
)
def test_refusal_is_not_a_break(
    cutting: tuple[Cutting, HttpClient], status_and_type: tuple[int, bytes]
) -> None:
    app, client = cutting
    app.refusals = [refusal(*status_and_type)]
    answer = Answer.of(REQUESTS[0])
    with pytest.raises(AnswerError, match=f"HTTP {status_and_type[0]}"):
        client.send(REQUESTS[0], answer)
    assert answer.breaks == []
