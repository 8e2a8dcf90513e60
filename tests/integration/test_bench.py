"""`milliways bench` on the demo model, without peers."""

import json
from pathlib import Path

import pytest

from milliways.cluster.cli import main as cli

QUICK = ["--model", "demo", "--repeats", "1"]


def test_bench_prints_speeds_floors_and_missing_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    sizes = ["--batch", "1,2", "--prefill", "16", "--json", str(tmp_path / "samples.json")]
    assert cli.main(["bench", *QUICK, *sizes]) == 0
    shown = capsys.readouterr().out
    assert "milliways exact" in shown and "ceiling, tokens/s" in shown
    assert "llama.cpp is absent" in shown and "vllm is absent" in shown
    values = json.loads((tmp_path / "samples.json").read_text())
    samples = values["tokens_per_s"]["milliways exact"]
    assert list(samples) == ["decode 1", "decode 2", "prefill 16"]
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in samples.values())
    assert values["limits"][0]["read_bytes_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,x"], "batch = '1,x'"),
        (["--batch", "0"], "batch = '0'"),
        (["--batch", "1000"], "batch = 1000"),
        (["--batch", "", "--prefill", ""], "batch = ''"),
        (["--prefill", "100000"], "prefill 100000 = 100000"),
        (["--peers", "nobody"], "peers = 'nobody'"),
        (["--activations", "int3"], "activations = 'int3'"),
        (["--repeats", "0"], "repeats = 0"),
    ],
)
def test_bad_option_gives_a_one_line_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["bench", *QUICK, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
