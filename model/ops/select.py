"""Which kernels compute here, and the loader that feeds them."""

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
    """Where experts stay: copied into memory, or in their mapped files."""

    LOADED = "loaded"
    MAPPED = "mapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """What is asked of the kernels.

    `deterministic` matters on a GPU, where a row's bits in any batch have a price; a CPU keeps them
    always. `num_threads` is for the compiled kernels; None leaves it to them.
    """

    activations: Activations = Activations.EXACT
    residence: Residence = Residence.LOADED
    deterministic: bool = False
    num_threads: int | None = None


def select_ops(wanted: KernelChoice) -> tuple[Ops, Loader]:
    """The kernels of the default device: compiled ones on a CPU, Pallas' on a GPU.

    Where the compiled ones are missing, plain JAX gives the same tokens, and a warning says once
    that it is slower.

    Raises:
        KernelsMissingError: no kernels here can do what is wanted.
    """
    if jax.default_backend() == "cpu":
        return _cpu_ops(wanted)
    needs_cpu = (Activations.INT8, Residence.MAPPED)
    if wanted.activations in needs_cpu or wanted.residence in needs_cpu:
        raise KernelsMissingError("int8 activations and mapped experts are computed on a CPU only")
    if jax.default_backend() == "gpu":
        # Pallas takes a second to import, and a CPU needs none of it.
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
    logger.warning("%s; computing in plain JAX: the same tokens, many times slower", reason)
