"""Writes the settings' part of the chart's `values.schema.json`, for `make schema` and its test.

The settings' own schema has everything but what the chart wants besides: it mounts the model, asks
for whole GPUs, and needs some values in its templates.
"""

import json
from pathlib import Path
from typing import Any

from milliways.cluster.settings.sources import json_schema

PATH = Path(__file__).resolve().parents[1] / "deploy" / "helm" / "milliways" / "values.schema.json"
WIDTH = 100
Tree = dict[str, Any]

REQUIRED = {
    "model": ["path"],
    "workers": ["count", "gpus_each"],
    "ingress": ["host", "port", "grpc_port", "min_replicas", "max_replicas"],
}
AMOUNT = {"type": "number", "exclusiveMinimum": 0}
WANTED_BESIDES: dict[str, Tree] = {
    "model.path": {
        "pattern": "^/",
        "description": "An absolute path: the model's volume is mounted there.",
    },
    "workers.gpus_each": {
        "type": "integer",
        "description": "A whole number: a pod cannot get a part of a GPU.",
    },
    "workers.resources": {"additionalProperties": AMOUNT},
    "workers.experts_only_resources": {"additionalProperties": AMOUNT},
    "ingress.host": {
        "enum": ["0.0.0.0", "::"],
        "description": "All addresses of the pod, because a Service reaches no others.",
    },
    "ingress.port": {"minimum": 1},
    "ingress.grpc_port": {"minimum": 1},
}


def config_schema() -> Tree:
    """What the chart takes under `config`: all tables but tls, which follows from a secret."""
    tables = json_schema()["$defs"]
    references = json_schema()["properties"]
    properties = {
        name: _table(name, tables[reference["$ref"].rpartition("/")[2]])
        for name, reference in references.items()
        if name != "tls"
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(REQUIRED),
        "description": "The tables of cluster/settings/config.py except tls, which follows from"
        " tls.secretName.",
    }


def with_settings(schema: Tree) -> Tree:
    """The chart's schema with the settings' part made anew."""
    return schema | {"properties": schema["properties"] | {"config": config_schema()}}


def written(value: Any, indent: int = 0, used: int = 0) -> str:
    """JSON that has what fits on a line on one line; `used` is the width before the value."""
    flat = json.dumps(value)
    if not isinstance(value, dict | list) or used + len(flat) < WIDTH:
        return flat
    space = " " * (indent + 2)
    if isinstance(value, list):
        parts = [written(each, indent + 2, indent + 2) for each in value]
        return "[\n" + ",\n".join(space + part for part in parts) + f"\n{' ' * indent}]"
    lines: list[str] = []
    for key, each in value.items():
        name = f"{json.dumps(key)}: "
        lines.append(space + name + written(each, indent + 2, indent + 2 + len(name)))
    return "{\n" + ",\n".join(lines) + f"\n{' ' * indent}}}"


def _table(name: str, table: Tree) -> Tree:
    properties = {
        field: {key: value for key, value in own.items() if key not in ("title", "default")}
        | WANTED_BESIDES.get(f"{name}.{field}", {})
        for field, own in table["properties"].items()
    }
    made = {"type": "object", "additionalProperties": False, "properties": properties}
    return made | ({"required": REQUIRED[name]} if name in REQUIRED else {})


if __name__ == "__main__":
    PATH.write_text(written(with_settings(json.loads(PATH.read_text("utf-8")))) + "\n", "utf-8")
