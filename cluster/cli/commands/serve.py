"""`milliways serve`: starts a cluster and its endpoint, and ends both when it is told to."""

import argparse
import dataclasses
from pathlib import Path

from milliways.cluster.cli.commands.setting_flags import (
    add_setting_flags,
    gathered_from,
    print_config,
)
from milliways.cluster.cli.listening import settle_addresses
from milliways.cluster.cli.serving import JoinedCluster, LocalCluster
from milliways.model.checkpoint import Checkpoint, check_unchangeable, part_names
from milliways.model.errors import ManifestError
from milliways.model.manifest import read_manifest
from milliways.model.model_dir import resolve_model_dir

MAPPED = "mapped"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options. An option that is not given keeps the file's value, or its default."""
    parser.usage = f"{parser.prog} [--config FILE.toml] [options]"
    option = parser.add_argument
    option("--config", type=Path, metavar="FILE.toml", help="file of settings; options override it")
    option(
        "--print-config",
        action="store_true",
        help="print the settings and where each comes from, and exit",
    )
    option("--address", metavar="RAY", help="address of a running Ray cluster [start a local one]")
    add_setting_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Starts the cluster, waits until it is ready, and serves until a signal ends the process."""
    gathered = gathered_from(options, options.config)
    if options.print_config:
        print_config(gathered)
        return
    config = gathered.config
    # These checks come first, because starting Ray takes ten seconds.
    config = dataclasses.replace(config, ingress=settle_addresses(config.ingress))
    with Checkpoint.open(resolve_model_dir(config.model.path)) as checkpoint:
        if config.model.manifest:
            check_manifest(Path(config.model.manifest), checkpoint)
        if config.model.experts == MAPPED:
            check_mapped(checkpoint)
    cluster = JoinedCluster(config, options.address) if options.address else LocalCluster(config)
    cluster.run()


def check_manifest(path: Path, checkpoint: Checkpoint) -> None:
    """Checks that a manifest is one of this model, before any worker starts.

    Raises:
        ManifestError: it cannot be read, or has no digest of a part of the model.
    """
    missing = read_manifest(path).missing_of(part_names(checkpoint))
    if missing:
        reason = f"has no digest of {missing[0]}, and of {len(missing) - 1} more parts of the model"
        raise ManifestError(path, reason)


def check_mapped(checkpoint: Checkpoint) -> None:
    """Checks that nobody can change the experts that would stay in their files.

    Raises:
        ChangeableFileError: somebody can.
    """
    for spec in checkpoint.specs:
        if spec.role.is_expert:
            check_unchangeable(checkpoint.record(spec).path)
