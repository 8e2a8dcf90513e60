"""Which kernels compute here, and the loader that feeds them."""

import logging
from functools import cache

import jax

from model.activations import Activations
from model.errors import KernelsMissingError
from model.ops.interface import Ops
from model.ops.native import NativeLoader, NativeOps
from model.ops.pure import PureOps
from model.params import DeviceLoader, Loader

logger = logging.getLogger(__name__)


def select_ops(activations: Activations) -> tuple[Ops, Loader]:
    """The best kernels for the default device: compiled ones on a CPU, else plain JAX.

    Where the compiled ones are missing, plain JAX gives the same tokens, and a warning says once
    that it is slower.
    """
    if jax.default_backend() == "cpu":
        try:
            return NativeOps(), NativeLoader(activations)
        except KernelsMissingError as error:
            _warn_once(str(error))
    return PureOps(activations), DeviceLoader(activations=activations)


@cache
def _warn_once(reason: str) -> None:
    logger.warning("%s; computing in plain JAX: the same tokens, many times slower", reason)
