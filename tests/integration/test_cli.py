"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milliways.cluster.cli import main as cli
from milliways.model.checkpoint import write_plain
from milliways.model.ops import native
from tests.reference import small_config, write_random_model


def generate_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["generate", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_from_token_ids_gives_the_reference_tokens(
    golden_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = golden_dir / "tiny"
    with np.load(model_dir / "golden" / "forward_f32.npz") as forward:
        tokens = ",".join(map(str, forward["p0_tokens"]))
    with np.load(model_dir / "golden" / "generate_f32.npz") as recorded:
        expected = recorded["greedy_p0_tokens"].tolist()
    result = generate_json(
        capsys, "--model", str(model_dir), "--tokens", tokens, "--temperature", "0",
        "--max-tokens", str(len(expected)), "--ignore-eos", "--logprobs", "2",
    )  # fmt: skip
    (choice,) = result["choices"]
    assert choice["token_ids"] == expected
    assert choice["finish_reason"] == "length"
    assert result["usage"] == {"prompt_tokens": 16, "completion_tokens": 32, "total_tokens": 48}
    assert result["timings"]["total_s"] > 0
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 32
    assert [ids[0] for ids in logprobs["top_token_ids"]] == expected
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_tokens_of_the_logprobs_join_to_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    result = generate_json(
        capsys, "Welcome to", "--temperature", "0", "--max-tokens", "6", "--logprobs", "20"
    )
    (choice,) = result["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] != ""
    assert logprobs["text_offset"] == [
        len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))
    ]
    # "Ambry" with and without its space are two tokens: neither may stand in the other's place.
    assert all(len(top) == 20 for top in logprobs["top_logprobs"])


def test_logits_that_are_not_finite_end_in_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config()
    write_random_model(tmp_path, config, {})
    write_plain(tmp_path / "ckpt-0" / "tensor00001_000", np.full(config.emb_size, np.nan, "f4"))
    assert cli.main(["generate", "--model", str(tmp_path), "--tokens", "5,6,7"]) == 1
    captured = capsys.readouterr()
    assert "not finite" in captured.err
    assert captured.out.strip() == ""


def test_logits_file_holds_float32_logits_of_every_position(
    golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, out = golden_dir / "tiny", tmp_path / "logits.npz"
    with np.load(model_dir / "golden" / "forward_f32.npz") as recorded:
        tokens, expected = recorded["p3_tokens"], recorded["p3_logits"]
    arguments = ["--tokens", ",".join(map(str, tokens)), "--out", str(out)]
    assert cli.main(["logits", "--model", str(model_dir), *arguments]) == 0
    with np.load(out) as file:
        assert file["logits"].dtype == np.float32
        np.testing.assert_allclose(file["logits"], expected, rtol=0, atol=2e-3)


def test_inspect_counts_parameters_and_bytes(
    golden_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = golden_dir / "mini8"
    assert cli.main(["inspect", str(model_dir), "--workers", "3", "--json", "--verify"]) == 0
    summary = json.loads(capsys.readouterr().out)
    on_disk = sum(path.stat().st_size for path in (model_dir / "ckpt-0").iterdir())
    assert summary["num_tensors"] == 146
    assert summary["num_file_bytes"] == on_disk
    assert len(summary["workers"]) == 3
    assert cli.main(["inspect", str(model_dir / "ckpt-0"), "--tensors"]) == 0
    assert "decoder_layer_11/moe/linear/w" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--tokens", "1,x"], 2, "tokens = '1,x'"),
        (["--tokens", "1,99999"], 2, "99999"),
        (["--tokens", "1", "--temperature", "-1"], 2, "temperature = -1.0"),
        (["--tokens", "1", "--temperature", "nan"], 2, "temperature = nan"),
        (["--tokens", "1", "--top-p", "-0.5"], 2, "top_p = -0.5"),
        (["--tokens", "1", "--logit-bias", "5"], 2, "logit_bias = '5'"),
        (["--tokens", "1", "--logit-bias", "99999=1"], 2, "logit_bias = 99999"),
        (["--tokens", "1", "--max-tokens", "0"], 2, "max_tokens = 0"),
        (["--tokens", "1", "--n", "0"], 2, "num_samples = 0"),
        (["--tokens", "1", "--logprobs", "99"], 2, "num_logprobs = 99"),
        (["--tokens", ",".join(["5"] * 300)], 2, "300 tokens"),
        ([], 2, "prompt"),
        (["text", "--tokens", "1"], 2, "prompt"),
        (["some text"], 1, "no tokenizer.model"),
    ],
)
def test_bad_request_gets_one_clear_line(
    golden_dir: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    exit_code: int,
    message: str,
) -> None:
    model = ["--model", str(golden_dir / "tiny")]
    assert cli.main(["generate", *model, *arguments]) == exit_code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "/no/such/model"]) == 1
    assert "/no/such/model: no such model directory" in capsys.readouterr().err


def test_installed_command_runs_and_keeps_its_programs(golden_dir: Path, tmp_path: Path) -> None:
    """A process of its own: entry point, compile cache, exit code."""
    command = [sys.executable, "-m", "milliways", "generate", "--model", str(golden_dir / "tiny")]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for setting in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(setting)
    done = subprocess.run(
        [*command, "--tokens", "5,6,7", "--max-tokens", "2", "--temperature", "0"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
    assert any((tmp_path / "milliways" / "programs").iterdir())


@pytest.mark.parametrize(
    ("prompt", "exit_code", "out", "err"),
    [
        (b"The answer to life the universe and everything is of course", 0, " 42", ""),
        (b"broken \xff", 2, "", "\\udcff"),
    ],
)
def test_text_is_utf8_whatever_the_locale(
    prompt: bytes, exit_code: int, out: str, err: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "milliways", "generate", "-", "--temperature", "0"],
        input=prompt,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-16:strict"},
        timeout=300,
        check=False,
    )
    assert done.returncode == exit_code
    assert done.stdout.decode("utf-8").startswith(out)
    assert err in done.stderr.decode("utf-16")


def test_inspect_needs_no_jax(golden_dir: Path) -> None:
    """JAX takes seconds to import; scanning 318 GB takes less than one."""
    program = (
        "import sys; from milliways.cluster.cli import main as cli; "
        f"code = cli.main(['inspect', {str(golden_dir / 'tiny')!r}]); "
        "sys.exit(code or ('jax' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_logits_into_a_folder_that_is_not_there_are_refused_before_computing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "missing" / "logits.npz"
    # A model that does not exist either: the file is looked at first.
    arguments = ["logits", "--model", "nowhere", "--tokens", "1,2", "--out", str(out)]
    assert cli.main(arguments) == 2
    assert str(out) in capsys.readouterr().err


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_experts_left_in_their_files_give_the_same_tokens(
    activations: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["Welcome to", "--seed", "3", "--max-tokens", "24", "--activations", activations]
    loaded = generate_json(capsys, *arguments)
    mapped = generate_json(capsys, *arguments, "--experts", "mapped")
    assert mapped["choices"] == loaded["choices"]
    assert loaded["usage"]["completion_tokens"] > 10


def test_number_of_threads_is_checked_and_changes_no_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["Welcome to", "--max-tokens", "12", "--temperature", "0"]
    usual = native.num_threads()
    try:
        one, three = (generate_json(capsys, *arguments, "--threads", n) for n in ("1", "3"))
    finally:
        native.set_num_threads(usual)
    assert one["choices"] == three["choices"]
    assert cli.main(["generate", *arguments, "--threads", "0"]) == 2
    assert "between 1 and 256" in capsys.readouterr().err
