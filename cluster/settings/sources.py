"""Where settings come from: flags over environment over file over defaults.

    gathered = gather(file=path, flags={"workers.count": 5}, reads_environment=True)
    gathered.config                         # a ClusterConfig
    gathered.origins["workers.count"]       # "--workers.count"

Importing this module imports pydantic: only those who read settings do.
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.declaration import limit_of
from milliways.cluster.settings.names import (
    PREFIX,
    check_variables,
    declarations,
    flag_of,
    flat,
    variable_of,
)
from milliways.wire.errors import ConfigError

Tree = Mapping[str, Any]
DEFAULT = "default"
GIVEN = "arguments"
RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Settings, and for each name where its value comes from."""

    config: ClusterConfig
    origins: Mapping[str, str]


def gather(
    *,
    base: ClusterConfig | None = None,
    file: Path | None = None,
    given: Tree | None = None,
    flags: Mapping[str, Any] | None = None,
    reads_environment: bool = False,
) -> Gathered:
    """Settings from several sources; the first one that has a value counts.

    They are `flags`, by name; the environment; then `file`, which is TOML, or `given`, which are
    nested mappings; then `base` in place of the defaults.

    Raises:
        ConfigError: a field is invalid; the error names its table, the field, value and limit.
    """
    origins = dict.fromkeys((name for name, _ in declarations()), DEFAULT)
    layers: list[tuple[Tree, Mapping[str, str]]] = []
    if base is not None:
        layers.append((_nested(flat(base)), dict.fromkeys(origins, RUNNING)))
    if file is not None:
        layers.append((_read_file(file), dict.fromkeys(origins, str(file))))
    if given is not None:
        layers.append((given, dict.fromkeys(origins, GIVEN)))
    if reads_environment:
        check_variables(os.environ)
        layers.append((_read_environment(), {name: variable_of(name) for name in origins}))
    if flags:
        layers.append((_nested(flags), {name: flag_of(name) for name in origins}))
    for tree, origin in layers:
        origins |= {name: origin[name] for name in origins if _has(tree, name)}
    config = _merged([tree for tree, _ in reversed(layers)])
    return Gathered(config=config, origins=origins)


def parsed(name: str, text: str) -> Any:
    """The value of a setting that a flag or a variable gives as text.

    Raises:
        ConfigError: the text is not of the setting's type.
    """
    table, _, field = name.partition(".")
    kind = _kinds(table)[field]
    try:
        if kind in (int, float, str, bool):
            return TypeAdapter(kind).validate_strings(text)
        return TypeAdapter(kind).validate_python(json.loads(text))
    except (ValidationError, ValueError) as error:
        raise ConfigError(name, text, _type_limit(table, field)) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of the settings."""
    schema = TypeAdapter(ClusterConfig).json_schema()
    schema["title"] = "Settings of Milliways"
    for table in (schema, *schema["$defs"].values()):
        table["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def as_toml(gathered: Gathered) -> str:
    """Settings as a TOML file, with the origin of each value beside it."""
    lines: list[str] = []
    last = ""
    for name, value in flat(gathered.config).items():
        table, _, field = name.partition(".")
        if table != last:
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
            last = table
        lines.append(f"{field} = {_toml(value)}  # {gathered.origins[name]}")
    return "\n".join(lines)


class _Base(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", case_sensitive=True
    )


@cache
def _settings_class() -> type[BaseSettings]:
    """The tables as fields of pydantic's settings, with their defaults."""
    kinds = get_type_hints(ClusterConfig)
    tables: dict[str, Any] = {
        table.name: (kinds[table.name], cast(Any, table.default_factory)())
        for table in fields(ClusterConfig)
    }
    return create_model("Settings", __base__=_Base, **tables)


def _merged(trees: list[Tree]) -> ClusterConfig:
    """Settings from trees, best first."""
    base: Any = _settings_class()

    class Layered(base):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **_: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(InitSettingsSource(settings_cls, dict(tree)) for tree in trees)

    try:
        layered: Any = Layered()
    except ValidationError as error:
        raise _config_error(error) from error
    return ClusterConfig(**{t.name: getattr(layered, t.name) for t in fields(ClusterConfig)})


def _read_file(path: Path) -> Tree:
    try:
        # Pydantic's reader takes a file that is missing for an empty one.
        path.open("rb").close()
        return TomlConfigSettingsSource(_settings_class(), path)()
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", f"a readable TOML file: {error}") from error


def _read_environment() -> Tree:
    tree: dict[str, dict[str, Any]] = {}
    for table, texts in EnvSettingsSource(_settings_class(), case_sensitive=False)().items():
        tree[table] = {
            field: parsed(f"{table}.{field}", text) if isinstance(text, str) else text
            for field, text in texts.items()
        }
    return tree


def _config_error(error: ValidationError) -> ConfigError:
    """The first of pydantic's errors, in our words."""
    first = error.errors(include_url=False)[0]
    path, value = [str(part) for part in first["loc"]], first["input"]
    name = ".".join(path)
    tables = [table.name for table in fields(ClusterConfig)]
    if path[0] not in tables:
        return ConfigError(name, value, f"one of the tables {', '.join(tables)}")
    if len(path) == 1:
        return ConfigError(name, value, "a table")
    table, field = path[:2]
    if field not in _kinds(table):
        return ConfigError(name, value, f"one of {', '.join(_kinds(table))}")
    if first["type"] in ("greater_than_equal", "less_than_equal"):
        return ConfigError(name, value, limit_of(dict(declarations())[f"{table}.{field}"]))
    return ConfigError(name, value, "a number" if len(path) > 2 else _type_limit(table, field))


def _type_limit(table: str, field: str) -> str:
    kind = _kinds(table)[field]
    return f"of type {kind.__name__}" if isinstance(kind, type) else "a table"


@cache
def _kinds(table: str) -> dict[str, Any]:
    return get_type_hints(get_type_hints(ClusterConfig)[table])


def _nested(values: Mapping[str, Any]) -> Tree:
    tree: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        table, _, field = name.partition(".")
        tree.setdefault(table, {})[field] = value
    return tree


def _has(tree: Tree, name: str) -> bool:
    table, _, field = name.partition(".")
    own = tree.get(table)
    return isinstance(own, Mapping) and field in own


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        own = cast("Mapping[str, Any]", value)
        pairs = [f"{json.dumps(key)} = {_toml(each)}" for key, each in own.items()]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, str):
        # JSON's strings are TOML's, as long as nothing is written as a pair of surrogates.
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
