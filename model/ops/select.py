"""Which kernels compute here, and the loader that feeds them."""

import logging
from dataclasses import dataclass
from enum import Enum
from functools import cache

import jax

from model.activations import Activations
from model.errors import KernelsMissingError
from model.ops.interface import Ops
from model.ops.native import MappedLoader, NativeLoader, NativeOps
from model.ops.pure import PureOps
from model.params import DeviceLoader, Loader

logger = logging.getLogger(__name__)


class Residence(Enum):
    """Where experts stay: copied into memory, or in their mapped files."""

    LOADED = "loaded"
    MAPPED = "mapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What is asked of the kernels.

    `deterministic` matters on a GPU, where a row's bits in any batch have a price; a CPU keeps them
    always.
    """

    activations: Activations = Activations.EXACT
    residence: Residence = Residence.LOADED
    deterministic: bool = False


def select_ops(wanted: Kernels) -> tuple[Ops, Loader]:
    """The kernels of the default device: compiled ones on a CPU, Pallas' on a GPU.

    Where the compiled ones are missing, plain JAX gives the same tokens, and a warning says once
    that it is slower.

    Raises:
        KernelsMissingError: no kernels here can do what is wanted.
    """
    if jax.default_backend() == "cpu":
        return _cpu_ops(wanted)
    if wanted != Kernels(deterministic=wanted.deterministic):
        raise KernelsMissingError("int8 activations and mapped experts are computed on a CPU only")
    if jax.default_backend() == "gpu":
        # Pallas takes a second to import, and a CPU needs none of it.
        from model.ops.gpu import GpuOps

        return GpuOps(deterministic=wanted.deterministic), DeviceLoader()
    return PureOps(), DeviceLoader()


def _cpu_ops(wanted: Kernels) -> tuple[Ops, Loader]:
    try:
        loader = MappedLoader if wanted.residence is Residence.MAPPED else NativeLoader
        return NativeOps(), loader(wanted.activations)
    except KernelsMissingError as error:
        if wanted.residence is Residence.MAPPED:
            raise
        _warn_once(str(error))
    return PureOps(wanted.activations), DeviceLoader(activations=wanted.activations)


@cache
def _warn_once(reason: str) -> None:
    logger.warning("%s; computing in plain JAX: the same tokens, many times slower", reason)
