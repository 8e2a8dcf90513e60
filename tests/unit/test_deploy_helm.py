"""The Helm chart: its values and their schema, and its templates where Helm is installed.

Helm comes as the package `helm-python-sdk`. It takes 244 MB, so only `.ci/run` installs it.
"""

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml

from milliways.cluster.settings.config import config_from_tree
from tests.chart_schema import with_settings
from tests.deploy_checks import (
    DEPLOY,
    KeyPath,
    Tree,
    key_paths,
    misspell,
    needs_schemas,
    offered_resources,
    ray_service_problems,
    read_documents,
    serve_problems,
    show,
)

CHART = DEPLOY / "helm" / "milliways"
[VALUES] = read_documents(CHART / "values.yaml")
SCHEMA = json.loads((CHART / "values.schema.json").read_text("utf-8"))
TEMPLATES = sorted((CHART / "templates").iterdir())
# Below these stand names of the user's choice.
FREE = frozenset({"annotations", "nodeSelector", "labels"})
OWN_NAMES = ("config", "workers", "resources")
KEYS = [path for path in key_paths(VALUES, free=FREE) if path[:-1] != OWN_NAMES]

EVERYTHING_ON: Tree = {
    "image": {"pullSecrets": ["registry"]},
    "config": {"workers": {"count": 12}},
    "workers": {"perPod": 8},
    "tls": {"secretName": "milliways-tls"},
    "auth": {"secretName": "milliways-token"},
    "pods": {"worker": {"nodeSelector": {"gpu": "h100"}}},
    "service": {"annotations": {"a": "b"}},
    "networkPolicy": {"clients": [{"namespaceSelector": {}}]},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}
EVERYTHING_OFF: Tree = {
    "config": {"workers": {"gpus_each": 0}},
    "experts": {"maxPods": 0},
    "gcsFaultTolerance": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "disruptionBudget": {"enabled": False},
}


def value_problems(values: Tree) -> list[str]:
    validator = jsonschema.Draft7Validator(SCHEMA)
    return [error.message for error in validator.iter_errors(values)]


def test_schema_takes_the_values() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert value_problems(VALUES) == []


@pytest.mark.parametrize("path", KEYS, ids=show)
def test_misspelt_value_is_caught(path: KeyPath) -> None:
    assert value_problems(misspell(VALUES, path)) != []


def test_schema_has_the_settings_as_they_are_declared() -> None:
    assert with_settings(SCHEMA) == SCHEMA, "run `make schema`"


def test_configuration_takes_the_settings() -> None:
    assert config_from_tree(VALUES["config"]).model.path == "/models/grok-1"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_template_names_values_that_exist(template: Any) -> None:
    for reference in references(template.read_text("utf-8")):
        value: Any = VALUES
        for name in reference:
            assert name in value, show(reference)
            value = value[name]


def test_every_value_is_used() -> None:
    used = {each for path in TEMPLATES for each in references(path.read_text("utf-8"))}
    leaves = [path for path in key_paths(VALUES) if all(isinstance(step, str) for step in path)]
    unused = [
        path
        for path in leaves
        # A template that takes a whole table takes what is in it, and a table is not a value.
        if not any(path[: len(each)] == each or each[: len(path)] == path for each in used)
    ]
    assert unused == []


def references(template: str) -> set[KeyPath]:
    """The values that a template names, each as a path."""
    return {tuple(name.split(".")) for name in re.findall(r"\.Values\.([A-Za-z_.]+\w)", template)}


# With Helm


def render(values: Tree) -> list[Tree]:
    """The chart's documents for some values."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    rendered = helm.Chart.load(str(CHART)).render(values, name="milliways", namespace="default")
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def ray_service(values: Tree) -> Tree:
    [document] = [each for each in render(values) if each["kind"] == "RayService"]
    return document


def serve_config(document: Tree) -> Tree:
    return yaml.safe_load(document["spec"]["serveConfigV2"])


def test_default_chart_is_the_plain_file() -> None:
    rendered = {each["kind"]: each for each in render({})}
    for plain in read_documents(DEPLOY / "kuberay" / "rayservice.yaml"):
        document = rendered[plain["kind"]]
        assert document["metadata"]["name"] == plain["metadata"]["name"]
        spec, plain_spec = document["spec"], plain["spec"]
        if plain["kind"] == "RayService":
            assert serve_config(document) == serve_config(plain)
            spec = {**spec, "serveConfigV2": plain_spec["serveConfigV2"]}
        else:
            # Kubernetes' default, which the chart writes out.
            assert spec.pop("type") == "ClusterIP"
        assert spec == plain_spec


@pytest.mark.parametrize("values", [{}, EVERYTHING_ON, EVERYTHING_OFF], ids=["", "on", "off"])
def test_serve_takes_what_the_chart_renders(values: Tree) -> None:
    assert serve_problems(serve_config(ray_service(values))) == []


@needs_schemas
@pytest.mark.parametrize("values", [{}, EVERYTHING_ON, EVERYTHING_OFF], ids=["", "on", "off"])
def test_kuberay_takes_what_the_chart_renders(values: Tree) -> None:
    assert ray_service_problems(ray_service(values)) == []


def test_pods_of_several_workers_offer_what_several_ask_for() -> None:
    _, group, _ = ray_service(EVERYTHING_ON)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] == 2
    assert offered_resources(group) == {"milliways_worker": 8}
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_cluster_without_gpus_asks_for_none() -> None:
    _, group = ray_service(EVERYTHING_OFF)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}


def test_certificates_are_where_the_settings_say() -> None:
    document = ray_service(EVERYTHING_ON)
    tls = serve_config(document)["applications"][0]["args"]["tls"]
    folders = {path.rpartition("/")[0] for path in tls.values()}
    cluster = document["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert folders == {mounts["tls"]}


def test_helm_refuses_a_misspelt_value() -> None:
    with pytest.raises(Exception, match="additional properties"):
        render({"workres": {"perPod": 8}})


def test_helm_finds_nothing_to_lint() -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    report = helm.lint(str(CHART))
    assert report["errors"] == []
    assert [each for each in report["messages"] if each["severity"] > 1] == []
