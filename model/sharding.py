"""Several devices inside one process: which logical axis of the model lies on which mesh axis.

Changing the strategy means changing one table, `ShardingRules`. The sums that a split makes
partial are added in `Decoder` (`MeshAxes`); here arrays are only laid out. Embedding and norms are
small and stay on every device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from milliways.model.config import ModelConfig
from milliways.model.decoder import Decoder, MeshAxes
from milliways.model.errors import MeshError
from milliways.model.kv_cache import KVCache, LayerCache
from milliways.model.params import (
    AttentionParams,
    EndParams,
    ExpertParams,
    ModelParams,
    QuantizedMatrix,
)

Axes = tuple[str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingRules:
    """Logical axis -> mesh axis; None keeps it whole on every device.

    Heads: each device attends with its heads and their KV blocks. ffn: each device computes a slice
    of every expert's hidden width. Experts: each device holds some experts whole.
    """

    heads: str | None = "tensor"
    ffn: str | None = "tensor"
    experts: str | None = "expert"

    def __post_init__(self) -> None:
        # Both cut the same arrays, and an array cannot be cut twice over one mesh axis.
        if self.ffn is not None and self.ffn == self.experts:
            raise MeshError(f"ffn and experts cannot both lie on mesh axis {self.ffn!r}")

    def mesh_axis(self, logical_axis: str | None) -> str | None:
        """The mesh axis of a logical one; axes without a rule stay whole."""
        return getattr(self, logical_axis, None) if logical_axis else None

    def spec(self, axes: Axes) -> PartitionSpec:
        """How an array with these logical axes lies on the mesh."""
        return PartitionSpec(*(self.mesh_axis(axis) for axis in axes))


def make_mesh(num_tensor: int, num_expert: int) -> Mesh:
    """A mesh over the first num_tensor * num_expert local devices.

    Raises:
        MeshError: there are fewer devices.
    """
    num_devices = num_tensor * num_expert
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise MeshError(
            f"a mesh of {num_tensor} x {num_expert} needs {num_devices} devices, "
            f"{len(devices)} are here"
        )
    grid = np.asarray(devices[:num_devices]).reshape(num_tensor, num_expert)
    return Mesh(grid, ("tensor", "expert"))


def param_axes(config: ModelConfig) -> ModelParams:
    """The logical axes of every parameter, in the tree the parameters have.

    Scale rows carry the name of the input rows they scale, and are cut with them.
    """

    def matrix(*axes: str | None) -> QuantizedMatrix:
        return _tree(QuantizedMatrix, weight=axes, scales=axes)

    attention = _tree(
        AttentionParams,
        attention_norm_D=("embed",),
        attention_post_norm_D=("embed",),
        expert_norm_D=("embed",),
        expert_post_norm_D=("embed",),
        query=matrix("embed", "heads"),
        key=matrix("embed", "heads"),
        value=matrix("embed", "heads"),
        out=matrix("heads", "embed"),
        gate_DE=("embed", None),
    )
    experts = _tree(
        ExpertParams,
        gate_proj=matrix("experts", "embed", "ffn"),
        up_proj=matrix("experts", "embed", "ffn"),
        down_proj=matrix("experts", "ffn", "embed"),
    )
    ends = _tree(
        EndParams,
        embedding_VD=("vocab", "embed"),
        head=matrix("embed", "vocab"),
        final_norm_D=("embed",),
    )
    return ModelParams(
        ends=ends,
        attention_L=(attention,) * config.num_layers,
        experts_L=(experts,) * config.num_layers,
    )


def cache_axes(config: ModelConfig) -> KVCache:
    """The logical axes of the KV cache."""
    blocks: Axes = (None, None, "heads", None)
    layer = _tree(LayerCache, keys_NPRK=blocks, values_NPRK=blocks)
    return _tree(KVCache, layers_L=(layer,) * config.num_layers, visible_NP=(None, None))


def shard_model(
    decoder: Decoder, params: ModelParams, cache: KVCache, mesh: Mesh, rules: ShardingRules
) -> tuple[ModelParams, KVCache, Callable[..., Any]]:
    """Lays parameters and cache on the mesh and compiles the step for it.

    Raises:
        MeshError: an axis of the model does not divide over its mesh axis.
    """
    config = decoder.config
    check_mesh(config, mesh, rules)
    param_specs = _specs(rules, param_axes(config))
    cache_specs = _specs(rules, cache_axes(config))
    params = _place(mesh, _repeat_scale_rows(params, param_specs, mesh), param_specs)
    cache = _place(mesh, cache, cache_specs)
    local = Decoder(
        config=config,
        dtype=decoder.dtype,
        ops=decoder.ops,
        axes=MeshAxes(heads=rules.heads, ffn=rules.ffn, experts=rules.experts),
    )
    step = jax.shard_map(
        local.step,
        mesh=mesh,
        in_specs=(param_specs, PartitionSpec(), cache_specs),
        out_specs=(PartitionSpec(), cache_specs),
        # The replication checker knows no rule for loops with a traced trip count.
        check_vma=False,
    )
    return params, cache, jax.jit(step, donate_argnums=(2,))


def check_mesh(config: ModelConfig, mesh: Mesh, rules: ShardingRules) -> None:
    """Every cut axis must divide evenly, query and key/value heads alike.

    Raises:
        MeshError: names the axis, its size, and the number of devices.
    """
    sizes = {
        "num_q_heads": (config.num_q_heads, rules.heads),
        "num_kv_heads": (config.num_kv_heads, rules.heads),
        "ffn_size": (config.ffn_size, rules.ffn),
        "num_experts": (config.num_experts, rules.experts),
    }
    for rule in fields(rules):
        axis = getattr(rules, rule.name)
        if axis is not None and axis not in mesh.shape:
            raise MeshError(f"{rule.name} lies on {axis!r}, but the mesh has {tuple(mesh.shape)}")
    for name, (size, axis) in sizes.items():
        if axis is not None and size % mesh.shape[axis]:
            raise MeshError(
                f"{name} = {size} does not divide over {mesh.shape[axis]} devices of {axis!r}"
            )


def _tree(kind: type, **axes: Any) -> Any:
    """A parameter tree of axis names; typed as Any because its leaves are not arrays."""
    return kind(**axes)


def _specs(rules: ShardingRules, axes_tree: Any) -> Any:
    return jax.tree.map(rules.spec, axes_tree, is_leaf=_is_axes)


def _is_axes(node: object) -> bool:
    # Named tuples of axis names are leaves; tuples of layers are not.
    return isinstance(node, tuple) and all(a is None or isinstance(a, str) for a in node)


def _place(mesh: Mesh, tree: Any, specs: Any) -> Any:
    def put(leaf: Any, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree, specs)


def _repeat_scale_rows(params: Any, specs: Any, mesh: Mesh) -> Any:
    """Where input rows are cut, gives every device whole scale rows: G becomes lcm(G, devices)."""

    def repeat(matrix: Any, spec: Any) -> Any:
        if not isinstance(matrix, QuantizedMatrix):
            return matrix
        axis = spec.scales[-2]
        num_rows = matrix.num_scale_rows
        num_devices = mesh.shape[axis] if axis else 1
        times = math.lcm(num_rows, num_devices) // num_rows
        scales = jnp.repeat(jnp.asarray(matrix.scales), times, axis=-2)
        return QuantizedMatrix(weight=matrix.weight, scales=scales)

    return jax.tree.map(repeat, params, specs, is_leaf=_is_matrix)


def _is_matrix(node: object) -> bool:
    return isinstance(node, QuantizedMatrix)
