"""A worker that cannot read a file gets the same bytes from a worker that holds them."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import grpc
import numpy as np
import pytest

from milliways.cluster.host.peer_parts import PeerParts
from milliways.model.activations import Activations
from milliways.model.checkpoint import CheckedTensors, Checkpoint, TensorRole, TensorSpec
from milliways.model.checkpoint.checked_tensors import digest_of, part_name
from milliways.model.demo import DEMO_DIR
from milliways.model.errors import CheckpointError
from milliways.model.ops.native import NativeLoader
from milliways.model.params import (
    DeviceLoader,
    Loader,
    load_attention,
    load_ends,
    load_experts,
)
from milliways.model.released import released_arrays
from milliways.wire.errors import UnavailableError
from milliways.wire.placement import ExpertId
from milliways.wire.tls import TlsSettings
from milliways.wire.view import Member, WorkerState
from milliways.workers.servers import parts
from milliways.workers.servers.parts import PartServer, ReadHeld, fetch_part

LAYER, EXPERT = 1, 5
LOADERS: dict[str, Callable[[], Loader]] = {
    "plain": DeviceLoader,
    "exact panels": NativeLoader,
    "panels of pairs": lambda: NativeLoader(Activations.INT8),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_loaded_parameters_give_the_arrays_of_the_file_back(loader: str) -> None:
    load = LOADERS[loader]()
    with Checkpoint.open(DEMO_DIR) as checkpoint:
        tensors = CheckedTensors(checkpoint)
        experts = load_experts(tensors, LAYER, load, [2, EXPERT])
        attention = load_attention(tensors, LAYER, load)
        ends = load_ends(tensors, load)
        num_checked = 0
        for spec in checkpoint.specs:
            if spec.role.is_expert and spec.layer == LAYER:
                for place, expert_id in enumerate((2, EXPERT)):
                    arrays = released_arrays(experts, spec.role, place)
                    part = part_name(spec, expert_id)
                    assert digest_of(arrays) == tensors.found.digests[part], part
                    num_checked += 1
            elif spec.layer in (LAYER, None) and not spec.role.is_expert:
                arrays = released_arrays(attention if spec.layer else ends, spec.role)
                assert digest_of(arrays) == tensors.found.digests[spec.name], spec.name
                num_checked += 1
        assert num_checked == len(tensors.found)


@contextmanager
def served(read: ReadHeld) -> Generator[str]:
    """A gRPC server with the parts of one worker, in a thread; yields its address."""
    ready, stop = threading.Event(), asyncio.Event()
    found: list[str] = []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = grpc.aio.server()
        handlers = {"ReadPart": PartServer(read).handler()}
        handler = grpc.method_handlers_generic_handler("milliways.v1.WorkerService", handlers)
        server.add_generic_rpc_handlers((handler,))
        found.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(20.0)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def member(address: str, worker_id: str = "worker-1") -> Member:
    return Member(
        worker_id=worker_id,
        incarnation=1,
        address=address,
        state=WorkerState.READY,
        num_layers=4,
        experts=frozenset({ExpertId(LAYER, EXPERT)}),
    )


def file_of(tensor: str, expert_id: int | None) -> list[np.ndarray]:
    """The arrays of the demo model's file."""
    with Checkpoint.open(DEMO_DIR) as checkpoint:
        spec = next(spec for spec in checkpoint.specs if spec.name == tensor)
        tensors = CheckedTensors(checkpoint)
        if expert_id is not None:
            assert spec.layer is not None
            return list(tensors.expert(spec.layer, spec.role, expert_id))
        return list(tensors.quantized(spec)) if spec.quantized else [tensors.plain(spec)]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of the demo model without the files of one layer."""
    model_dir = Path(shutil.copytree(DEMO_DIR, tmp_path / "model"))
    with Checkpoint.open(model_dir) as checkpoint:
        for spec in checkpoint.specs:
            if spec.layer == LAYER:
                checkpoint.record(spec).path.unlink()
    return model_dir


def loaded(tensors: CheckedTensors) -> None:
    tensors.expert(LAYER, TensorRole.EXPERT_LINEAR, EXPERT)
    tensors.plain(tensors.find(TensorRole.GATE, LAYER))
    tensors.quantized(tensors.find(TensorRole.KEY, LAYER))


def test_missing_files_are_replaced_by_a_peer(damaged: Path) -> None:
    whole = CheckedTensors(Checkpoint.open_lazily(DEMO_DIR))
    loaded(whole)
    tensors = CheckedTensors(Checkpoint.open_lazily(damaged), whole.found)
    with pytest.raises(CheckpointError):
        loaded(tensors)
    with served(file_of) as address:
        peers = PeerParts([member(address)], TlsSettings(), Random(1))
        tensors.elsewhere = peers.fetch
        loaded(tensors)
    assert tensors.found == whole.found
    assert len(tensors.faults) == 3 and all(str(damaged) in fault for fault in tensors.faults)


def test_a_peer_with_other_bytes_or_without_them_is_not_believed(damaged: Path) -> None:
    whole = CheckedTensors(Checkpoint.open_lazily(DEMO_DIR))
    loaded(whole)

    def lie(tensor: str, expert_id: int | None) -> list[np.ndarray]:
        arrays = file_of(tensor, expert_id)
        arrays[0] = arrays[0].copy()
        arrays[0].reshape(-1)[3] += 1
        return arrays

    for read in (lie, lambda tensor, expert_id: []):
        tensors = CheckedTensors(Checkpoint.open_lazily(damaged), whole.found)
        with served(read) as address:
            peers = PeerParts([member(address)], TlsSettings(), Random(1))
            tensors.elsewhere = peers.fetch
            with pytest.raises(CheckpointError):
                loaded(tensors)
        assert not tensors.found.digests


def test_only_those_that_hold_a_part_are_asked_and_the_next_one_if_one_is_gone() -> None:
    asked: list[str] = []

    def read(tensor: str, expert_id: int | None) -> list[np.ndarray]:
        asked.append(tensor)
        return file_of(tensor, expert_id)

    with Checkpoint.open(DEMO_DIR) as checkpoint, served(read) as address:
        spec: TensorSpec = checkpoint.find(TensorRole.EXPERT_LINEAR, LAYER)
        peers = [member("127.0.0.1:1", "worker-0"), member(address, "worker-2")]
        for seed in range(4):
            assert PeerParts(peers, TlsSettings(), Random(seed)).fetch(spec, EXPERT)
        assert not PeerParts(peers, TlsSettings(), Random(0)).fetch(spec, EXPERT + 1)
        ends = checkpoint.find(TensorRole.EMBEDDING)
        assert not PeerParts(peers, TlsSettings(), Random(0)).fetch(ends, None)
    assert asked == [spec.name] * 4


def test_large_parts_come_in_pieces_and_broken_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "PIECE_BYTES", 1000)
    with served(file_of) as address:
        arrays = fetch_part(address, TlsSettings(), "language_model/rms_norm/scale", None, 60.0)
        (embedding,) = fetch_part(
            address, TlsSettings(), "language_model/in_out_embed/embeddings", None, 60.0
        )
    np.testing.assert_array_equal(
        embedding, file_of("language_model/in_out_embed/embeddings", None)[0]
    )
    assert arrays[0].dtype == np.float32

    def odd(tensor: str, expert_id: int | None) -> list[np.ndarray]:
        return [np.zeros(3, np.complex64)]

    with served(odd) as address, pytest.raises(UnavailableError, match="complex64"):
        fetch_part(address, TlsSettings(), "a", None, 60.0)
