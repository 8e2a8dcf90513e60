"""`milliways serve`: starts a cluster and its endpoint, and ends both when it is told to."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from milliways.cluster.cli.commands.options import ACTIVATION_NAMES, DTYPE_NAMES, RESIDENCE_NAMES
from milliways.cluster.cli.listening import settle_addresses
from milliways.cluster.cli.serving import JoinedCluster, LocalCluster
from milliways.cluster.settings.config import ClusterConfig, read_config
from milliways.model.checkpoint import Checkpoint
from milliways.model.model_dir import DEMO_NAME, resolve_model_dir
from milliways.wire import transports


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options. An option that is not given keeps the file's value, or its default."""
    option = parser.add_argument
    option("--config", type=Path, metavar="FILE.toml", help="file of settings; options override it")
    option("--model", metavar=f"DIR|{DEMO_NAME}", help="model directory, or our demo model [demo]")
    option("--workers", type=int, metavar="N", help="number of workers to start [3]")
    option(
        "--expert-replicas",
        type=int,
        metavar="R",
        help="number of workers that hold each expert [2; 1 with a single worker]",
    )
    option(
        "--gpus-per-worker",
        type=float,
        metavar="G",
        help="number of GPUs of each worker; below 1 it shares one [0]",
    )
    option(
        "--attention",
        choices=("auto", "replicated", "layers"),
        help="replicated: each worker holds all attention layers; layers: each holds some [auto]",
    )
    option(
        "--transport",
        choices=transports.SETTINGS,
        help="how workers exchange rows: by gRPC, or by shared memory within a host [auto]",
    )
    option(
        "--kv-standby",
        action="store_const",
        const=True,
        help="copy KV blocks to a second worker, so that a death does not lose them",
    )
    option("--dtype", choices=DTYPE_NAMES, help="dtype of activations and KV cache [float32]")
    option(
        "--activations",
        choices=ACTIVATION_NAMES,
        help="exact: as computed; int8: rounded before each int8 weight, faster [exact]",
    )
    option(
        "--experts",
        choices=RESIDENCE_NAMES,
        help="loaded: copied into memory; mapped: read from their files [loaded]",
    )
    option("--host", metavar="H", help="address to listen on [127.0.0.1]")
    option("--port", type=int, metavar="P", help="port for HTTP [8000]")
    option("--grpc-port", type=int, metavar="P", help="port for gRPC [50051]")
    option(
        "--grace",
        type=float,
        metavar="S",
        help="seconds that running requests have to end after SIGTERM or SIGHUP [120]",
    )
    option("--address", metavar="RAY", help="address of a running Ray cluster [start a local one]")


def run(options: argparse.Namespace) -> None:
    """Starts the cluster, waits until it is ready, and serves until a signal ends the process."""
    config = settings_of(options)
    # These checks come first, because starting Ray takes ten seconds.
    config = dataclasses.replace(config, ingress=settle_addresses(config.ingress))
    with Checkpoint.open(resolve_model_dir(config.model.path)):
        pass
    cluster = JoinedCluster(config, options.address) if options.address else LocalCluster(config)
    cluster.run()


def settings_of(options: argparse.Namespace) -> ClusterConfig:
    """The file's settings, overridden by the command line's options.

    Raises:
        ConfigError: a field is invalid; the error names its table, the field, value and limit.
    """
    base = read_config(options.config) if options.config else ClusterConfig()
    count = options.workers
    replicas = options.expert_replicas
    if count is not None and replicas is None and base.workers.expert_replicas > count:
        replicas = count
    tables: dict[str, dict[str, Any]] = {
        "model": {
            "path": options.model,
            "dtype": options.dtype,
            "activations": options.activations,
            "experts": options.experts,
        },
        "workers": {
            "count": count,
            "expert_replicas": replicas,
            "gpus_each": options.gpus_per_worker,
            "attention": options.attention,
            "transport": options.transport,
            "kv_standby": options.kv_standby,
        },
        "ingress": {
            "host": options.host,
            "port": options.port,
            "grpc_port": options.grpc_port,
            "grace_s": options.grace,
        },
    }
    changed = {
        table: dataclasses.replace(
            getattr(base, table), **{k: v for k, v in values.items() if v is not None}
        )
        for table, values in tables.items()
    }
    return dataclasses.replace(base, **changed)
