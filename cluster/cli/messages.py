"""What `milliways serve` prints: progress, and a greeting with a command to try."""

import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from milliways.cluster.settings.config import ClusterConfig
from milliways.model.model_dir import description_dir, resolve_model_dir
from milliways.model.tokenizer import TOKENIZER_FILE
from milliways.wire.addresses import join_address, reachable_host

BAR_WIDTH = 30


def greeting(config: ClusterConfig) -> str:
    """The addresses of the cluster, and a command to try."""
    ingress = config.ingress
    host = reachable_host(ingress.host)
    http = f"http://{join_address(host, ingress.port)}"
    grpc = join_address(host, ingress.grpc_port)
    model_dir = resolve_model_dir(config.model.path)
    name = config.model.name or model_dir.name
    # A model without a tokenizer takes token ids only.
    prompt = "Welcome to" if (description_dir(model_dir) / TOKENIZER_FILE).is_file() else [1, 2, 3]
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 32, "stream": True})
    return "\n".join(
        [
            f"serving {name} with {config.workers.count} workers",
            f"  HTTP  {http}/v1",
            f"  gRPC  {grpc}",
            "try:",
            f"  curl -N {http}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
            "Ctrl-C stops it.",
        ]
    )


class Bar:
    """A progress line for loading; a terminal shows it in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = ""

    def draw(self, workers: list[dict[str, Any]]) -> None:
        """Shows the bytes read and the number of ready workers."""
        bytes_read = sum(worker["bytes_read"] for worker in workers)
        bytes_wanted = sum(worker["bytes_wanted"] for worker in workers)
        share = min(1.0, bytes_read / bytes_wanted) if bytes_wanted else 0.0
        num_ready = sum(worker["state"] == "ready" for worker in workers)
        filled = round(share * BAR_WIDTH)
        line = (
            f"loading [{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"
            f" {bytes_read / 1e9:.2f} of {bytes_wanted / 1e9:.2f} GB,"
            f" {num_ready} of {len(workers)} workers ready"
        )
        if self._is_terminal:
            self._stream.write(f"\r{line}")
            self._stream.flush()
        elif num_ready and line != self._last:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        self._last = line

    def end(self) -> None:
        """Moves to the next line."""
        if self._is_terminal:
            self._stream.write("\n")


@contextmanager
def mute_stderr() -> Generator[None]:
    """Hides what any code of this process writes to standard error meanwhile, also in C++.

    Ray's library has much to say about processes that end under it.
    """
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def say(text: str) -> None:
    """Prints to standard error; standard output is for programs."""
    # A terminal that was closed takes nothing more.
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
