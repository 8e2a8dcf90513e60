"""Another model on a running cluster: new workers beside the old ones, and no stream is cut.

The tests run in this order. The last one leaves the cluster with the model that it found.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from milliways.cluster.host.local import cache_size_for, load_local_model, make_local_engine
from milliways.cluster.ingress.served_model import load_served_model
from milliways.cluster.settings.config import ModelSettings
from milliways.model.config import load_config
from milliways.model.demo import DEMO_DIR
from tests.cluster.test_ingress_leaves import Traffic, check_whole, text
from tests.cluster.test_served_changes import settled
from tests.conftest import REPOSITORY
from tests.demo_requests import alone, request_of
from tests.reference import write_random_model
from tests.served_cluster import ServedCluster, wait_until

__all__ = ["text"]

SECOND = "second"
PARAMS = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
TIMEOUT_S = 280.0


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Another model, of the demo model's sizes: its programs are compiled already."""
    folder = tmp_path_factory.mktemp("models") / SECOND
    write_random_model(folder, load_config(DEMO_DIR), {}, seed=1)
    shutil.copy(DEMO_DIR / "tokenizer.model", folder)
    yield folder


def complete(cluster: ServedCluster, model: str) -> str:
    body = PARAMS | {"model": model, "prompt": "Welcome to"}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


async def apply(cluster: ServedCluster, file: Path, *, kills: int = 0) -> str:
    """Applies settings; if asked to, kills the controller while new workers start."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "milliways", "apply", "-f", str(file)),
        cwd=REPOSITORY,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    said = await process.stdout.readline()
    if kills:
        await asyncio.sleep(3.0)
        os.kill(kills, signal.SIGKILL)
    async with asyncio.timeout(TIMEOUT_S):
        rest, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return (said + rest).decode()


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_another_model_takes_over_and_no_stream_is_cut(
    cluster: ServedCluster, tmp_path: Path, second: Path, text: str
) -> None:
    file = tmp_path / "second.toml"
    file.write_text(f'[model]\npath = "{second}"\n', "utf-8")
    before = cluster.status()
    traffic, said = Traffic(cluster), ""

    async def change() -> None:
        nonlocal said
        said = await apply(cluster, file)

    asyncio.run(traffic.run_while(change))
    check_whole(traffic.begun, text)
    assert said.startswith(f"model.path: 'demo' -> '{second}' (as a new generation)\n")
    assert said.endswith("\ndone\n")
    model = load_served_model(ModelSettings(path=str(second)))
    engine = make_local_engine(load_local_model(second, "float32"), cache_size_for(1, 512))
    events = alone(engine, request_of(model, "Welcome to", PARAMS))[0]
    assert complete(cluster, SECOND) == "".join(event.text for event in events)
    after = cluster.status()
    assert (after["model"], after["generation"]) == (str(second), before["generation"] + 1)
    assert len(after["generations"]) == 1
    assert after["settings"]["pending"] == [] and after["settings"]["problem"] == ""
    old = {worker["pid"] for worker in before["workers"]}
    assert old.isdisjoint(process.pid for process in cluster.processes())


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_the_way_back_outlives_the_controller(cluster: ServedCluster, tmp_path: Path) -> None:
    file = tmp_path / "demo.toml"
    file.write_text('[model]\npath = "demo"\n', "utf-8")
    before = cluster.status()
    said = asyncio.run(apply(cluster, file, kills=before["controller_pid"]))
    assert said.endswith("\ndone\n")
    assert complete(cluster, "demo")
    after = cluster.status()
    assert (after["model"], len(after["generations"])) == ("demo", 1)
    assert after["controller_pid"] != before["controller_pid"]
    wait_until(settled(cluster, 3), "each expert has two holders")
