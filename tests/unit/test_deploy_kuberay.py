"""deploy/kuberay/rayservice.yaml, as KubeRay and Ray will read it."""

import re
from typing import Any

import pytest
import yaml

from tests.deploy_checks import (
    DEPLOY,
    REPOSITORY,
    KeyPath,
    misspell,
    needs_schemas,
    offered_resources,
    ray_service_problems,
    read_documents,
    show,
    unknown_start_options,
)

RAY_SERVICE, SERVICE = read_documents(DEPLOY / "kuberay" / "rayservice.yaml")
CLUSTER = RAY_SERVICE["spec"]["rayClusterConfig"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
ALL_GROUPS = [CLUSTER["headGroupSpec"], *GROUPS.values()]
SERVE = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])
SETTINGS = SERVE["applications"][0]["args"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    [only] = group["template"]["spec"]["containers"]
    return only


def head(*path: str | int) -> KeyPath:
    return ("spec", "rayClusterConfig", "headGroupSpec", *path)


def worker(*path: str | int) -> KeyPath:
    return ("spec", "rayClusterConfig", "workerGroupSpecs", 1, *path)


@needs_schemas
def test_kuberay_takes_the_file() -> None:
    assert ray_service_problems(RAY_SERVICE) == []


@needs_schemas
@pytest.mark.parametrize(
    "path",
    [
        ("apiVersion",),
        ("spec",),
        ("metadata", "name"),
        ("spec", "serveConfigV2"),
        ("spec", "upgradeStrategy", "type"),
        ("spec", "rayClusterConfig", "enableInTreeAutoscaling"),
        ("spec", "rayClusterConfig", "autoscalerOptions", "idleTimeoutSeconds"),
        ("spec", "rayClusterConfig", "authOptions", "mode"),
        ("spec", "rayClusterConfig", "gcsFaultToleranceOptions", "redisAddress"),
        head("rayStartParams"),
        head("template", "spec", "securityContext", "runAsNonRoot"),
        head("template", "spec", "containers", 0, "env", 0, "value"),
        head("template", "spec", "containers", 0, "ports", 0, "containerPort"),
        worker("minReplicas"),
        worker("template", "metadata", "labels"),
        worker("template", "spec", "tolerations", 0, "operator"),
        worker("template", "spec", "containers", 0, "livenessProbe"),
        worker("template", "spec", "containers", 0, "readinessProbe", "httpGet", "path"),
        worker("template", "spec", "containers", 0, "resources", "limits"),
        worker("template", "spec", "containers", 0, "volumeMounts", 2, "readOnly"),
        worker("template", "spec", "volumes", 2, "persistentVolumeClaim", "claimName"),
    ],
    ids=show,
)
def test_misspelt_key_is_caught(path: KeyPath) -> None:
    assert ray_service_problems(misspell(RAY_SERVICE, path)) != []


@needs_schemas
def test_value_of_another_type_is_caught() -> None:
    group = {**GROUPS["worker"], "minReplicas": "eight"}
    cluster = {**CLUSTER, "workerGroupSpecs": [group]}
    spec = {**RAY_SERVICE["spec"], "rayClusterConfig": cluster}
    assert ray_service_problems({**RAY_SERVICE, "spec": spec}) != []


def test_serve_gets_what_serve_yaml_says() -> None:
    assert read_documents(DEPLOY / "serve.yaml") == [SERVE]


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_ray_start_knows_its_options(group: dict[str, Any]) -> None:
    assert unknown_start_options(group) == set()


def test_misspelt_option_of_ray_start_is_caught() -> None:
    group = misspell(GROUPS["worker"], ("rayStartParams", "resources"))
    assert unknown_start_options(group) == {"resourcesx"}


def test_ray_is_the_version_that_is_locked() -> None:
    lock = (REPOSITORY / "locks" / "requirements.txt").read_text("utf-8")
    assert re.findall(r"(?m)^ray==(\S+)", lock) == [CLUSTER["rayVersion"]]


def test_first_plan_finds_its_pods() -> None:
    """Whatever actors ask for, a group offers, in pods that are there from the start."""
    settings, group = SETTINGS["workers"], GROUPS["worker"]
    limits = container(group)["resources"]["limits"]
    for name, amount in settings["resources"].items():
        assert offered_resources(group)[name] * group["minReplicas"] >= amount * settings["count"]
    per_pod = settings["count"] // group["minReplicas"]
    assert int(limits["nvidia.com/gpu"]) == settings["gpus_each"] * per_pod
    assert int(limits["cpu"]) >= settings["cpus_each"] * per_pod


def test_each_replica_of_the_ingress_finds_a_pod() -> None:
    [deployment] = SERVE["applications"][0]["deployments"]
    asked, group = deployment["ray_actor_options"], GROUPS["ingress"]
    assert offered_resources(group) == asked["resources"]
    assert int(container(group)["resources"]["limits"]["cpu"]) >= asked["num_cpus"]
    settings = SETTINGS["ingress"]
    assert group["minReplicas"] == settings["min_replicas"]
    assert group["maxReplicas"] == settings["max_replicas"]


def test_nothing_is_scheduled_on_the_head() -> None:
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "resources" not in CLUSTER["headGroupSpec"]["rayStartParams"]


def test_head_notices_dead_nodes_in_seconds() -> None:
    environment = {each["name"]: each["value"] for each in container(ALL_GROUPS[0])["env"]}
    period_ms = int(environment["RAY_health_check_period_ms"])
    timeout_ms = int(environment["RAY_health_check_timeout_ms"])
    failures = int(environment["RAY_health_check_failure_threshold"])
    assert "RAY_health_check_initial_delay_ms" in environment
    assert (period_ms + timeout_ms) * failures < 10_000


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_pods_run_with_as_few_rights_as_they_can(group: dict[str, Any]) -> None:
    assert group["template"]["spec"]["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(group)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_model_is_mounted_for_reading_where_settings_say(group: dict[str, Any]) -> None:
    mounts = {each["name"]: each for each in container(group)["volumeMounts"]}
    volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["model"]["mountPath"] == SETTINGS["model"]["path"]
    assert mounts["model"]["readOnly"] is True
    assert volumes["model"]["persistentVolumeClaim"]["readOnly"] is True


def test_service_leads_to_the_ingress_and_to_nothing_else() -> None:
    selector = SERVICE["spec"]["selector"].items()
    chosen = {name for name, group in GROUPS.items() if selector <= labels(group).items()}
    assert chosen == {"ingress"}
    ports = {each["name"]: each["containerPort"] for each in container(GROUPS["ingress"])["ports"]}
    assert {each["targetPort"]: each["port"] for each in SERVICE["spec"]["ports"]} == {
        "http": ports["http"],
        "grpc": ports["grpc"],
    }
    settings = SETTINGS["ingress"]
    assert (ports["http"], ports["grpc"]) == (settings["port"], settings["grpc_port"])


def labels(group: dict[str, Any]) -> dict[str, str]:
    return group["template"]["metadata"]["labels"]


def test_clients_reach_only_pods_that_can_make_a_token() -> None:
    assert container(GROUPS["ingress"])["readinessProbe"]["httpGet"] == {
        "path": "/ready",
        "port": SETTINGS["ingress"]["port"],
    }
