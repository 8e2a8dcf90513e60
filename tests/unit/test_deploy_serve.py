"""deploy/serve.yaml, as Serve and our application will read it."""

import importlib.util
from typing import Any

import pytest

from tests.deploy_checks import (
    DEPLOY,
    KeyPath,
    key_paths,
    misspell,
    read_documents,
    serve_problems,
    show,
)

[SERVE] = read_documents(DEPLOY / "serve.yaml")
APPLICATION = SERVE["applications"][0]
# Below `resources` stand names of our own choice; that nodes offer them is checked with the nodes.
KEYS = list(key_paths(SERVE, free=frozenset({"resources"})))


def test_serve_and_the_application_take_the_file() -> None:
    assert serve_problems(SERVE) == []


@pytest.mark.parametrize("path", KEYS, ids=show)
def test_misspelt_key_is_caught(path: KeyPath) -> None:
    assert serve_problems(misspell(SERVE, path)) != []


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": {"count": 0}},
        {"workers": {"gpus_each": "1"}},
        {"ingress": {"min_replicas": 9, "max_replicas": 8}},
        {"model": {"dtype": "float16"}},
    ],
)
def test_setting_out_of_bounds_is_caught(changes: dict[str, Any]) -> None:
    application = {**APPLICATION, "args": changes}
    assert serve_problems({**SERVE, "applications": [application]}) != []


def test_application_is_where_the_file_says() -> None:
    module, _, name = APPLICATION["import_path"].partition(":")
    assert (module, name) == ("milliways.cluster.ray.app", "app")
    assert importlib.util.find_spec(module) is not None


def test_serve_and_the_ingress_agree_on_the_door() -> None:
    ingress, http = APPLICATION["args"]["ingress"], SERVE["http_options"]
    assert (ingress["host"], ingress["port"]) == (http["host"], http["port"])


def test_replicas_of_the_ingress_do_not_share_a_node() -> None:
    """Each opens the same gRPC port."""
    [deployment] = APPLICATION["deployments"]
    assert deployment["name"] == "Ingress"
    assert deployment["max_replicas_per_node"] == 1
