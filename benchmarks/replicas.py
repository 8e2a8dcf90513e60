"""How long requests wait for their first token, with 1, 2 and 4 replicas of the ingress.

    python -m milliways.benchmarks.replicas [--replicas 1,2,4] [--rounds N] [--requests N] …

Starts a cluster of three workers for each number of replicas, on the demo model, and sends each the
same mixed requests at the same times, over HTTP: most are short, some long, some have many samples.
Serve's proxy chooses a replica for each, and the replica a router. If replicas knew only their own
requests, short ones would wait behind many samples that another replica has sent to the same
router. So the aim is that the slowest hundredth waits at most a tenth longer than with one replica.
"""

import argparse
import http.client
import json
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

from milliways.benchmarks.chaos.local_cluster import local_cluster
from milliways.benchmarks.chaos.report import percentile
from milliways.model.model_dir import DEMO_NAME

MOST_TIMES = 1.1
MOST_AT_A_TIME = 128
REQUEST_TIMEOUT_S = 120.0
# A prompt is a beginning that all have, and some of these words.
_WORDS = ("star", "tea", "towel", "time", "42")
# Errors come as events too, without it.
_TOKEN = b'"choices"'
_CONFIG = """
[workers]
count = 3
expert_replicas = 2

[ingress]
min_replicas = {replicas}
max_replicas = {replicas}
"""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and when it is sent, in seconds after the first one."""

    at_s: float
    prompt: str
    max_tokens: int
    num_samples: int


def mixed_asks(random: Random, count: int, rate: float) -> list[Ask]:
    """Requests at random times, `rate` a second: of 20, 16 are short, 3 long, 1 has 16 samples."""
    asks: list[Ask] = []
    at_s = 0.0
    for _ in range(count):
        kind = random.randrange(20)
        num_words = random.randrange(60) if kind >= 16 else random.randrange(4)
        prompt = " ".join(["Welcome to", *random.choices(_WORDS, k=num_words)])
        max_tokens = 4 if kind < 16 else random.randrange(60, 160) if kind < 19 else 32
        asks.append(Ask(at_s, prompt, max_tokens, 16 if kind == 19 else 1))
        at_s += random.expovariate(rate)
    return asks


def waits(url: str, asks: Sequence[Ask]) -> list[float]:
    """Sends the requests when they are due; returns how long each waited for its first token.

    The wait begins when a request is due, in seconds.
    """
    began_s = time.monotonic() + 0.5
    with ThreadPoolExecutor(MOST_AT_A_TIME) as threads:
        return list(threads.map(lambda ask: _wait_of(url, ask, began_s + ask.at_s), asks))


def _wait_of(url: str, ask: Ask, due_s: float) -> float:
    time.sleep(max(0.0, due_s - time.monotonic()))
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port, timeout=REQUEST_TIMEOUT_S
    )
    try:
        body = _body(ask)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != HTTPStatus.OK:
            raise RuntimeError(f"HTTP {response.status}: {response.read(1000)!r}")
        first_s = next((time.monotonic() for line in response if _TOKEN in line), None)
        # To the end, or the request would be cancelled.
        response.read()
        if first_s is None:
            raise RuntimeError("an answer without a token")
        return first_s - due_s
    finally:
        connection.close()


def _body(ask: Ask) -> dict[str, Any]:
    return {
        "model": DEMO_NAME,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "n": ask.num_samples,
        "temperature": 1.0,
        "seed": 1,
        "stream": True,
        "ignore_eos": True,
    }


@contextmanager
def cluster_with(num_replicas: int) -> Generator[str]:
    """A cluster whose ingress has this number of replicas; yields its URL."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(_CONFIG.format(replicas=num_replicas), "utf-8")
        with local_cluster(["--config", str(config)]) as cluster:
            yield cluster.running.http


def table(waits_s: Mapping[int, Sequence[float]]) -> list[str]:
    """A row for each number of replicas, and a verdict for each but the first."""
    lines = [
        "| ms to the first token, ingress replicas | p50 | p90 | p99 |",
        "|---|---:|---:|---:|",
    ]
    for count, of_one in waits_s.items():
        cells = [f"{1000 * percentile(of_one, share):.0f}" for share in (0.5, 0.9, 0.99)]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    first, *others = waits_s
    for count in others:
        ratio = percentile(waits_s[count], 0.99) / percentile(waits_s[first], 0.99)
        verdict = "reached" if ratio <= MOST_TIMES else "missed"
        lines.append(
            f"p99 with {count}: {ratio:.2f} times that with {first}"
            f" (aim: at most {MOST_TIMES}, {verdict})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--replicas", default="1,2,4", help="numbers of replicas [%(default)s]")
    option("--rounds", type=int, default=2, help="clusters for each number [%(default)s]")
    option("--requests", type=int, default=200, help="requests of a round [%(default)s]")
    option("--rate", type=float, default=3.0, help="requests per second [%(default)s]")
    options = parser.parse_args()
    counts = [int(text) for text in options.replicas.split(",")]
    waits_s: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(options.rounds):
        asks = mixed_asks(Random(f"round {number}"), options.requests, options.rate)
        for count in counts:
            with cluster_with(count) as url:
                # Whatever is not compiled yet.
                waits(url, mixed_asks(Random("warm"), 20, 10 * options.rate))
                waits_s[count] += waits(url, asks)
    print("\n".join(table(waits_s)))


if __name__ == "__main__":
    main()
