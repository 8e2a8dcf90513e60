"""`milliways bench serve`: what HTTP and gRPC add to a router's own stream."""

import argparse
import tempfile
from pathlib import Path

from milliways.benchmarks.speed.arguments import check_rounds, find_model, report, write_json
from milliways.benchmarks.speed.programs.endpoints import (
    Ask,
    GrpcBenchClient,
    HttpBenchClient,
    RouterBenchClient,
)
from milliways.benchmarks.speed.served import serving
from milliways.benchmarks.speed.serving import (
    endpoints_to_json,
    format_endpoints,
    measure_endpoints,
)
from milliways.model.config import load_config
from milliways.model.errors import InvalidRequestError, ModelError
from milliways.model.model_dir import DEMO_NAME

MAX_WORKERS = 8
# Token ids that every model has.
_PROMPT_IDS = tuple(range(10, 26))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option("--model", metavar=f"{DEMO_NAME}|DIR", default=DEMO_NAME, help="[%(default)s]")
    option("--workers", type=int, default=2, metavar="N", help="[%(default)s]")
    option("--max-tokens", type=int, default=64, metavar="N", help="of each request [%(default)s]")
    option("--rounds", type=int, default=30, metavar="N", help="[%(default)s]")
    option("--json", type=Path, metavar="FILE", help="also write every sample to a file")


def run(options: argparse.Namespace) -> None:
    """Starts a cluster, sends the same request through each door in turn, prints the table."""
    check_rounds("rounds", options.rounds)
    if not 1 <= options.workers <= MAX_WORKERS:
        raise InvalidRequestError("workers", options.workers, f"between 1 and {MAX_WORKERS}")
    model_dir = find_model(options.model)
    room = load_config(model_dir).sequence_len - len(_PROMPT_IDS)
    if not 2 <= options.max_tokens <= room:
        raise InvalidRequestError("max-tokens", options.max_tokens, f"between 2 and {room}")
    ask = Ask(_PROMPT_IDS, options.max_tokens)
    report("starting a cluster")
    with (
        tempfile.TemporaryDirectory(prefix="mw-", ignore_cleanup_errors=True) as work_dir,
        serving(str(model_dir), options.workers, Path(work_dir)) as served,
    ):
        doors = {
            "router": RouterBenchClient(served.routers[0], ask),
            "grpc": GrpcBenchClient(served.grpc, ask),
            "http": HttpBenchClient(served.http, model_dir.name, ask),
        }
        report(f"{options.rounds} rounds")
        try:
            figures = measure_endpoints(doors, options.rounds)
        except (RuntimeError, OSError) as error:
            raise ModelError(f"a request failed: {error}") from error
    print(format_endpoints(figures))
    write_json(options.json, endpoints_to_json(figures))
