"""`milliways bench dataplane`: a round trip to a worker, beside an echo of the same bytes."""

import argparse
from pathlib import Path

from milliways.benchmarks.speed.arguments import check_rounds, counts_of, report, write_json
from milliways.benchmarks.speed.contestant import ContestantError
from milliways.benchmarks.speed.dataplane import NUM_TOKENS, format_hops, hops_to_json, measure_hops
from milliways.model.errors import InvalidRequestError, ModelError

MAX_TOKENS = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "--tokens",
        metavar="1,32",
        default=",".join(map(str, NUM_TOKENS)),
        help="numbers of tokens to send each way; a token has 6144 bfloat16 [%(default)s]",
    )
    option("--rounds", type=int, default=20, metavar="N", help="number of rounds [%(default)s]")
    option(
        "--calls", type=int, default=50, metavar="N", help="round trips in each round [%(default)s]"
    )
    option("--json", type=Path, metavar="FILE", help="also write every sample to a file")


def run(options: argparse.Namespace) -> None:
    """Measures all contestants in turn, and prints the table."""
    tokens = counts_of("tokens", options.tokens)
    if not tokens or max(tokens) > MAX_TOKENS:
        limit = f"one or more counts of at most {MAX_TOKENS}"
        raise InvalidRequestError("tokens", options.tokens, limit)
    check_rounds("rounds", options.rounds)
    check_rounds("calls", options.calls)
    report(f"{options.rounds} rounds of {options.calls} calls")
    try:
        figures = measure_hops(options.rounds, options.calls, tokens)
    except ContestantError as error:
        raise ModelError(str(error)) from error
    print(format_hops(figures))
    write_json(options.json, hops_to_json(figures))
