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
from milliways.cluster.host.model_checks import check_files


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
    check_files(config.model)
    cluster = JoinedCluster(config, options.address) if options.address else LocalCluster(config)
    cluster.run()
