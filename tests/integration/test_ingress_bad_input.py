"""Requests that the HTTP API refuses; each refusal names the one field that is wrong."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from milliways.cluster.ingress.served_model import ServedModel
from tests.http_apps import CHAT, COMPLETIONS, MAX_BODY_BYTES, body, chat_body, post, run
from tests.ingresses import demo_model
from tests.sources import CountingSource


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ["x"] * 65}),
    ("prompt", {"prompt": [7] * 600}),
    ("prompt.1", {"prompt": ["a", 5]}),
    ("prompt.1", {"prompt": [1, "a"]}),
    ("prompt.1", {"prompt": [1, True]}),
    ("prompt.0.1", {"prompt": [[1, 2.5]]}),
    ("prompt token", {"prompt": [1, 1280]}),
    ("prompt token", {"prompt": [-1]}),
    ("prompt token", {"prompt": [10**30], "echo": True}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": 5.0}),
    ("max_tokens", {"max_tokens": True}),
    ("n", {"n": 0}),
    ("n", {"n": 65}),
    ("n", {"n": 64, "prompt": [[1], [2], [3]]}),
    ("best_of", {"best_of": 65}),
    ("best_of", {"best_of": 1, "n": 2}),
    ("best_of", {"best_of": 2, "stream": True}),
    ("min_tokens", {"min_tokens": 4}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 1.0}),
    ("stop_token_ids", {"stop_token_ids": [1280]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("stop_token_ids", {"stop_token_ids": [1] * 129}),
    ("stop_token_ids.0", {"stop_token_ids": ["1"]}),
    ("allowed_token_ids", {"allowed_token_ids": []}),
    ("allowed_token_ids", {"allowed_token_ids": list(range(301))}),
    ("allowed_token_ids", {"allowed_token_ids": [10**30]}),
    ("allowed_token_ids", {"allowed_token_ids": [2], "min_tokens": 1}),
    ("bad_words", {"bad_words": [""]}),
    ("bad_words", {"bad_words": ["a", " "]}),
    ("bad_words", {"bad_words": ["word " * 100]}),
    ("bad_words", {"bad_words": [f"w{i}" for i in range(300)]}),
    ("bad_words.0", {"bad_words": [5]}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(300)}, "bad_words": ["a"]}),
    ("include_stop_str_in_output", {"include_stop_str_in_output": 1}),
    ("skip_special_tokens", {"skip_special_tokens": "no"}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": -2}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": -1}),
    ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
    ("priority", {"priority": 1}),
    ("priority", {"priority": "high"}),
    ("stop", {"stop": 5}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop.0", {"stop": [5]}),
    ("seed", {"seed": -(2**63) - 1}),
    ("seed", {"seed": 2**64}),
    ("seed", {"seed": "1"}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": -0.1}),
    ("top_p", {"top_p": 1.5}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": -1.0}),
    ("min_p", {"min_p": 2}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("presence_penalty", {"presence_penalty": 3}),
    ("frequency_penalty", {"frequency_penalty": -3}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias", {"logit_bias": {"5": 101}}),
    ("logit_bias", {"logit_bias": {"9999": 1}}),
    ("logit_bias.5", {"logit_bias": {"5": "1"}}),
    ("logit_bias", {"logit_bias": []}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("logprobs", {"logprobs": 21, "echo": True}),
    ("logprobs", {"logprobs": -1, "echo": True}),
    ("max_tokens", {"max_tokens": 0, "echo": True}),
    ("max_tokens", {"max_tokens": 0, "logprobs": 1}),
    ("max_tokens", {"max_tokens": -1, "logprobs": 1, "echo": True}),
    ("echo", {"echo": 1}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
    ("ignore_eos", {"ignore_eos": 0}),
    ("suffix", {"suffix": "the end"}),
    ("messages", {"messages": []}),
    ("model", {"model": 5}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_FIELDS)
def test_bad_completion_field_is_refused_by_name(
    model: ServedModel, field: str, fields: dict[str, Any]
) -> None:
    source = CountingSource()
    response = post(source, model, COMPLETIONS, json=body(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{field} = ")
    assert len(error["message"]) < 1000
    assert source.requests == []


MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages.0", {"messages": ["hi"]}),
        ("messages.0.role", {"messages": [{"role": "poet", "content": "x"}]}),
        ("messages.0.role", {"messages": [{"content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": None}]}),
        ("messages.1.content", {"messages": [MESSAGE, {"role": "user", "content": 5}]}),
        ("messages.0.tool_calls.0", {"messages": [MESSAGE | {"tool_calls": [5]}]}),
        ("messages[].audio", {"messages": [MESSAGE | {"audio": {"id": "x"}}]}),
        ("messages[].prefix", {"messages": [MESSAGE | {"prefix": True}]}),
        (
            "messages.0.content.0.type",
            {"messages": [MESSAGE | {"content": [{"type": "image_url"}]}]},
        ),
        ("messages.0.content.0.text", {"messages": [MESSAGE | {"content": [{"type": "text"}]}]}),
        ("prompt", {"messages": [MESSAGE | {"content": ""}]}),
        ("prompt", {"messages": [MESSAGE | {"content": "word " * 1000}]}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("logprobs", {"logprobs": 5}),
        ("top_logprobs", {"top_logprobs": 5}),
        ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("echo", {"echo": True}),
    ],
)
def test_bad_chat_field_is_refused_by_name(
    model: ServedModel, field: str, fields: dict[str, Any]
) -> None:
    response = post(CountingSource(), model, CHAT, json=chat_body(**fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


def test_long_prompt_is_refused_with_both_numbers(model: ServedModel) -> None:
    response = post(CountingSource(), model, COMPLETIONS, json=body(prompt=[7] * 513))
    error = response.json()["error"]
    assert "513" in error["message"] and "512" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_unknown_model_is_not_found(model: ServedModel) -> None:
    for path, fields in ((COMPLETIONS, body(model="x")), (CHAT, chat_body(model="x"))):
        response = post(CountingSource(), model, path, json=fields)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"5", 400),
        (b'{"model": "demo", "prompt": NaN}', 400),
        (b"\xff\xfe", 400),
        (b'{"model": "demo", "prompt": "\\ud800"}', 400),
        (b"[" * 30000, 400),
        (b'{"a":' * 10000 + b"1" + b"}" * 10000, 400),
        (b'{"model": "demo", "max_tokens": ' + b"9" * 5000 + b', "prompt": [1]}', 400),
        (b'{"model": "demo", "prompt": "' + b"x" * MAX_BODY_BYTES + b'"}', 413),
    ],
)
def test_malformed_body_is_refused(model: ServedModel, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    response = post(CountingSource(), model, COMPLETIONS, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_giant_body_without_a_length_is_refused(model: ServedModel) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1024

    headers = {"content-type": "application/json"}
    response = post(CountingSource(), model, COMPLETIONS, content=pieces(), headers=headers)
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_content_type_other_than_json_is_refused(model: ServedModel, kind: str) -> None:
    headers = {"content-type": kind}
    response = post(CountingSource(), model, COMPLETIONS, content=b"{}", headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_wrong_path_or_method_has_openai_shape(
    model: ServedModel, method: str, path: str, status: int
) -> None:
    response = run(lambda client, _: client.request(method, path), CountingSource(), model)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
