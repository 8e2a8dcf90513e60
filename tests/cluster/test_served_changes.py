"""Workers start, stop and die while clients are served: no client notices."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.demo_requests import PARAMS, alone, request_of
from tests.ingresses import demo_engine, demo_model
from tests.served_cluster import ServedCluster, wait_until

CASES = [(f"Welcome to the {i}", PARAMS[i % 4] | {"max_tokens": 48, "n": 1}) for i in range(8)]
AT_A_TIME = 4


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The texts of a single process."""
    engine, model = demo_engine(), demo_model()
    requests = [
        request_of(model, prompt, params | {"ignore_eos": True}) for prompt, params in CASES
    ]
    return ["".join(e.text for e in alone(engine, request)[0]) for request in requests]


class Traffic:
    """Clients that repeat their requests until they are stopped."""

    def __init__(self, cluster: ServedCluster) -> None:
        self.answers: list[tuple[int, str]] = []
        self.errors: list[Exception] = []
        self._url = f"{cluster.url}/v1"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops the clients, after their running requests."""
        self._stopped.set()
        self._thread.join()

    async def _run(self) -> None:
        async with openai.AsyncOpenAI(
            base_url=self._url, api_key="none", max_retries=0, timeout=60
        ) as client:
            await asyncio.gather(*(self._ask(client, first) for first in range(AT_A_TIME)))

    async def _ask(self, client: openai.AsyncOpenAI, index: int) -> None:
        while not self._stopped.is_set():
            prompt, params = CASES[index]
            try:
                stream = await client.completions.create(
                    model="demo",
                    prompt=prompt,
                    stream=True,
                    extra_body={"ignore_eos": True},
                    **params,
                )
                pieces = [piece.choices[0].text async for piece in stream]
                self.answers.append((index, "".join(pieces)))
            except openai.OpenAIError as error:
                self.errors.append(error)
            index = (index + AT_A_TIME) % len(CASES)


@contextmanager
def traffic(cluster: ServedCluster, texts: list[str]) -> Iterator[Traffic]:
    """Runs clients meanwhile; each must get the text that it gets alone."""
    clients = Traffic(cluster)
    clients.start()
    try:
        wait_until(lambda: len(clients.answers) >= AT_A_TIME, "clients are served")
        yield clients
        seen = len(clients.answers)
        wait_until(lambda: len(clients.answers) >= seen + 2 * AT_A_TIME, "they are served still")
    finally:
        clients.stop()
    assert clients.errors == []
    assert [(i, text) for i, text in clients.answers if text != texts[i]] == []


def workers_of(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {worker["worker_id"]: worker for worker in status["workers"]}


def ready_workers(cluster: ServedCluster) -> list[float]:
    """One value for each worker: 1 if it is ready, otherwise 0."""
    return [v for k, v in cluster.metrics().items() if k.endswith(',state="ready"}')]


def settled(cluster: ServedCluster, num_workers: int) -> Callable[[], bool]:
    """Whether this many workers serve, and each expert has two holders."""

    def look() -> bool:
        # Metrics are cheaper to read than a command's output.
        if sum(ready_workers(cluster)) != num_workers:
            return False
        workers = cluster.status()["workers"]
        held = sorted(tuple(pair) for worker in workers for pair in worker["experts"])
        every = [(layer, expert) for layer in range(4) for expert in range(8)]
        return len(workers) == num_workers and held == sorted(every * 2)

    return look


def test_growing_and_shrinking_fails_no_request(cluster: ServedCluster, texts: list[str]) -> None:
    with traffic(cluster, texts):
        for num_workers in (4, 2, 3):
            done = cluster.command("scale", "--workers", str(num_workers))
            assert (done.returncode, done.stdout) == (0, f"{num_workers} workers\n"), done.stderr
            wait_until(settled(cluster, num_workers), "experts are spread over the workers")
    wait_until(lambda: is_idle(cluster), "no resource is held")


def is_idle(cluster: ServedCluster) -> bool:
    routers = [worker["router"] for worker in cluster.status()["workers"]]
    return not any(r["active_requests"] or r["running"] or r["waiting"] for r in routers)


@pytest.mark.parametrize(
    ("num_workers", "says"),
    [("1", "expert_replicas = 2: between 1 and the number of workers, 1"), ("0", "workers.count")],
)
def test_refused_scale_changes_nothing_and_says_why(
    cluster: ServedCluster, num_workers: str, says: str
) -> None:
    before = cluster.status()
    done = cluster.command("scale", "--workers", num_workers)
    assert done.returncode == 1 and done.stdout == ""
    # The last line is ours; lines of Ray come before it.
    assert done.stderr.splitlines()[-1].startswith("milliways: ")
    assert says in done.stderr and "Traceback" not in done.stderr
    after = cluster.status()
    assert after["placement_epoch"] == before["placement_epoch"]
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]


def test_killed_worker_costs_no_token_and_restarts(
    cluster: ServedCluster, texts: list[str]
) -> None:
    before = cluster.status()
    victim = workers_of(before)["worker-1"]
    with traffic(cluster, texts):
        os.kill(victim["pid"], signal.SIGKILL)
        deaths = [before["deaths"] + 1]
        wait_until(
            lambda: cluster.metric("milliways_worker_deaths_total") == deaths, "it is missed"
        )
        wait_until(settled(cluster, 3), "it is back")
    after = workers_of(cluster.status())["worker-1"]
    assert after["incarnation"] == victim["incarnation"] + 1
    assert after["pid"] != victim["pid"]
