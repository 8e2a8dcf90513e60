"""Gives a worker's experts to the threads that compute without the interpreter."""

from collections.abc import Sequence
from typing import Any

import jax

from milliways.model.decoder import Decoder
from milliways.model.ops.native import NativeOps
from milliways.model.params import Loader, PackedMatrix
from milliways.wire.exchange import ExchangeNode, ExchangeShape, ExpertStack
from milliways.workers.devices import Device
from milliways.workers.experts import ExpertGroup
from milliways.workers.fence import WorkerFence

# A ring that one router shares with one worker; pages that were never touched cost nothing.
MAX_RING_BYTES = 256 << 20


def make_node(
    decoder: Decoder, loader: Loader, devices: Sequence[Device], max_rows: int
) -> ExchangeNode | None:
    """What exchanges rows in compiled steps of at most `max_rows`.

    None unless the kernels can compute experts without JAX: packed ones, in the memory of the host.
    """
    is_native = isinstance(decoder.ops, NativeOps) and not loader.maps_experts
    if not is_native or len(devices) != 1 or devices[0].platform != "cpu":
        return None
    return ExchangeNode(exchange_shape(decoder), max_rows, MAX_RING_BYTES)


def exchange_shape(decoder: Decoder) -> ExchangeShape:
    """The sizes of a model that both ends of an exchange must agree on."""
    config = decoder.config
    return ExchangeShape(
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        num_selected=config.num_selected_experts,
        width=config.emb_size,
        item_bytes=decoder.dtype.itemsize,
    )


def give_experts(node: ExchangeNode | None, groups: Sequence[tuple[int, ExpertGroup]]) -> None:
    """Replaces the node's experts, if there is a node; the caller keeps the arrays alive."""
    if node is not None:
        node.set_experts([_stack(layer, group) for layer, group in groups])


def give_fence(node: ExchangeNode | None, fence: WorkerFence) -> None:
    """Tells the node, if there is one, what calls must assume from now on."""
    if node is not None:
        node.set_fence(fence.placement_epoch, fence.incarnation, fence.can_compute)


def _stack(layer: int, group: ExpertGroup) -> ExpertStack:
    params = group.params
    matrices = [_packed(m) for m in (params.gate_proj, params.up_proj, params.down_proj)]
    gate, up, down = matrices
    return ExpertStack(
        layer=layer,
        expert_ids=group.expert_ids,
        kind=gate.kind,
        num_hidden=gate.num_out,
        panels=(_address(gate.panels), _address(up.panels), _address(down.panels)),
        scales=(_address(gate.scales), _address(up.scales), _address(down.scales)),
        num_groups=(gate.scales.shape[1], up.scales.shape[1], down.scales.shape[1]),
    )


def _packed(matrix: Any) -> PackedMatrix:
    assert isinstance(matrix, PackedMatrix), "not packed for the CPU kernels"
    return matrix


def _address(array: jax.Array) -> int:
    return array.unsafe_buffer_pointer()
