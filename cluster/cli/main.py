"""The `milliways` command: parses arguments, calls the composition roots, prints.

    milliways generate PROMPT   continues a prompt, streaming
    milliways logits            writes the logits of given tokens, to compare implementations
    milliways inspect PATH      shows what a checkpoint holds, and what it needs
    milliways plan              shows which worker would hold what
    milliways serve             starts a cluster and its endpoint
    milliways status            shows the workers of the cluster, what each holds and does
    milliways scale             grows or shrinks a running cluster
    milliways apply -f FILE     changes settings of a running cluster
    milliways drain WORKER      moves a worker's work away, then stops or restarts it
    milliways config schema     prints the schema of all settings
    milliways chaos             breaks a cluster under load, and compares every token
    milliways bench             measures speed, beside other engines and the machine's limits

Exit codes: 0 done, 1 the model cannot be used, 2 the request or the command line is wrong,
130 interrupted.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import cast

from milliways.cluster.cli import exit_codes
from milliways.runtime.user_cache import keep_programs

COMMANDS = {
    "generate": "continue a prompt",
    "logits": "write the logits of given tokens to a file",
    "inspect": "show tensors, parameters, bytes, and memory for N workers",
    "plan": "show which worker would hold what, without starting anything",
    "serve": "start a cluster and its HTTP and gRPC endpoint",
    "status": "show the workers of a running cluster",
    "scale": "grow or shrink a running cluster",
    "apply": "change settings of a running cluster; print the difference first",
    "drain": "move a worker's work away, then stop it or start it anew",
    "config": "print the JSON schema of the settings",
    "chaos": "break a cluster under load and compare every token with the undisturbed run",
    "bench": "measure speed, beside other engines and the limits of the machine",
}

VERSIONED = ("milliways", "jax", "ray")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `milliways` command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        speak_utf8()
        # Before the command's module: JAX reads this when it is imported.
        keep_programs()
        options = build_parser(chosen=next(iter(arguments), None)).parse_args(arguments)
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        return _abandon_stdout()
    except exit_codes.EXPECTED as error:
        return exit_codes.report(error)
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    return 0


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The command line. Only the chosen command is imported, since some need no JAX."""
    parser = argparse.ArgumentParser(
        prog="milliways", description="Serves Grok-1 and mixture-of-experts models of its shape."
    )
    parser.add_argument("--version", action=ShowVersions, help="show versions, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        if name == chosen:
            module = import_module(f"milliways.cluster.cli.commands.{name}")
            module.add_options(command)
            command.set_defaults(run=module.run)
    return parser


class ShowVersions(argparse.Action):
    """`--version`: our version, and those of the libraries on which bits and behaviour depend."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        # Metadata only: importing JAX and Ray would take seconds.
        print("\n".join(f"{name} {version(name)}" for name in VERSIONED))
        parser.exit()


def speak_utf8() -> None:
    """Reads and writes UTF-8, whatever the locale says: a model may write any character."""
    # Broken input reaches the tokenizer, which refuses it by name.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "strict")):
        if isinstance(stream, io.TextIOWrapper):
            cast("io.TextIOWrapper", stream).reconfigure(encoding="utf-8", errors=errors)


def _abandon_stdout() -> int:
    """The reader went away: gives the interpreter another file to flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_codes.BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
