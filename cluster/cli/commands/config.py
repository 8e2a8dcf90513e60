"""`milliways config`: what can be set, for editors and for tools that check files."""

import argparse
import json


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("what", choices=("schema",), help="the JSON schema of the settings")


def run(options: argparse.Namespace) -> None:
    """Prints."""
    # Not earlier: `--help` needs no pydantic.
    from milliways.cluster.settings.sources import json_schema

    print(json.dumps(json_schema(), indent=2))
