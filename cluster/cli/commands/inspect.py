"""`milliways inspect PATH`: what a checkpoint holds, and the memory that its shards need."""

import argparse
import json

from milliways.model.checkpoint import (
    Checkpoint,
    digest_model,
    format_summary,
    summarize,
    to_json,
)
from milliways.model.errors import InvalidRequestError
from milliways.model.manifest import digest_small_files
from milliways.model.model_dir import load_tokenizer, resolve_model_dir

MAX_WORKERS = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("path", metavar="PATH", help="model directory, its ckpt-0, or 'demo'")
    parser.add_argument(
        "--workers",
        type=int,
        default=8,
        metavar="N",
        help="number of workers to divide the weights among [%(default)s]",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every tensor; fail if a value is NaN or infinite, or a scale is not above 0",
    )
    parser.add_argument(
        "--digest",
        action="store_true",
        help="read every byte; print a manifest of digests only, for model.manifest",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Scans the files without their payloads, and prints the tables."""
    if not 1 <= options.workers <= MAX_WORKERS:
        raise InvalidRequestError("workers", options.workers, f"between 1 and {MAX_WORKERS}")
    path = resolve_model_dir(options.path)
    with Checkpoint.open(path) as checkpoint:
        load_tokenizer(path, checkpoint.config.vocab_size)
        if options.digest:
            print(digest_model(checkpoint).with_all(digest_small_files(path)).to_json())
            return
        num_verified_bytes = checkpoint.verify() if options.verify else None
        summary = summarize(checkpoint, options.workers)
        if options.json:
            values = to_json(summary) | {"num_verified_bytes": num_verified_bytes}
            if options.tensors:
                values["tensors"] = [_describe(checkpoint, i) for i in range(summary.num_tensors)]
            print(json.dumps(values, indent=2))
            return
        if options.tensors:
            for i in range(summary.num_tensors):
                print("{file}  {name}  {contents}".format(**_describe(checkpoint, i)))
            print()
        print(format_summary(summary))
        if num_verified_bytes is not None:
            print(
                f"\nverified          {num_verified_bytes:,} bytes: all values are finite,"
                " all scales are above 0"
            )


def _describe(checkpoint: Checkpoint, index: int) -> dict[str, str]:
    spec, record = checkpoint.specs[index], checkpoint.records[index]
    return {"file": spec.file_name, "name": spec.name, "contents": record.describe()}
