"""Contestants' processes, with small programs instead of engines."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

import milliways.benchmarks.speed.programs.line_protocol as line_protocol
from milliways.benchmarks.speed.bench_model import BENCH_CONFIG
from milliways.benchmarks.speed.contestant import ContestantError, ProgramContestant
from milliways.benchmarks.speed.llama_cpp import LlamaCpp, batched_tokens_per_s
from milliways.benchmarks.speed.peers import PEERS, PeerSetting, mixtral_sizes, start_peers
from milliways.benchmarks.speed.workload import Kind, Workload

DECODE_4 = Workload(Kind.DECODE, 4)
PROTOCOL_DIR = str(Path(line_protocol.__file__).parent)
# Speaks the protocol; claims half a second for each step.
FAKE_ENGINE = f"""
import sys
sys.path.insert(0, {PROTOCOL_DIR!r})
from line_protocol import serve

def measure(request):
    print("noise that is no reply")
    return request["size"] * request["steps"], request["steps"] / 2

serve(lambda: ("fake engine 1.0", measure))
"""


def program(source: str, tmp_path: Path) -> ProgramContestant:
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return ProgramContestant("fake", command, os.environ, tmp_path / "log")


def test_program_answers_with_tokens_per_second(tmp_path: Path) -> None:
    contestant = program(FAKE_ENGINE, tmp_path)
    try:
        assert contestant.about == "fake engine 1.0"
        assert contestant.measure(DECODE_4) == 8
        assert contestant.measure(DECODE_4) == 8
    finally:
        contestant.close()
    # One line for each of two repeats, and one for the warm-up.
    assert (tmp_path / "log").read_text().count("noise") == 3


def test_waiting_program_is_stopped(tmp_path: Path) -> None:
    contestant = program(FAKE_ENGINE, tmp_path)
    try:
        os.waitid(os.P_PID, contestant.process_id, os.WSTOPPED | os.WNOWAIT)
        contestant.measure(DECODE_4)
        os.waitid(os.P_PID, contestant.process_id, os.WSTOPPED | os.WNOWAIT)
    finally:
        contestant.close()


def test_error_of_a_program_that_dies_has_its_last_output(tmp_path: Path) -> None:
    with pytest.raises(ContestantError, match="ModuleNotFoundError: No module named 'no_engine'"):
        program("import no_engine", tmp_path)


def test_program_that_dies_while_measured_is_an_error(tmp_path: Path) -> None:
    contestant = program(FAKE_ENGINE.replace("return request", "raise OSError  #"), tmp_path)
    try:
        with pytest.raises(ContestantError, match="OSError"):
            contestant.measure(DECODE_4)
    finally:
        contestant.close()


def test_program_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ContestantError, match="/no/such/python"):
        ProgramContestant("fake", ["/no/such/python"], os.environ, tmp_path / "log")


def test_note_on_a_missing_engine_names_the_option_that_adds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    setting = PeerSetting(
        model_dir=tmp_path,
        config=BENCH_CONFIG,
        cache_dir=tmp_path,
        log_dir=tmp_path,
        num_threads=1,
        llama_bin=None,
        hf_python=None,
        vllm_python=None,
    )
    notes: list[str] = []
    assert list(start_peers(tuple(PEERS), setting, notes, lambda _: None)) == []
    hints = ("--llama-bin", "--hf-python", "--hf-python", "--vllm-python")
    assert all(hint in note for hint, note in zip(hints, notes, strict=True))


@pytest.mark.parametrize(
    ("workload", "speed", "expected_options"),
    [
        (Workload(Kind.DECODE, 1), 45.5, "llama-bench -m x.gguf -t 2 -p 0 -n 32 -d 64"),
        (Workload(Kind.PREFILL, 512), 45.5, "llama-bench -m x.gguf -t 2 -p 512 -n 0"),
        (DECODE_4, 70.25, "llama-batched-bench -m x.gguf -t 2 -npp 64 -ntg 16 -npl 4 -c 320"),
    ],
)
def test_llama_cpp_is_measured_by_its_own_programs(
    tmp_path: Path, workload: Workload, speed: float, expected_options: str
) -> None:
    replies = {
        "llama-bench": '[{"avg_ts": 45.5, "n_threads": 2, "build_number": 1, "build_commit": "c"}]',
        "llama-batched-bench": 'warming up\n{"speed_pp": 100.0, "speed_tg": 70.25}',
    }
    for name, reply in replies.items():
        script = (
            f'#!/bin/sh\necho "$(basename $0) $*" > {tmp_path}/asked\ncat {tmp_path}/{name}.out\n'
        )
        (tmp_path / f"{name}.out").write_text(reply)
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    assert LlamaCpp("llama", tmp_path, Path("x.gguf"), 2).measure(workload) == speed
    assert (tmp_path / "asked").read_text().startswith(expected_options)


def test_error_of_llama_cpp_says_why_it_failed(tmp_path: Path) -> None:
    (tmp_path / "llama-bench").write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    (tmp_path / "llama-bench").chmod(0o755)
    with pytest.raises(ContestantError, match="exited with 3: no such model"):
        LlamaCpp("llama", tmp_path, Path("x.gguf"), 2).measure(Workload(Kind.PREFILL, 8))


def test_batched_output_without_a_result_is_an_error() -> None:
    with pytest.raises(ContestantError, match="no result"):
        batched_tokens_per_s("nothing fits\n")


def test_mixtral_has_our_sizes() -> None:
    sizes = mixtral_sizes(BENCH_CONFIG)
    assert (sizes["hidden_size"], sizes["num_local_experts"], sizes["head_dim"]) == (768, 8, 128)
