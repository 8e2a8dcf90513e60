"""The Python API on the demo model: in this process, and as a client of a server."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milliways import LLM, AsyncClient, Client, SamplingParams
from milliways.api.errors import (
    CallRefusedError,
    CheckpointError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    PoisonedRequestError,
    TokenizerError,
    UnavailableError,
)
from milliways.cluster.ingress.served_model import ServedModel
from milliways.wire.tls import TlsSettings
from tests.certificates import make_certificates
from tests.ingresses import demo_model, grpc_served, local_source
from tests.sources import CountingSource, LocalSource

ANSWER = "The answer to life the universe and everything is of course"
PROMPTS = [ANSWER, "Welcome to", (7, 100)]
GREEDY = SamplingParams(temperature=0, max_tokens=6)
VARIED = [
    SamplingParams(temperature=0, max_tokens=8, logprobs=2),
    SamplingParams(temperature=0.7, top_p=0.9, seed=5, max_tokens=6, n=2, logprobs=0),
    SamplingParams(temperature=1.2, min_p=0.01, max_tokens=5, stop=["e", "a"], ignore_eos=True),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_running=8) as made:
        yield made


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return demo_model()


@pytest.fixture(scope="module")
def engine_source() -> Iterator[LocalSource]:
    with local_source() as source:
        yield source


def test_prompts_are_continued_in_their_order(llm: LLM) -> None:
    results = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=5))
    assert [result.prompt for result in results] == PROMPTS
    answer = results[0]
    assert (answer.text, answer.finish_reason) == (" 42.", "stop")
    assert answer.usage.num_prompt_tokens == len(llm.encode(ANSWER))
    assert answer.usage.num_completion_tokens == len(answer.token_ids) == 5
    assert answer.logprobs is None
    assert results[1].finish_reason == "length" and len(results[1].token_ids) == 5


def test_nothing_asked_is_nothing_answered(llm: LLM) -> None:
    assert llm.generate([]) == [] and llm.score([]) == []


def test_batch_gives_each_prompt_what_it_gets_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, VARIED)
    for prompt, params, result in zip(PROMPTS, VARIED, together, strict=True):
        assert llm.generate([prompt], params) == [result]
    assert [len(result.samples) for result in together] == [1, 2, 1]
    logprobs = together[0].logprobs
    assert logprobs is not None and [len(entry.top) for entry in logprobs] == [2] * len(logprobs)
    assert [entry.token_id for entry in logprobs] == list(together[0].token_ids)


def test_stream_joins_to_the_result(llm: LLM) -> None:
    for prompt, params in zip(PROMPTS, VARIED, strict=True):
        (result,) = llm.generate([prompt], params)
        pieces = list(llm.stream(prompt, params))
        for sample in result.samples:
            own = [piece for piece in pieces if piece.sample_index == sample.index]
            assert "".join(piece.text for piece in own) == sample.text
            assert tuple(piece.token_id for piece in own) == sample.token_ids
            assert own[-1].finish_reason == sample.finish_reason


def test_stream_that_is_left_does_not_disturb_others(llm: LLM) -> None:
    left = llm.stream("Welcome to", SamplingParams(temperature=0, max_tokens=100))
    next(left)
    paused = llm.stream("Welcome to", GREEDY)
    first = next(paused)
    (result,) = llm.generate(["Welcome to"], GREEDY)
    left.close()
    assert "".join(piece.text for piece in [first, *paused]) == result.text


def test_threads_share_a_model(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, VARIED)
    results: list[Any] = [None] * len(PROMPTS)

    def run(index: int) -> None:
        results[index] = llm.generate([PROMPTS[index]], VARIED[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[result] for result in expected]


def test_score_of_a_text_is_that_of_drawing_it(llm: LLM) -> None:
    (result,) = llm.generate([(7, 100)], SamplingParams(temperature=0, max_tokens=4, logprobs=1))
    scores = llm.score([(7, 100, *result.token_ids), "Welcome to", [5]], top=1)
    assert result.logprobs is not None
    assert scores[0].tokens[1:] == result.logprobs
    assert scores[0].total == sum(token.logprob for token in scores[0].tokens)
    ids = llm.encode("Welcome to")
    assert [token.token_id for token in scores[1].tokens] == ids[1:]
    assert (scores[2].tokens, scores[2].total) == ((), 0)


def test_text_becomes_tokens_and_text_again(llm: LLM) -> None:
    assert llm.decode(llm.encode("Don't panic.")) == "Don't panic."


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("dtype", {"dtype": "float16"}),
        ("activations", {"activations": "int4"}),
        ("experts", {"experts": "lost"}),
        ("threads", {"threads": 0}),
        ("max_running", {"max_running": 0}),
        ("kv_cache_tokens", {"kv_cache_tokens": 1}),
    ],
)
def test_bad_option_is_refused_by_name(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        LLM("demo", **options)
    assert caught.value.field == field


def test_model_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="/no/such/model"):
        LLM("/no/such/model")


def test_prompt_that_does_not_fit_is_refused_before_anything_is_computed(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="at most 512 tokens"):
        llm.generate(["Welcome to", [5] * 513])
    # By the call itself, and not by the first `next`.
    with pytest.raises(InvalidRequestError):
        llm.stream([5] * 513)
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.score([""])


def test_model_without_a_tokenizer_takes_token_ids(golden_dir: Path) -> None:
    with LLM(golden_dir / "tiny") as bare:
        (result,) = bare.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=2))
        assert (len(result.token_ids), result.text) == (2, "")
        with pytest.raises(TokenizerError, match="token ids"):
            bare.generate(["text"])


def test_closed_model_says_so() -> None:
    made = LLM("demo")
    made.close()
    with pytest.raises(ValueError, match="closed"):
        made.generate(["Welcome to"])


def test_client_gives_what_the_model_gives(
    llm: LLM, served: ServedModel, engine_source: LocalSource
) -> None:
    with grpc_served(engine_source, served) as address, Client(address) as client:
        assert client.generate(PROMPTS, VARIED) == llm.generate(PROMPTS, VARIED)
        assert client.score(PROMPTS, top=2) == llm.score(PROMPTS, top=2)
        for prompt, params in zip(PROMPTS, VARIED, strict=True):
            (result,) = client.generate([prompt], params)
            pieces = list(client.stream(prompt, params))
            texts = [
                "".join(p.text for p in pieces if p.sample_index == i) for i in range(params.n)
            ]
            assert texts == [sample.text for sample in result.samples]


def test_async_client_runs_calls_beside_each_other(
    llm: LLM, served: ServedModel, engine_source: LocalSource
) -> None:
    async def main(address: str) -> None:
        async with AsyncClient(address, max_in_flight=2) as client:
            both = await asyncio.gather(
                client.generate(PROMPTS, GREEDY), client.generate(PROMPTS[:1], GREEDY)
            )
            pieces = [piece async for piece in client.stream(ANSWER, GREEDY)]
        expected = llm.generate(PROMPTS, GREEDY)
        assert both == [expected, expected[:1]]
        assert "".join(piece.text for piece in pieces) == " 42."

    with grpc_served(engine_source, served) as address:
        asyncio.run(main(address))


def test_stream_outlives_a_server_that_dies(served: ServedModel) -> None:
    dying = CountingSource(error=UnavailableError("died"), num_before_error=2)
    params = SamplingParams(max_tokens=4)
    with (
        grpc_served(CountingSource(), served) as alive,
        grpc_served(dying, served) as dead,
    ):
        with Client(alive) as client:
            expected = client.generate([(7, 100)], params)
        # A client begins at a random address, and stays where it is served: one of many begins at
        # the one that dies.
        for _ in range(20):
            with Client([dead, alive]) as client:
                assert client.generate([(7, 100)], params) == expected
    assert dying.requests


def test_full_server_is_asked_again_until_the_time_limit(served: ServedModel) -> None:
    full = CountingSource(error=OverloadedError("full", retry_after_s=0.05))
    with grpc_served(full, served) as address, Client(address) as client:
        with pytest.raises(OverloadedError):
            client.generate([(7, 100)], timeout_s=0.5)
        assert len(full.requests) > 2
        full.error = None
        assert len(client.generate([(7, 100)])[0].token_ids) == 16


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PoisonedRequestError("died of it"), PoisonedRequestError),
        (DeadlineError("late"), DeadlineError),
    ],
)
def test_error_of_a_server_keeps_its_type(
    served: ServedModel, error: Exception, kind: type[Exception]
) -> None:
    with grpc_served(CountingSource(error=error), served) as address, Client(address) as client:
        with pytest.raises(kind, match=str(error)):
            client.generate([(7, 100)])
        with pytest.raises(kind, match=str(error)):
            list(client.stream((7, 100)))


def test_bad_request_names_its_field(served: ServedModel) -> None:
    with grpc_served(CountingSource(), served) as address:
        with Client(address) as client, pytest.raises(InvalidRequestError) as caught:
            client.generate([(7, 5000)])
        assert (caught.value.field, repr(caught.value.value)) == ("prompt token", "5000")
        with Client(address, model="other") as client, pytest.raises(CallRefusedError) as refused:
            client.generate(["text"])
        assert refused.value.code == "NOT_FOUND"


def test_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.generate(["text"], timeout_s=0.3)


def test_stream_that_is_left_is_cancelled_at_the_server(served: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(1))
    with grpc_served(source, served) as address, Client(address) as client:
        stream = client.stream((7, 100))
        next(stream)
        stream.close()
        for _ in range(1000):
            if source.num_closed_early:
                break
            threading.Event().wait(0.01)
    assert (source.num_running, source.num_closed_early) == (0, 1)


def test_client_that_is_closed_ends_its_calls(served: ServedModel) -> None:
    source = CountingSource(gate=asyncio.Semaphore(1))
    with grpc_served(source, served) as address:
        client = Client(address)
        stream = client.stream((7, 100))
        next(stream)
        closing = threading.Timer(0.2, client.close)
        closing.start()
        with pytest.raises((ValueError, UnavailableError)):
            list(stream)
        closing.join(30)
        client.close()
        with pytest.raises(ValueError, match="closed"):
            client.generate(["text"])


def test_connection_is_encrypted_where_certificates_are_given(
    served: ServedModel, tmp_path: Path
) -> None:
    tls = make_certificates(tmp_path / "ours")
    other = make_certificates(tmp_path / "other")
    params = SamplingParams(max_tokens=3)
    with grpc_served(CountingSource(), served, tls=tls) as address:
        with Client(address, tls=tls) as client:
            assert len(client.generate([(7, 100)], params)[0].token_ids) == 3
        for wrong in (other, TlsSettings()):
            with Client(address, tls=wrong) as client, pytest.raises(UnavailableError):
                client.generate([(7, 100)], params, timeout_s=0.3)
