"""Endpoints beside the completions: tokens, what the server is, HEAD, and other origins."""

from typing import Any

import httpx
import pytest

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.served_model import ServedModel
from tests.http_apps import CHAT, COMPLETIONS, body, chat_body, post, run
from tests.ingresses import demo_model
from tests.sources import CountingSource

TEXT = "Don't panic. Größe 42"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def asked(model: ServedModel, method: str, path: str, **options: Any) -> httpx.Response:
    settings = options.pop("settings", {})
    return run(
        lambda client, _: client.request(method, path, **options),
        CountingSource(),
        model,
        **settings,
    )


def test_text_becomes_tokens_and_text_again(model: ServedModel) -> None:
    told = asked(
        model, "POST", "/tokenize", json={"prompt": TEXT, "return_token_strs": True}
    ).json()
    assert tuple(told["tokens"]) == model.encode(TEXT)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 512
    back = asked(model, "POST", "/detokenize", json={"model": "demo", "tokens": told["tokens"]})
    assert back.json() == {"prompt": TEXT}


def test_chat_becomes_the_tokens_that_a_completion_of_it_has(model: ServedModel) -> None:
    told = asked(model, "POST", "/tokenize", json={"messages": chat_body()["messages"]}).json()
    source = CountingSource()
    post(source, model, CHAT, json=chat_body())
    assert tuple(told["tokens"]) == source.requests[0].prompt_ids


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": chat_body()["messages"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [1280]}, "token id"),
        ("/detokenize", {"tokens": [-1]}, "token id"),
    ],
)
def test_bad_field_is_refused_by_name(
    model: ServedModel, path: str, fields: dict[str, Any], field: str
) -> None:
    response = asked(model, "POST", path, json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_unknown_field_of_tokenize_is_named(model: ServedModel) -> None:
    fields = {"prompt": "a", "no_such": 1, "add_special_tokens": False}
    response = asked(model, "POST", "/tokenize", json=fields)
    assert response.headers["x-milliways-ignored-fields"] == "no_such"
    assert asked(model, "POST", "/tokenize", json=fields | {"model": "x"}).status_code == 404


def test_server_says_what_it_is(model: ServedModel) -> None:
    info = asked(model, "GET", "/tokenizer_info").json()
    assert model.encode(TEXT) and info["eos_token"] == model.token_name(2)
    assert {"bos_token", "pad_token", "chat_template"} <= set(info)
    assert asked(model, "GET", "/version").json()["version"].startswith("0.")


def test_load_counts_running_requests(model: ServedModel) -> None:
    async def scenario(client: httpx.AsyncClient, ingress: Ingress) -> None:
        with ingress.admit(), ingress.admit():
            assert (await client.get("/load")).json() == {"server_load": 2}
        assert (await client.get("/load")).json() == {"server_load": 0}

    run(scenario, CountingSource(), model)


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/demo"]
)
def test_head_answers_as_get_without_a_body(model: ServedModel, path: str) -> None:
    head, got = asked(model, "HEAD", path), asked(model, "GET", path)
    assert (head.status_code, got.status_code) == (200, 200)
    assert head.content == b"" and got.content
    assert head.headers["content-type"] == got.headers["content-type"]


def test_head_of_an_endpoint_that_only_takes_post_is_refused(model: ServedModel) -> None:
    assert asked(model, "HEAD", COMPLETIONS).status_code == 405
    assert asked(model, "HEAD", "/no/such").status_code == 404


def test_other_origins_are_let_in_by_a_setting_only(model: ServedModel) -> None:
    headers = {"origin": "https://a.example"}
    asking = headers | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    allowed = "access-control-allow-origin"
    for origins, expected in (("", None), ("https://b.example", None), ("https://a.example", "a")):
        settings = {"cors_origins": origins}
        options: dict[str, Any] = {"settings": settings}
        preflight = asked(model, "OPTIONS", COMPLETIONS, headers=asking, **options)
        answer = asked(model, "POST", COMPLETIONS, json=body(n=0), headers=headers, **options)
        for response in (preflight, answer):
            given = response.headers.get(allowed)
            assert given == (f"https://{expected}.example" if expected else None)
        assert answer.status_code == 400
