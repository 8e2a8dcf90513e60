"""Fields that other servers have too, over HTTP with a real model; a stream is as the whole."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.served_model import ServedModel
from tests.http_apps import CHAT, COMPLETIONS, body, chat_body, post, sse_data
from tests.ingresses import demo_model, local_source, make_ingress
from tests.sources import CountingSource, LocalSource

PROMPT = "The answer to life the universe and everything is of course"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


@pytest.fixture(scope="module")
def source() -> Iterator[LocalSource]:
    with local_source() as source:
        yield source


class Door:
    """An ingress of a real model; asks, and compares the stream with the whole answer."""

    def __init__(self, source: LocalSource, model: ServedModel) -> None:
        self._app = make_http_app(make_ingress(source, model))
        self.model = model

    def ask(self, path: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
        usual = body(prompt=PROMPT, temperature=0, max_tokens=8, return_token_ids=True)
        whole = asyncio.run(self._post(path, usual | fields)).json()
        assert "error" not in whole, whole
        if "prompt_logprobs" not in fields and fields.get("best_of", 1) == fields.get("n", 1):
            options = {"stream": True, "stream_options": {"include_usage": True}}
            streamed = sse_data(asyncio.run(self._post(path, usual | fields | options)))
            self._compare(streamed, whole)
        return whole

    async def _post(self, path: str, ask: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=ask, timeout=60)

    def _compare(self, chunks: list[Any], whole: dict[str, Any]) -> None:
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        (choice,) = whole["choices"]
        assert "".join(c["text"] for c in choices) == choice["text"]
        assert [i for c in choices for i in c["token_ids"]] == choice["token_ids"]
        for name in ("finish_reason", "stop_reason"):
            assert choices[-1][name] == choice[name]
        assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def door(source: LocalSource, model: ServedModel) -> Door:
    return Door(source, model)


def only(whole: dict[str, Any]) -> dict[str, Any]:
    (choice,) = whole["choices"]
    return choice


def test_sample_has_at_least_its_tokens(door: Door) -> None:
    usual = only(door.ask())
    assert (usual["text"], usual["finish_reason"]) == (" 42.", "stop")
    assert usual["token_ids"][-1] == door.model.config.eos_token
    longer = only(door.ask(min_tokens=7))
    assert len(longer["token_ids"]) >= 7
    assert door.model.config.eos_token not in longer["token_ids"][:7]
    assert longer["token_ids"][: len(usual["token_ids"]) - 1] == usual["token_ids"][:-1]


def test_stop_token_ends_a_sample(door: Door) -> None:
    first, second, *_ = only(door.ask())["token_ids"]
    stopped = only(door.ask(stop_token_ids=[second], ignore_eos=True))
    assert stopped["token_ids"] == [first, second]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", second)
    shown = only(door.ask(stop_token_ids=[second], include_stop_str_in_output=True))
    assert (shown["text"], stopped["text"]) == (" 4", " ")


def test_stop_string_is_named_and_may_be_shown(door: Door) -> None:
    stopped = only(door.ask(stop=["2", "zz"]))
    assert (stopped["text"], stopped["stop_reason"]) == (" 4", "2")
    shown = only(door.ask(stop=["2", "zz"], include_stop_str_in_output=True))
    assert (shown["text"], shown["stop_reason"]) == (" 42", "2")


def test_only_allowed_tokens_are_drawn(door: Door) -> None:
    allowed = [40, 41, 42, 43]
    drawn = only(door.ask(allowed_token_ids=allowed, temperature=1.0, seed=-5))
    assert len(drawn["token_ids"]) == 8 and set(drawn["token_ids"]) <= set(allowed)


def test_bad_words_do_not_come(door: Door) -> None:
    assert "42" not in only(door.ask(bad_words=["42"], max_tokens=16))["text"]
    assert "planet" in only(door.ask(prompt="Welcome to"))["text"]
    assert "planet" not in only(door.ask(prompt="Welcome to", bad_words=["planet"]))["text"]


def test_special_tokens_may_be_shown(door: Door) -> None:
    eos = door.model.config.eos_token
    name = door.model.token_name(eos)
    fields = {"skip_special_tokens": False, "ignore_eos": True}
    shown = only(door.ask(**fields))
    place = shown["token_ids"].index(eos)
    assert place > 0
    assert f" 42. {name}" in shown["text"]
    assert f" 42.{name}" in only(door.ask(**fields, spaces_between_special_tokens=False))["text"]
    assert name not in only(door.ask(ignore_eos=True))["text"]


def test_prompt_may_be_cut_to_its_last_tokens(door: Door) -> None:
    ids = door.model.encode(PROMPT)
    cut = door.ask(truncate_prompt_tokens=4, echo=True)
    assert cut["usage"]["prompt_tokens"] == 4
    assert only(cut)["text"].startswith(door.model.echo(ids[-4:]))
    assert only(cut)["token_ids"] == only(door.ask(prompt=list(ids[-4:])))["token_ids"]
    assert only(door.ask(truncate_prompt_tokens=-1)) == only(door.ask())


def test_prompt_is_scored_in_the_form_of_vllm(door: Door) -> None:
    ids = door.model.encode(PROMPT)
    fields = {"prompt_logprobs": 2, "logprobs": 0, "echo": True}
    choice = only(door.ask(**fields))
    first, *scored = choice["prompt_logprobs"]
    assert first is None and len(scored) == len(ids) - 1
    echoed = choice["logprobs"]["token_logprobs"][1 : len(ids)]
    for token_id, score, logprob in zip(ids[1:], scored, echoed, strict=True):
        assert score[str(token_id)]["logprob"] == logprob
        assert len(score) in (2, 3)
        assert sum(each["rank"] == 1 for each in score.values()) == 1
    # The echo has no most likely tokens, as it asked for none.
    assert choice["logprobs"]["top_logprobs"][1] == {}


def test_best_samples_are_those_with_the_best_logprobs(door: Door) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "seed": 4, "logprobs": 0}
    every = door.ask(**fields, n=6, best_of=6, prompt_logprobs=0)["choices"]
    best = door.ask(**fields, n=2, best_of=6)
    means = [
        sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in every
    ]
    order = sorted(range(6), key=lambda i: -means[i])
    assert [c["token_ids"] for c in best["choices"]] == [every[i]["token_ids"] for i in order[:2]]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in every)


def test_tokens_that_were_there_are_counted(door: Door) -> None:
    prompt = "Cached: " + "the towel is massively useful. " * 4
    first = door.ask(prompt=prompt, prompt_logprobs=None, best_of=2)
    again = door.ask(prompt=prompt)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 16 <= cached < again["usage"]["prompt_tokens"]
    assert only(again)["token_ids"] == first["choices"][0]["token_ids"]


def test_each_chunk_has_the_usage_so_far(model: ServedModel) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, ask in ((COMPLETIONS, body()), (CHAT, chat_body())):
        fields = {"stream": True, "stream_options": options}
        *chunks, last = sse_data(post(CountingSource(), model, path, json=ask | fields))
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
        assert chunks[-1]["usage"] == last["usage"]
    alone = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    chunks = sse_data(post(CountingSource(), model, COMPLETIONS, json=body(**alone)))
    assert all("usage" not in chunk for chunk in chunks)


def test_chat_scores_its_prompt_beside_its_choices(model: ServedModel) -> None:
    response = post(CountingSource(), model, CHAT, json=chat_body(prompt_logprobs=1))
    answer = json.loads(response.text)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in answer["choices"][0]
