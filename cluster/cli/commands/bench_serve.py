"""`milliways bench serve`: what HTTP and gRPC add to a router's own stream."""

import argparse
import tempfile
from pathlib import Path

from milliways.benchmarks.speed.arguments import check_rounds, find_model, report, write_json
from milliways.benchmarks.speed.programs.endpoints import BenchRequest
from milliways.benchmarks.speed.served import measure_served, measure_streams
from milliways.benchmarks.speed.serving import endpoints_to_json, format_endpoints
from milliways.benchmarks.speed.under_load import format_load, load_to_json
from milliways.model.config import load_config
from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import DEMO_NAME

MAX_WORKERS = 8
MAX_STREAMS = 64
# Token ids that every model has.
_PROMPT_IDS = tuple(range(10, 26))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "--model",
        metavar=f"{DEMO_NAME}|DIR",
        default=DEMO_NAME,
        help="model to serve [%(default)s]",
    )
    option("--workers", type=int, default=2, metavar="N", help="number of workers [%(default)s]")
    option(
        "--max-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens to generate for each request [%(default)s]",
    )
    option("--rounds", type=int, default=30, metavar="N", help="number of rounds [%(default)s]")
    option(
        "--streams",
        type=_numbers,
        metavar="A,B",
        help="in place of the table: requests in so many streams at once, and what they cost",
    )
    option("--json", type=Path, metavar="FILE", help="also write every sample to a file")


def run(options: argparse.Namespace) -> None:
    """Measures all endpoints of a cluster, and prints the table."""
    check_rounds("rounds", options.rounds)
    if not 1 <= options.workers <= MAX_WORKERS:
        raise InvalidRequestError("workers", options.workers, f"between 1 and {MAX_WORKERS}")
    model_dir = find_model(options.model)
    max_tokens = load_config(model_dir).sequence_len - len(_PROMPT_IDS)
    if not 2 <= options.max_tokens <= max_tokens:
        raise InvalidRequestError("max-tokens", options.max_tokens, f"between 2 and {max_tokens}")
    request = BenchRequest(_PROMPT_IDS, options.max_tokens)
    if options.streams:
        _measure_streams(options, model_dir, request)
        return
    with tempfile.TemporaryDirectory(prefix="mw-", ignore_cleanup_errors=True) as work_dir:
        figures = measure_served(
            model_dir, options.workers, Path(work_dir), request, options.rounds, report
        )
    print(format_endpoints(figures))
    write_json(options.json, endpoints_to_json(figures))


def _measure_streams(options: argparse.Namespace, model_dir: Path, request: BenchRequest) -> None:
    for num_streams in options.streams:
        if not 1 <= num_streams <= MAX_STREAMS:
            raise InvalidRequestError("streams", num_streams, f"between 1 and {MAX_STREAMS}")
    with tempfile.TemporaryDirectory(prefix="mw-", ignore_cleanup_errors=True) as work_dir:
        figures = measure_streams(
            model_dir,
            options.workers,
            Path(work_dir),
            request,
            options.rounds,
            options.streams,
            report,
        )
    print(format_load(figures))
    write_json(options.json, {"streams": load_to_json(figures)})


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
