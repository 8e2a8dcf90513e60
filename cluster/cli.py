"""The `milliways` command: parses arguments, calls the composition roots, prints.

    milliways generate PROMPT   continues a prompt, streaming
    milliways logits            writes the logits of given tokens, to compare implementations
    milliways inspect PATH      what a checkpoint holds, and what it needs

Exit codes: 0 done, 1 the model cannot be used, 2 the request or the command line is wrong,
130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from cluster.commands import generate, inspect, logits
from cluster.local import use_compile_cache
from model.errors import InvalidRequestError, ModelError

EXIT_UNUSABLE = 1
EXIT_BAD_REQUEST = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `milliways` command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        _keep_programs()
        run(options)
        sys.stdout.flush()
    except InvalidRequestError as error:
        return _fail(error, EXIT_BAD_REQUEST)
    except (ModelError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            return _abandon_stdout()
        return _fail(error, EXIT_UNUSABLE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line; each command's module declares its own options."""
    parser = argparse.ArgumentParser(
        prog="milliways", description="Serves Grok-1 and mixture-of-experts models of its shape."
    )
    parser.add_argument("--version", action="version", version=version("milliways"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, logits, inspect):
        command.add_parser(commands)
    return parser


def _keep_programs() -> None:
    """Keeps compiled programs between runs, in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    use_compile_cache(Path(base) / "milliways" / "programs")


def _fail(error: Exception, exit_code: int) -> int:
    print(f"milliways: {error}", file=sys.stderr)
    return exit_code


def _abandon_stdout() -> int:
    """The reader went away: give the interpreter something else to flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
