"""A flag for every setting, from the settings' declaration."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.declaration import choices_of, description_of
from milliways.cluster.settings.names import declarations, flag_of
from milliways.wire.errors import ConfigError

if TYPE_CHECKING:
    from milliways.cluster.settings.sources import Gathered

# Shorter flags for settings that are used often.
ALIASES = {
    "model.path": "--model",
    "model.dtype": "--dtype",
    "model.activations": "--activations",
    "model.experts": "--experts",
    "workers.count": "--workers",
    "workers.expert_replicas": "--expert-replicas",
    "workers.gpus_each": "--gpus-per-worker",
    "workers.attention": "--attention",
    "workers.transport": "--transport",
    "workers.kv_standby": "--kv-standby",
    "ingress.host": "--host",
    "ingress.port": "--port",
    "ingress.grpc_port": "--grpc-port",
    "ingress.grace_s": "--grace",
}


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Declares a flag for each setting. One that is not given leaves no value in the options."""
    groups = {
        table.name: parser.add_argument_group(f"settings: {table.name}")
        for table in fields(ClusterConfig)
    }
    for name, declared in declarations():
        flags = [ALIASES[name]] if name in ALIASES else []
        more: dict[str, Any] = {"choices": choices_of(declared)} if choices_of(declared) else {}
        if declared.type in (bool, "bool"):
            # Without a value it switches on.
            more |= {"nargs": "?", "const": True}
        groups[name.partition(".")[0]].add_argument(
            *flags,
            flag_of(name),
            dest=name,
            type=_parser_of(name),
            default=argparse.SUPPRESS,
            metavar=None if choices_of(declared) else declared.name.upper(),
            help=_help(declared),
            **more,
        )


def gathered_from(options: argparse.Namespace, file: Path | None) -> "Gathered":
    """The settings: flags over environment over file over defaults.

    Raises:
        ConfigError: a field is invalid; the error names its table, the field, value and limit.
    """
    # Not earlier: `--help` needs no pydantic.
    from milliways.cluster.settings.sources import gather

    given = vars(options)
    flags = {name: given[name] for name, _ in declarations() if name in given}
    count, replicas = "workers.count", "workers.expert_replicas"
    if count in flags and replicas not in flags:
        base = gather(file=file, reads_environment=True).config.workers
        if base.expert_replicas > flags[count]:
            flags[replicas] = flags[count]
    return gather(file=file, flags=flags, reads_environment=True)


def print_config(gathered: "Gathered") -> None:
    """Prints settings as a TOML file that says where each value comes from."""
    from milliways.cluster.settings.sources import as_toml

    print(as_toml(gathered))


def _help(declared: Field[Any]) -> str:
    default = "" if declared.default is MISSING else declared.default
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    text = description_of(declared).removesuffix(".") + (f" [{shown}]" if shown else "")
    return text.replace("%", "%%")


def _parser_of(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        from milliways.cluster.settings.sources import parsed

        try:
            return parsed(name, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {error.limit}") from None

    return parse
