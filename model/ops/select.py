"""Which kernels compute here, and the loader that feeds them."""

import logging
from enum import Enum
from functools import cache

import jax

from model.activations import Activations
from model.errors import KernelsMissingError
from model.ops.interface import Ops
from model.ops.native import MappedLoader, NativeLoader, NativeOps
from model.ops.pure import PureOps
from model.params import DeviceLoader, Loader


class Residence(Enum):
    """Where experts stay: copied into memory, or in their mapped files."""

    LOADED = "loaded"
    MAPPED = "mapped"


logger = logging.getLogger(__name__)


def select_ops(
    activations: Activations, residence: Residence = Residence.LOADED
) -> tuple[Ops, Loader]:
    """The best kernels for the default device: compiled ones on a CPU, else plain JAX.

    Where the compiled ones are missing, plain JAX gives the same tokens, and a warning says once
    that it is slower.

    Raises:
        KernelsMissingError: mapped experts, which only the compiled kernels can read.
    """
    is_mapped = residence is Residence.MAPPED
    if jax.default_backend() == "cpu":
        try:
            loader = MappedLoader if is_mapped else NativeLoader
            return NativeOps(), loader(activations)
        except KernelsMissingError as error:
            if is_mapped:
                raise
            _warn_once(str(error))
    elif is_mapped:
        raise KernelsMissingError("mapped experts are computed on a CPU")
    return PureOps(activations), DeviceLoader(activations=activations)


@cache
def _warn_once(reason: str) -> None:
    logger.warning("%s; computing in plain JAX: the same tokens, many times slower", reason)
