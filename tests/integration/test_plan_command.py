"""`milliways plan`, as a user types it."""

import json

import pytest

from milliways.cluster.cli import main as cli


def test_plan_of_grok_1_prints_a_line_for_each_worker(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "grok-1", "--workers", "8x80GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    workers = [line.split() for line in lines if line.startswith("worker-")]
    assert len(workers) == 8
    assert {line[2] for line in workers} == {"0-63"} and {line[3] for line in workers} == {"64"}
    assert any("318.2 GB: 64 layers of 8 experts" in line for line in lines)


def test_plan_as_json_names_every_expert(capsys: pytest.CaptureFixture[str]) -> None:
    workers = "2x10MB@a,1x10MB@b"
    arguments = ["plan", "--model", "demo", "--workers", workers, "--expert-replicas", "2"]
    assert cli.main([*arguments, "--kv-tokens", "512", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    held = [tuple(expert) for worker in plan["workers"] for expert in worker["experts"]]
    assert len(held) == 2 * 4 * 8 and len(set(held)) == 4 * 8
    assert [worker["node_id"] for worker in plan["workers"]] == ["a", "a", "b"]
    for worker in plan["workers"]:
        assert worker["used_bytes"] + worker["free_bytes"] == worker["memory_bytes"] == 10_000_000


def test_plan_that_does_not_fit_says_how_much_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--workers", "8x32GB"]) == 1
    assert "needs 318.2 GB, has 8 x 32 GB: 62.2 GB short" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["", "8", "0x80GB", "8x80XB", "x80GB", "9999x1GB", "8x-1GB"])
def test_workers_that_cannot_be_read_are_refused(
    workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = 1 if workers == "8" else 2
    assert cli.main(["plan", "--workers", workers]) == expected
    assert capsys.readouterr().err.startswith("milliways: ")
