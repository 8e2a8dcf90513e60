"""Who may import whom, folder by folder.

The house has floors. `ROOMS` lists them from the lowest up, with the rooms that each may look into:
only rooms above its line in the table. Libraries that bring arrays, processes or sockets are held
back by room as well.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "milliways"

# Each room, and the rooms that it may import from. A module belongs to the longest name that fits.
ROOMS: dict[str, tuple[str, ...]] = {
    "v1": (),
    "runtime": (),
    "model": (),
    "wire": ("v1", "runtime", "model"),
    "router.requests": ("v1", "model", "wire"),
    "router.links": ("v1", "runtime", "wire"),
    "router": ("v1", "runtime", "model", "wire", "router.requests", "router.links"),
    "workers.servers": ("v1", "runtime", "wire"),
    "workers": ("runtime", "model", "wire", "workers.servers"),
    # The settings take defaults from the limits that they set.
    "cluster.settings": ("wire", "router"),
    # Of the model, control knows sizes, digests, and the bytes of the files beside the tensors.
    "cluster.control": ("runtime", "model", "wire"),
    "cluster.ingress": ("v1", "model", "wire", "router.requests", "cluster.settings"),
    "cluster.host": (
        *("runtime", "model", "wire", "router", "router.requests", "router.links"),
        *("workers", "workers.servers", "cluster.settings", "cluster.control"),
    ),
    "api": ("v1", "runtime", "model", "wire", "router", "router.requests", "cluster.host"),
    "cluster.ray": (
        *("runtime", "model", "wire", "workers"),
        *("cluster.settings", "cluster.control", "cluster.ingress", "cluster.host"),
    ),
    "benchmarks.demo": ("model",),
    "benchmarks.speed": (
        *("v1", "runtime", "model", "wire", "router", "router.requests", "router.links"),
        *("workers.servers", "cluster.settings", "cluster.control", "cluster.host"),
    ),
    "benchmarks.chaos": ("v1", "model", "wire", "cluster.settings", "cluster.ray", "api"),
    "benchmarks": ("runtime", "model", "cluster.host", "benchmarks.speed", "benchmarks.chaos"),
    "cluster.cli": (
        *("runtime", "model", "wire", "router.requests"),
        *("cluster.settings", "cluster.control", "cluster.host", "cluster.ray"),
        *("benchmarks.speed", "benchmarks.chaos"),
    ),
    # The package itself: what `import milliways` and `python -m milliways` mean.
    "": ("api", "model", "cluster.cli"),
}
# Libraries, and the only rooms that may import them.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "jax": ("model", "workers", "cluster.host", "cluster.ray", "benchmarks"),
    "jaxlib": ("model",),
    "flax": ("model", "benchmarks.demo"),
    "optax": ("benchmarks.demo",),
    "ray": ("cluster.ray", "cluster.cli", "benchmarks.chaos"),
    "grpc": ("wire", "router", "workers.servers", "cluster.ingress", "api", "benchmarks"),
    "grpc_health": ("cluster.ingress",),
    "grpc_reflection": ("cluster.ingress",),
    # Decisions run under a clock that is handed in: an event loop stays with those that do I/O.
    "asyncio": (
        *("runtime", "router.links", "router", "workers.servers", "cluster.ingress"),
        *("cluster.ray", "api", "benchmarks"),
    ),
}
# Rooms in which the shell of a room may do what its decisions may not, by file.
SHELLS = {
    "grpc": {"router": ("router.server",)},
    "asyncio": {"router": ("router.server",)},
}
MOST_IN_ONE_ROOM = 0.30
MOST_ROOMS_IN_CLUSTER = 6


@dataclass(frozen=True, slots=True)
class Module:
    """A module of ours, by its name below `milliways`, and every name it imports."""

    name: str
    imports: frozenset[str]
    num_lines: int = 0


def room_of(name: str) -> str:
    """The room of a dotted name below `milliways`."""
    return max((room for room in ROOMS if within(name, room)), key=len)


def within(name: str, parent: str) -> bool:
    """Whether a dotted name is `parent` or lies below it; everything lies below the package."""
    return not parent or name == parent or name.startswith(f"{parent}.")


def violations(module: Module) -> list[str]:
    """What is wrong with a module's imports, one sentence each."""
    room = room_of(module.name)
    return [
        f"milliways.{module.name} imports {name}"
        for name in sorted(module.imports)
        if not (_may_import_room(room, name) and _may_import_library(module.name, room, name))
    ]


def _may_import_room(room: str, name: str) -> bool:
    top, _, below = name.partition(".")
    # The folders' bare names are what our packages were called before they were one.
    if top in {"model", "router", "workers", "cluster", "benchmarks", "proto"}:
        return False
    return top != "milliways" or room_of(below) in (room, *ROOMS[room])


def _may_import_library(module: str, room: str, name: str) -> bool:
    library = name.partition(".")[0]
    if library not in LIBRARIES:
        return True
    shells = SHELLS.get(library, {}).get(room)
    return any(within(room, r) for r in LIBRARIES[library]) and (not shells or module in shells)


