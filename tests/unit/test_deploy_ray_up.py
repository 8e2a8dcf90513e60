"""deploy/ray-up/gcp.yaml, as `ray up` will read it."""

import pytest

from tests.deploy_checks import (
    DEPLOY,
    KeyPath,
    key_paths,
    misspell,
    ray_up_problems,
    read_documents,
    show,
)

[CLUSTER] = read_documents(DEPLOY / "ray-up" / "gcp.yaml")
[SERVE] = read_documents(DEPLOY / "serve.yaml")
SETTINGS = SERVE["applications"][0]["args"]
NODES = CLUSTER["available_node_types"]
# Below these stand names that are ours to choose, or that only the cloud knows.
FREE = frozenset({"resources", "file_mounts", "initializeParams", "scheduling"})
# Names of our own, which a file without them would just not have.
KEYS = [
    path
    for path in key_paths(CLUSTER, free=FREE)
    if path not in {("available_node_types", "ingress"), ("available_node_types", "worker")}
]


def test_ray_takes_the_file() -> None:
    assert ray_up_problems(CLUSTER) == []


@pytest.mark.parametrize("path", KEYS, ids=show)
def test_misspelt_key_is_caught(path: KeyPath) -> None:
    assert ray_up_problems(misspell(CLUSTER, path)) != []


def test_nodes_offer_what_actors_ask_for() -> None:
    settings, node = SETTINGS["workers"], NODES["worker"]
    offered = node["resources"]
    asked = {
        **settings["resources"],
        "GPU": settings["gpus_each"],
        "CPU": settings["cpus_each"],
    }
    for name, amount in asked.items():
        assert offered[name] * node["min_workers"] >= amount * settings["count"]
    [deployment] = SERVE["applications"][0]["deployments"]
    for name, amount in deployment["ray_actor_options"]["resources"].items():
        assert NODES["ingress"]["resources"][name] == amount


def test_number_of_nodes_follows_the_settings() -> None:
    settings, node = SETTINGS["ingress"], NODES["ingress"]
    assert (node["min_workers"], node["max_workers"]) == (
        settings["min_replicas"],
        settings["max_replicas"],
    )
    assert CLUSTER["max_workers"] == node["max_workers"] + NODES["worker"]["max_workers"]


def test_nothing_is_scheduled_on_the_head() -> None:
    assert NODES[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0}


def test_model_is_mounted_for_reading_where_settings_say() -> None:
    path = SETTINGS["model"]["path"]
    assert any(each.endswith(f":{path}:ro") for each in CLUSTER["docker"]["run_options"])


def test_nodes_ask_for_a_token() -> None:
    assert "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert any(path.endswith("/.ray/auth_token") for path in CLUSTER["file_mounts"])
