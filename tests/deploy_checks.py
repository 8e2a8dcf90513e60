"""What holds the files of deploy/ to the programs that will read them, without any of these.

Each check returns sentences about what is wrong. Those of other projects' schemas are strict here:
a key that the schema does not name is wrong, though the program itself may take it in silence.
"""

import copy
import gzip
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from milliways.cluster.settings.config import config_from_tree
from milliways.wire.errors import ConfigError

with warnings.catch_warnings():
    # Ray defines its models as pydantic once liked it; that is not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import start as ray_start
    from ray.serve.schema import ServeDeploySchema

REPOSITORY = Path(__file__).resolve().parents[1]
DEPLOY = REPOSITORY / "deploy"
# Data of the KubeRay project, which this repository does not carry.
KUBERAY_SCHEMAS = REPOSITORY.parent / "shared" / "kuberay"

needs_schemas = pytest.mark.skipif(
    not KUBERAY_SCHEMAS.is_dir(), reason="KubeRay's schemas are not beside the repository"
)

Tree = dict[str, Any]
KeyPath = tuple[str | int, ...]


def read_documents(path: Path) -> list[Tree]:
    """All documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def key_paths(tree: Any, *, free: frozenset[str] = frozenset()) -> Iterator[KeyPath]:
    """Where every key of a tree stands; below the keys named `free`, anything goes."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield (key,)
            if key not in free:
                yield from ((key, *rest) for rest in key_paths(value, free=free))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from ((index, *rest) for rest in key_paths(value, free=free))


def misspell(tree: Tree, path: KeyPath) -> Tree:
    """A copy of a tree with the key at `path` misspelt."""
    tree = copy.deepcopy(tree)
    parent: Any = tree
    for step in path[:-1]:
        parent = parent[step]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return tree


def show(path: KeyPath) -> str:
    """A path as the name of a test's case."""
    return ".".join(map(str, path))


# Serve


def serve_problems(tree: Tree) -> list[str]:
    """What Serve, or our application, would not take."""
    problems = unknown_keys(ServeDeploySchema, tree)
    try:
        ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        problems.append(str(error))
    for application in tree.get("applications", []):
        try:
            config_from_tree(application.get("args", {}))
        except ConfigError as error:
            problems.append(f"args: {error}")
    return problems


def unknown_keys(model: type[BaseModel], tree: Any, where: str = "") -> list[str]:
    """Keys that a pydantic model takes in silence and never looks at."""
    if isinstance(tree, list):
        return [problem for item in tree for problem in unknown_keys(model, item, where)]
    if not isinstance(tree, Mapping):
        return []
    known = {field.alias or name: field for name, field in model.model_fields.items()}
    problems = [f"{where}{key} is unknown" for key in tree if key not in known]
    for key in tree.keys() & known.keys():
        for inner in models_in(known[key].annotation):
            problems += unknown_keys(inner, tree[key], f"{where}{key}.")
    return problems


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type holds, however wrapped."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


# KubeRay


def ray_service_problems(document: Tree) -> list[str]:
    """What the RayService resource would refuse, or drop in silence."""
    errors = ray_service_validator().iter_errors(document)
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


@cache
def ray_service_validator() -> jsonschema.Draft7Validator:
    """KubeRay's schema, with every key refused that it does not name."""
    path = KUBERAY_SCHEMAS / "ray.io_rayservices.v1.openAPIV3Schema.json.gz"
    schema = strict(json.loads(gzip.decompress(path.read_bytes())))
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    # Kubernetes' own, and so not in KubeRay's schema.
    schema["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {key: {} for key in ("name", "namespace", "labels", "annotations")},
        "required": ["name"],
    }
    return jsonschema.Draft7Validator(schema)


def strict(schema: Any) -> Any:
    """An OpenAPI schema as plain JSON schema that takes no unknown key."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if result.pop("x-kubernetes-int-or-string", False) is True:
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if result.get("type") == "object" and "properties" in result:
        result.setdefault("additionalProperties", False)
    return result


def unknown_start_options(group: Tree) -> set[str]:
    """Options that `ray start` does not know, of those that a group's pods give it."""
    known = {option.lstrip("-") for each in ray_start.params for option in each.opts}
    return group["rayStartParams"].keys() - known


def offered_resources(group: Tree) -> dict[str, float]:
    """The custom resources that a pod of a worker group says it has."""
    # Twice: the inner JSON is quoted for the shell that runs `ray start`.
    return json.loads(json.loads(group["rayStartParams"]["resources"]))


# ray up

# Of what a cloud's provider and machines take, Ray's schema knows next to nothing.
GCP_PROVIDER_KEYS = {"type", "region", "availability_zone", "project_id", "use_internal_ips"}
GCP_MACHINE_KEYS = {"machineType", "disks", "scheduling"}
GCP_DISK_KEYS = {
    "boot",
    "autoDelete",
    "type",
    "mode",
    "deviceName",
    "source",
    "initializeParams",
}


def ray_up_problems(config: Tree) -> list[str]:
    """What `ray up` would refuse, or hand to the cloud unread."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # Whatever Ray trips over says that the file is wrong.
        return [f"{type(error).__name__}: {error}"[:300]]
    problems = extra_keys("provider", config.get("provider", {}), GCP_PROVIDER_KEYS)
    for name, node_type in config["available_node_types"].items():
        machine = node_type["node_config"]
        problems += extra_keys(name, machine, GCP_MACHINE_KEYS)
        for disk in machine.get("disks", []):
            problems += extra_keys(f"{name}.disks", disk, GCP_DISK_KEYS)
    return problems


def extra_keys(where: str, tree: Tree, known: set[str]) -> list[str]:
    """Keys of a tree that are not known."""
    return [f"{where}.{key} is unknown" for key in tree if key not in known]


# Prometheus

RULE_GROUP_KEYS = {"name", "interval", "rules"}
RULE_KEYS = {"record", "alert", "expr", "for", "labels", "annotations"}
METRICS = {
    "milliways_requests_total",
    "milliways_tokens_total",
    "milliways_time_to_first_token_seconds",
    "milliways_queue_length",
    "milliways_kv_blocks_used",
    "milliways_kv_blocks_total",
    "milliways_worker_state",
    "milliways_placement_epoch",
}


def rule_problems(tree: Tree) -> list[str]:
    """What Prometheus would refuse, and names that nothing exports or records."""
    problems = extra_keys("file", tree, {"groups"})
    rules = []
    for group in tree.get("groups", []):
        problems += extra_keys("group", group, RULE_GROUP_KEYS)
        rules += group.get("rules", [])
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        name = rule.get("record") or rule.get("alert") or "rule"
        problems += extra_keys(name, rule, RULE_KEYS)
        if ("record" in rule) == ("alert" in rule) or "expr" not in rule:
            problems.append(f"{name} needs expr, and either record or alert")
        problems += unknown_series(name, str(rule.get("expr")), recorded)
    return problems


def unknown_series(where: str, expression: str, recorded: set[str]) -> list[str]:
    """Series in an expression that nothing exports or records."""
    known = METRICS | recorded
    names = re.findall(r"milliways[a-z0-9_:]*", expression)
    exported = [re.sub(r"_(bucket|sum|count)$", "", name) for name in names]
    return [f"{where}: {name} is unknown" for name in exported if name not in known]
