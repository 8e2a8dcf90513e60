"""Who may import whom: DESIGN's direction, read from the source of every module.

`model` and the wire stand lowest, then cluster's kernel, then `workers` and `router`, which never
see each other. Only composition roots see everything. Libraries that would bring processes, sockets
or arrays into the wrong folder are held back the same way.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("model", "workers", "router", "cluster")

# A name stands for itself and all below it.
OURS = (*FOLDERS, "milliways")
KERNEL = (
    "cluster.ids",
    "cluster.errors",
    "cluster.clock",
    "cluster.config",
    "cluster.placement",
    "cluster.view",
    "cluster.tasks",
    "cluster.calls",
    "cluster.links",
    "cluster.codec",
    "cluster.frames",
    "cluster.link_limits",
    "cluster.malloc",
    "cluster.wire_fields",
    "cluster.wire_sampling",
    "cluster.wire_tensors",
    "cluster.reactor",
    "cluster.shm",
    "cluster.status_codes",
)
COMPOSITION_ROOTS = (
    "cluster.cli",
    "cluster.commands",
    "cluster.app",
    "cluster.local",
    "cluster.own_calls",
    "cluster.router_door",
    "cluster.worker_actor",
    "cluster.worker_process",
    "cluster.bench.programs",
)
JAX = ("jax", "jaxlib", "flax", "optax")
GRPC = ("grpc", "grpc_health", "grpc_reflection")
# Adapters, each named here when it is written: a short list is a promise.
RAY_FILES: tuple[str, ...] = (
    "cluster.app",
    "cluster.controller_actor",
    "cluster.ray_cluster",
    "cluster.ray_fleet",
    "cluster.serve_loopback",
    "cluster.worker_actor",
    "cluster.chaos.ray_hands",
    "cluster.commands.chaos",
    "cluster.commands.serve",
    "cluster.commands.status",
)
GRPC_FILES: tuple[str, ...] = (
    "workers.grpc_server",
    "router.grpc_link",
    "cluster.client",
    "cluster.router_door",
    "cluster.chaos.clients",
    "cluster.bench.dataplane",
    "cluster.ingress.channels",
    "cluster.ingress.grpc_service",
    "cluster.ingress.router_connection",
    "cluster.ingress.health",
    "cluster.ingress.malformed",
    "cluster.ingress.router_source",
    "cluster.ingress.server",
    "cluster.bench.programs.doors",
    "cluster.bench.programs.run_hop",
)


@dataclass(frozen=True, slots=True)
class Module:
    """A module of ours and every name it imports."""

    name: str
    imports: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What a group of modules may import of ours, and what of others it may not."""

    members: tuple[str, ...]
    may_import: tuple[str, ...]
    never: tuple[str, ...] = ()


# The first layer that holds a module counts.
LAYERS = (
    Layer(members=COMPOSITION_ROOTS, may_import=OURS),
    Layer(members=("model",), may_import=("model",), never=("ray", *GRPC, "asyncio")),
    Layer(
        members=KERNEL,
        may_import=(
            *KERNEL,
            "milliways",
            "model.config",
            "model.errors",
            "model.sampling_params",
        ),
        never=(*JAX, "asyncio"),
    ),
    Layer(members=("workers",), may_import=("workers", "model", "milliways", *KERNEL)),
    Layer(members=("router",), may_import=("router", "model", "milliways", *KERNEL), never=JAX),
    # It knows what a request is and what a token is, and no router's inside.
    Layer(
        members=("cluster.ingress",),
        may_import=(
            "cluster.ingress",
            "cluster.model_dir",
            *KERNEL,
            "router.request",
            "router.sequence",
            "model",
            "milliways",
        ),
        never=("ray", *JAX),
    ),
    Layer(members=("cluster",), may_import=("cluster", "model", "milliways"), never=JAX),
)


