"""The weights of the bench model, and its copy in llama.cpp's format."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest

from milliways.benchmarks.speed.bench_model import BENCH_CONFIG, random_tensor, write_random_model
from milliways.benchmarks.speed.gguf_file import (
    GgufTensor,
    GgufType,
    encode,
    quantise_q8,
    write_gguf,
)
from milliways.benchmarks.speed.gguf_model import (
    NotConvertibleError,
    check_convertible,
    ensure_gguf,
    metadata_of,
)
from milliways.model.checkpoint import Checkpoint, TensorRole, tensor_specs
from milliways.model.quantise import dequantise

SMALL = dataclasses.replace(
    BENCH_CONFIG, emb_size=64, key_size=16, num_q_heads=4, num_layers=2, vocab_size=96, ffn_size=128
)


def test_random_model_is_a_valid_checkpoint_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random_model(tmp_path / name, SMALL, seed=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with Checkpoint.open(tmp_path / "a") as checkpoint:
        assert checkpoint.config == SMALL
        checkpoint.verify()
        for spec in checkpoint.specs:
            a, b = (tmp_path / name / "ckpt-0" / spec.file_name for name in ("a", "b"))
            assert a.read_bytes() == b.read_bytes()


def test_random_matrices_keep_the_variance_of_their_inputs() -> None:
    spec = next(s for s in tensor_specs(SMALL) if s.role is TensorRole.EXPERT_LINEAR_1)
    weight, scales = random_tensor(spec, SMALL, 7)
    assert isinstance(weight, np.ndarray) and scales.shape[-2] == 8
    assert weight.min() == -127
    matrix = dequantise(weight[0], scales[0])
    assert np.square(matrix).sum(axis=0).mean() == pytest.approx(1, rel=0.1)


def test_gguf_holds_what_its_header_says(tmp_path: Path) -> None:
    """The test parses the file byte by byte, according to the specification of the format."""
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = GgufTensor("t", (2, 3), GgufType.F32, (rows[:1], rows[1:]))
    path = tmp_path / "x.gguf"
    write_gguf(path, {"k": 5, "f": 0.5, "s": "v"}, [tensor, tensor])
    raw = path.read_bytes()
    assert struct.unpack_from("<4sIQQ", raw) == (b"GGUF", 3, 2, 3)
    assert b"k" + struct.pack("<II", 4, 5) in raw
    assert b"f" + struct.pack("<If", 6, 0.5) in raw
    assert b"s" + struct.pack("<IQ", 8, 1) + b"v" in raw
    info = b"t" + struct.pack("<IQQI", 2, 3, 2, GgufType.F32)
    first = raw.index(info) + len(info)
    second = raw.index(info, first) + len(info)
    assert struct.unpack_from("<Q", raw, first) == (0,)
    assert struct.unpack_from("<Q", raw, second) == (32,)
    data = len(raw) - 64
    assert data % 32 == 0
    assert raw[data : data + 24] == raw[data + 32 : data + 56] == rows.tobytes()


def test_q8_blocks_are_within_half_a_step() -> None:
    rows = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    blocks = quantise_q8(rows)
    restored = blocks["steps"] * blocks["scale"].astype(np.float32)[:, None]
    step = np.abs(rows.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored - rows.reshape(-1, 32)) < 0.57 * step).all()
    assert blocks.tobytes() == encode(rows, GgufType.Q8_0).tobytes()
    assert len(blocks.tobytes()) == GgufType.Q8_0.num_bytes(rows.size)


def test_q8_block_of_zeros_is_zero() -> None:
    blocks = quantise_q8(np.zeros((1, 32), np.float32))
    assert not blocks["steps"].any() and not blocks["scale"].any()


def test_gguf_of_a_checkpoint_is_written_once_and_is_of_the_right_size(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", SMALL, seed=7)
    path = ensure_gguf(tmp_path / "model", GgufType.F16, tmp_path / "gguf")
    written_ns = path.stat().st_mtime_ns
    assert ensure_gguf(tmp_path / "model", GgufType.F16, tmp_path / "gguf") == path
    assert path.stat().st_mtime_ns == written_ns
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    num_parameters = sum(int(np.prod(spec.shape)) for spec in tensor_specs(SMALL))
    assert 2 * num_parameters < path.stat().st_size < 2.2 * num_parameters + 10_000


def test_gguf_matrices_are_transposed_and_dequantised(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", SMALL, seed=7)
    path = ensure_gguf(tmp_path / "model", GgufType.F32, tmp_path / "gguf")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        key = dequantise(*checkpoint.quantized(checkpoint.find(TensorRole.KEY, 1)))
        gate = checkpoint.plain(checkpoint.find(TensorRole.GATE, 0))
    raw = path.read_bytes()
    assert np.ascontiguousarray(key.T).tobytes() in raw
    assert np.ascontiguousarray(gate.T).tobytes() in raw


def test_metadata_names_the_sizes() -> None:
    metadata = metadata_of(BENCH_CONFIG, GgufType.Q8_0)
    assert metadata["general.architecture"] == "grok"
    assert metadata["grok.expert_used_count"] == 2
    assert metadata["grok.attention.output_scale"] == BENCH_CONFIG.attn_output_multiplier


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_q_heads": 8}, "query heads"), ({"ffn_size": 688}, "ffn_size")],
)
def test_shape_that_llama_cpp_cannot_represent_is_named(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(NotConvertibleError, match=message):
        check_convertible(dataclasses.replace(SMALL, **changes), GgufType.Q8_0)