def read_module(name: str, source: str, *, is_package: bool = False) -> Module:
    """Parses a module; nothing of it runs."""
    full = f"milliways.{name}".rstrip(".")
    package = full if is_package else full.rpartition(".")[0]
    imports = frozenset(imported_names(ast.parse(source), package))
    return Module(name, imports, len(source.splitlines()))


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Every import, wherever it hides: in a function, or behind TYPE_CHECKING."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                # `from a import b` imports a.b as far as a room is concerned: b may be a module.
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
    """All modules of the package; generated ones left out."""
    modules: list[Module] = []
    for folder in (PACKAGE, *(path for path in sorted(PACKAGE.iterdir()) if path.is_symlink())):
        for path in sorted(folder.resolve().rglob("*.py")):
            if "_pb2" in path.name:
                continue
            below = path.relative_to(folder.resolve()).with_suffix("").parts
            parts = (() if folder == PACKAGE else (folder.name,)) + below
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules.append(read_module(name, path.read_text("utf-8"), is_package=is_package))
    return modules


def test_every_module_keeps_to_its_floor() -> None:
    modules = our_modules()
    assert {room_of(module.name) for module in modules} == set(ROOMS)
    assert [fault for module in modules for fault in violations(module)] == []


def test_rooms_look_down_only() -> None:
    floors = list(ROOMS)
    for floor, (room, below) in enumerate(ROOMS.items()):
        assert all(floors.index(name) < floor for name in below), room


def test_no_room_holds_most_of_the_house() -> None:
    lines: Counter[str] = Counter()
    for module in our_modules():
        lines[room_of(module.name)] += module.num_lines
    most = MOST_IN_ONE_ROOM * lines.total()
    assert {room: n for room, n in lines.items() if n > most} == {}
    in_cluster = [room for room in ROOMS if within(room, "cluster") and room]
    assert len(in_cluster) <= MOST_ROOMS_IN_CLUSTER


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("model.runner", "from milliways.wire import errors"),
        ("model.runner", "from milliways.router.requests import sequence"),
        ("model.runner", "import asyncio"),
        ("model.runner", "import ray"),
        ("model.ops.pure", "from ...workers import shard"),
        ("wire.calls", "from milliways.cluster.control import controller"),
        ("wire.calls", "from ..cluster.settings.config import ClusterConfig"),
        ("wire.placement", "import jax.numpy as jnp"),
        ("runtime.tasks", "from milliways.wire.errors import ClusterError"),
        ("cluster.settings.config", "from milliways.model.decoder import Decoder"),
        ("cluster.control.controller", "from milliways.workers.core import WorkerCore"),
        ("cluster.control.controller", "import ray"),
        ("cluster.control.controller", "import asyncio"),
        ("cluster.host.worker_process", "import ray"),
        ("cluster.ingress.openai.app", "from milliways.router.engine import LocalEngine"),
        ("cluster.ingress.openai.app", "from milliways.cluster.control.fleet import Fleet"),
        ("cluster.ingress.openai.app", "from ray import serve"),
        ("workers.core", "from milliways.router.requests.sequence import Sequence"),
        ("workers.core", "import milliways.cluster.control.controller"),
        ("workers.core", "from grpc import aio"),
        ("workers.servers.intake", "from milliways.workers.core import WorkerCore"),
        ("router.dispatch", "import milliways.workers"),
        ("router.dispatch", "import grpc"),
        ("router.dispatch", "def f():\n    import jax"),
        ("router.dispatch", "if TYPE_CHECKING:\n    from milliways.workers.core import WorkerCore"),
        ("router.dispatch", "importlib.import_module('milliways.workers.core')"),
        ("router.dispatch", "__import__('ray.serve')"),
        ("router.links.connect", "from milliways.router.dispatch import Dispatcher"),
        ("cluster.cli.main", "from model.errors import ModelError"),
    ],
)
def test_import_against_the_direction_is_caught(importer: str, statement: str) -> None:
    assert len(violations(read_module(importer, statement))) == 1


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("model.runner", "from milliways.model.decoder import Decoder"),
        ("model.ops.pure", "from .interface import Ops"),
        ("wire.errors", "from milliways.model.errors import ModelError"),
        ("cluster.control.targets", "from .planner import plan"),
        ("cluster.control.targets", "from milliways.runtime.clock import Clock"),
        ("cluster.cli.main", "from milliways.benchmarks.chaos.trial import Trial"),
        ("cluster.host.worker_process", "import jax, milliways.workers.core, milliways.router"),
        (
            "cluster.ingress.token_source",
            "from milliways.router.requests.request import GenerationRequest",
        ),
        ("workers.servers.grpc_server", "from milliways.v1 import worker_pb2"),
        ("router.dispatch", "from milliways.model.sampling_params import SamplingParams"),
        ("router.server", "import asyncio, grpc"),
        ("router.dispatch", "import rayon, jaxtyping"),
    ],
)
def test_import_along_the_direction_passes(importer: str, statement: str) -> None:
    assert violations(read_module(importer, statement)) == []


def test_relative_import_in_a_package_starts_at_the_package() -> None:
    module = read_module("wire", "from . import calls", is_package=True)
    assert module.imports == {"milliways.wire.calls"}
