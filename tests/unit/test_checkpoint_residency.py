"""Which pages of a file were read, according to the kernel."""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from milliways.model.checkpoint import Checkpoint, TensorRole, write_checkpoint
from milliways.model.checkpoint.layout import TensorSpec
from milliways.model.checkpoint.records import BFLOAT16
from milliways.model.config import ModelConfig, config_from_dict

PAGE = mmap.PAGESIZE
# One expert matrix has half a MiB: many pages, most of them not shared with another matrix.
CONFIG = {
    "emb_size": 512,
    "key_size": 8,
    "num_q_heads": 2,
    "num_kv_heads": 2,
    "num_layers": 1,
    "vocab_size": 16,
    "ffn_size": 1024,
    "num_experts": 8,
    "num_selected_experts": 2,
    "sequence_len": 16,
    "embedding_multiplier_scale": 1.0,
    "output_multiplier_scale": 1.0,
    "attn_output_multiplier": 1.0,
}


def ones(spec: TensorSpec) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    if not spec.quantized:
        return np.ones(spec.shape, np.float32)
    scales = np.ones((*spec.shape[:-2], 1, spec.shape[-1]), BFLOAT16)
    return np.ones(spec.shape, np.int8), scales


def forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident_pages(path: Path) -> set[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        num_pages = -(-len(mapped) // PAGE)
        pages = (ctypes.c_ubyte * num_pages)()
        anchor = ctypes.c_ubyte.from_buffer(mapped)
        address, length = ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(mapped))
        failed = libc.mincore(address, length, pages)
        del anchor
    if failed:
        pytest.skip("this kernel has no mincore")
    return {index for index, state in enumerate(pages) if state & 1}


def pages_of(offset: int, num_bytes: int) -> set[int]:
    return set(range(offset // PAGE, (offset + num_bytes - 1) // PAGE + 1))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the kernel cannot be asked to forget a file")
    config: ModelConfig = config_from_dict(CONFIG)
    write_checkpoint(tmp_path / "ckpt-0", config, ones)
    (tmp_path / "config.json").write_text(str(CONFIG).replace("'", '"'), encoding="utf-8")
    for path in (tmp_path / "ckpt-0").iterdir():
        forget(path)
        if resident_pages(path):
            pytest.skip("this file system keeps files in memory")
    return tmp_path


def test_opening_reads_only_the_pages_around_the_payloads(model_dir: Path) -> None:
    with Checkpoint.open(model_dir) as checkpoint:
        for record in checkpoint.records:
            assert len(resident_pages(record.path)) <= 3


def test_touching_one_expert_reads_its_pages_and_no_others(model_dir: Path) -> None:
    with Checkpoint.open(model_dir) as checkpoint:
        record = checkpoint.records[checkpoint.find(TensorRole.EXPERT_LINEAR_V, 0).index]
        before = resident_pages(record.path)
        weight, scales = checkpoint.expert(0, TensorRole.EXPERT_LINEAR_V, 5)
        assert int(weight.sum(dtype=np.int64)) == weight.size
        assert float(scales.astype(np.float32).sum()) == scales.size
        weight_pages = pages_of(record.weight.offset + 5 * weight.nbytes, weight.nbytes)
        scales_pages = pages_of(record.scales.offset + 5 * scales.nbytes, scales.nbytes)
        assert len(weight_pages) > 100
        assert resident_pages(record.path) - before <= weight_pages | scales_pages
        assert weight_pages | scales_pages <= resident_pages(record.path)
        others = {r.path for r in checkpoint.records} - {record.path}
        assert max(len(resident_pages(path)) for path in others) <= 3
