"""Chooses the kernels of this machine, and the loader that goes with them."""

import logging
from dataclasses import dataclass
from enum import Enum
from functools import cache

import jax

from milliways.model.activations import Activations
from milliways.model.errors import KernelsMissingError
from milliways.model.ops import native
from milliways.model.ops.interface import Ops
from milliways.model.ops.native import MappedLoader, NativeLoader, NativeOps
from milliways.model.ops.pure import PureOps
from milliways.model.params import DeviceLoader, Loader

logger = logging.getLogger(__name__)


class Residence(Enum):
    """Where experts are: copied into memory, or in their mapped files."""

    LOADED = "loaded"
    MAPPED = "mapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """What the kernels must be able to do.

    `deterministic` matters on a GPU, where equal bits in any batch make kernels slower. On a CPU
    bits are always equal. `num_threads` is the number of threads of the compiled kernels; None
    leaves the choice to them.
    """

    activations: Activations = Activations.EXACT
    residence: Residence = Residence.LOADED
    deterministic: bool = False
    num_threads: int | None = None


def select_ops(wanted: KernelChoice) -> tuple[Ops, Loader]:
    """The kernels of the default device: compiled ones on a CPU, Pallas kernels on a GPU.

    If the compiled kernels are missing, plain JAX computes the same tokens. A warning then says
    once that it is slower.

    Raises:
        KernelsMissingError: no kernels on this machine can do what is wanted.
    """
    if jax.default_backend() == "cpu":
        return _cpu_ops(wanted)
    needs_cpu = (Activations.INT8, Residence.MAPPED)
    if wanted.activations in needs_cpu or wanted.residence in needs_cpu:
        raise KernelsMissingError(
            "int8 activations and mapped experts need a CPU, but JAX computes on"
            f" {jax.default_backend()}"
        )
    if jax.default_backend() == "gpu":
        # Importing Pallas takes a second, and a CPU does not need it.
        from milliways.model.ops.gpu import GpuOps

        return GpuOps(deterministic=wanted.deterministic), DeviceLoader()
    return PureOps(), DeviceLoader()


def _cpu_ops(wanted: KernelChoice) -> tuple[Ops, Loader]:
    try:
        make = MappedLoader if wanted.residence is Residence.MAPPED else NativeLoader
        loader = make(wanted.activations)
        if wanted.num_threads is not None:
            native.set_num_threads(wanted.num_threads)
        return NativeOps(), loader
    except KernelsMissingError as error:
        if wanted.residence is Residence.MAPPED:
            raise
        _warn_once(str(error))
    return PureOps(wanted.activations), DeviceLoader(activations=wanted.activations)


@cache
def _warn_once(reason: str) -> None:
    logger.warning(
        "%s; using plain JAX, which computes the same tokens, but is much slower", reason
    )
