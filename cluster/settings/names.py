"""The names of a setting, which all follow from its table and field; and settings by name.

For field `count` of table `workers`:

    workers.count                  the name, in errors, in `status`, and the key of a TOML file
    --workers.count                the flag
    MILLIWAYS_WORKERS__COUNT       the environment variable
    args.workers.count             in a file for `serve deploy`
    config.workers.count           in the values of the chart
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, replace
from typing import Any

from milliways.cluster.settings.config import ClusterConfig
from milliways.wire.errors import ConfigError

PREFIX = "MILLIWAYS_"
# Kubernetes sets such values in variables that have the names of services.
_ADDRESSES = ("tcp://", "udp://", "sctp://")


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name}"


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.replace(".", "__").upper()


def declarations() -> Iterator[tuple[str, Field[Any]]]:
    """Every setting's name and declaration, in order."""
    for table in fields(ClusterConfig):
        make: Any = table.default_factory
        for declared in fields(make):
            yield f"{table.name}.{declared.name}", declared


def flat(config: ClusterConfig) -> dict[str, Any]:
    """All settings by name."""
    values: dict[str, Any] = {}
    for name, _ in declarations():
        table, _, field = name.partition(".")
        values[name] = getattr(getattr(config, table), field)
    return values


def changed(config: ClusterConfig, values: Mapping[str, Any]) -> ClusterConfig:
    """Settings with other values for some names.

    Raises:
        ConfigError: a value is out of bounds, or does not go with others.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        table, _, field = name.partition(".")
        tables.setdefault(table, {})[field] = value
    made = {table: replace(getattr(config, table), **own) for table, own in tables.items()}
    return replace(config, **made)


def check_variables(environment: Mapping[str, str]) -> None:
    """Checks that no variable only looks like a setting, since it would have no effect.

    Raises:
        ConfigError: names the variable, and the one that is perhaps meant.
    """
    known = {variable_of(name): name for name, _ in declarations()}
    # MILLIWAYS_WORKERS_COUNT, with one underscore where the rule wants two.
    nearly = {variable.replace("__", "_", 1): variable for variable in known}
    for variable, value in environment.items():
        upper = variable.upper()
        if not upper.startswith(PREFIX) or upper in known:
            continue
        if upper in nearly and not value.startswith(_ADDRESSES):
            raise ConfigError(variable, value, f"called {nearly[upper]}")
        if "__" in upper.removeprefix(PREFIX):
            close = difflib.get_close_matches(upper, known, n=1)
            meant = f", perhaps {close[0]}" if close else ""
            raise ConfigError(variable, value, f"the variable of a setting{meant}")