def violations(module: Module) -> list[str]:
    """What is wrong with a module's imports, one sentence each."""
    layer = next(layer for layer in LAYERS if within(module.name, layer.members))
    held_back = (
        *layer.never,
        *(() if within(module.name, RAY_FILES) else ("ray",)),
        *(() if within(module.name, GRPC_FILES) else GRPC),
    )
    return [
        f"{module.name} imports {name}"
        for name in sorted(module.imports)
        if within(name, held_back) or (within(name, OURS) and not within(name, layer.may_import))
    ]


def within(name: str, parents: Iterable[str]) -> bool:
    """Whether a dotted name is one of `parents` or lies below one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def read_module(name: str, source: str, *, is_package: bool = False) -> Module:
    """Parses a module; nothing of it runs."""
    package = name if is_package else name.rpartition(".")[0]
    return Module(name, frozenset(imported_names(ast.parse(source), package)))


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Every import, wherever it hides: in a function, or behind TYPE_CHECKING."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                # `from a import b` imports a.b as far as a layer is concerned: b may be a module.
                base = absolute(module, level, package)
                yield from (f"{base}.{alias.name}" for alias in aliases)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield target


def absolute(module: str | None, level: int, package: str) -> str:
    """The absolute form of what stands after `from`."""
    if level == 0:
        return module or ""
    parents = package.split(".")
    return ".".join(filter(None, [*parents[: len(parents) - level + 1], module]))


def our_modules() -> list[Module]:
    """All modules of our packages."""
    modules = []
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules.append(read_module(name, path.read_text("utf-8"), is_package=is_package))
    return modules


def test_every_module_keeps_to_its_layer() -> None:
    modules = our_modules()
    assert len(modules) > 10
    assert [fault for module in modules for fault in violations(module)] == []


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("model.runner", "import cluster.ids"),
        ("model.runner", "from router import sequence"),
        ("model.runner", "import asyncio"),
        ("model.runner", "import ray"),
        ("model.ops.pure", "from ...workers import shard"),
        ("cluster.ids", "from cluster import membership"),
        ("cluster.placement", "from .membership import Membership"),
        ("cluster.config", "from model.decoder import Decoder"),
        ("cluster.membership", "from workers.core import Worker"),
        ("cluster.membership", "import jax.numpy as jnp"),
        ("cluster.cli", "import ray"),
        ("cluster.ingress.http", "from router.engine import LocalEngine"),
        ("cluster.ingress.http", "from ray import serve"),
        ("cluster.ingress.http", "import grpc"),
        ("workers.core", "from router.sequence import Sequence"),
        ("workers.core", "import cluster.membership"),
        ("workers.core", "from grpc import aio"),
        ("router.step", "import workers"),
        ("router.step", "def f():\n    import jax"),
        ("router.step", "if TYPE_CHECKING:\n    from workers.core import Worker"),
        ("router.step", "importlib.import_module('workers.core')"),
        ("router.step", "__import__('ray.serve')"),
    ],
)
def test_import_against_the_direction_is_caught(importer: str, statement: str) -> None:
    assert len(violations(read_module(importer, statement))) == 1


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("model.runner", "from model.decoder import Decoder"),
        ("model.ops.pure", "from .interface import Ops"),
        ("cluster.placement", "from .ids import WorkerId"),
        ("cluster.errors", "from model.errors import ModelError"),
        ("cluster.membership", "from cluster.clock import Clock"),
        ("cluster.cli", "import jax, model.runner, workers.core, router.step"),
        ("cluster.ingress.source", "from router.request import GenerateRequest"),
        ("workers.core", "from milliways.v1 import worker_pb2"),
        ("workers.core", "from cluster.ids import WorkerId"),
        ("router.step", "from model.sampling_params import SamplingParams"),
        ("router.step", "import asyncio, rayon, jaxtyping"),
    ],
)
def test_import_along_the_direction_passes(importer: str, statement: str) -> None:
    assert violations(read_module(importer, statement)) == []


def test_relative_import_in_a_package_starts_at_the_package() -> None:
    module = read_module("cluster", "from . import ids", is_package=True)
    assert module.imports == {"cluster.ids"}
