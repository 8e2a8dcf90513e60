"""`milliways logits`: writes the logits of given tokens, float32 [T, V], to a .npz file."""

import argparse
from pathlib import Path

import numpy as np

from milliways.cluster.cli.commands.options import add_model_options, parse_token_ids
from milliways.cluster.host.local import (
    cache_size_for,
    load_local_model,
    make_local_runner,
    wanted_kernels,
)
from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import resolve_model_dir
from milliways.model.runner import ModelRunner, ScheduledTokens
from milliways.router.requests.request import GenerationRequest

# Logits of a chunk take chunk * V * 4 bytes: 64 MiB at Grok-1's vocabulary.
CHUNK_TOKENS = 128


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    add_model_options(parser, default_model=None)
    parser.add_argument("--tokens", required=True, metavar="1,2,3", help="token ids to compute")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.npz",
        help="file to write; it has one array, `logits` [T, V]",
    )


def run(options: argparse.Namespace) -> None:
    """Computes in chunks through the KV cache, as in serving."""
    out = Path(options.out)
    # Checked first, because loading and computing may take minutes.
    if not out.parent.is_dir():
        raise InvalidRequestError("out", str(out), "a file in a folder that exists")
    # A request checks the ids, so that bad ones give the same errors as in serving.
    request = GenerationRequest(prompt_ids=parse_token_ids(options.tokens), max_tokens=1)
    model_dir = resolve_model_dir(options.model)
    model = load_local_model(model_dir, options.dtype, wanted_kernels(options))
    request.check_fits(model.decoder.config)
    runner = make_local_runner(model, cache_size_for(1, len(request.prompt_ids)))
    logits_TV = compute_logits(runner, request.prompt_ids)
    with out.open("wb") as file:
        np.savez(file, logits=logits_TV)
    print(f"{out}: logits float32 {list(logits_TV.shape)}")


def compute_logits(runner: ModelRunner, token_ids: tuple[int, ...]) -> np.ndarray:
    """The logits [T, V] of all positions of one sequence; the cache must be empty."""
    block_size = runner.cache_size.block_size
    block_table = list(range(-(-len(token_ids) // block_size)))
    chunks = [
        ScheduledTokens(
            token_ids=token_ids[start : start + CHUNK_TOKENS],
            start_position=start,
            block_table=block_table,
            num_logits=len(token_ids[start : start + CHUNK_TOKENS]),
        )
        for start in range(0, len(token_ids), CHUNK_TOKENS)
    ]
    return np.concatenate([runner.compute_logits([chunk]) for chunk in chunks])
