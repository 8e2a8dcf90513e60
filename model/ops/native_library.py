"""The compiled library of the CPU kernels: loads it, registers it with JAX, and sets it."""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from milliways.model.errors import KernelsMissingError

_TARGETS = (
    "linear",
    "expert_ffn",
    "expert_ffn_mapped",
    "attention",
    "rms_norm",
    "gate",
    "rope",
    "weigh",
    "attention_half",
    "combine",
    "layers",
    "write_rows",
    "gumbel",
    "summarize_rows",
    "exchange",
)


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; loads and registers them with JAX on first use.

    Raises:
        KernelsMissingError: they were not compiled, or cannot be loaded on this machine.
    """
    folder = Path(__file__).parent
    paths = [folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise KernelsMissingError(
            "the CPU kernels were not compiled (was there a C++ compiler at installation?)"
        )
    try:
        loaded = ctypes.CDLL(str(path))
        _declare(loaded)
        handlers = {name: getattr(loaded, f"mw_{name}") for name in _TARGETS}
    except OSError as error:
        raise KernelsMissingError(f"the CPU kernels cannot be loaded: {error}") from error
    except AttributeError as error:
        raise KernelsMissingError(
            f"the CPU kernels were compiled from another version of the sources: {error}"
        ) from error
    for name, handler in handlers.items():
        capsule = jax.ffi.pycapsule(handler)
        jax.ffi.register_ffi_target(f"milliways_{name}", capsule, platform="cpu")
    return loaded


def set_num_threads(num_threads: int) -> None:
    """Sets the number of threads that compute; the default is one for each usable processor."""
    library().mw_set_num_threads(num_threads)


def num_threads() -> int:
    """The number of threads that compute."""
    return library().mw_num_threads()


def sources() -> str:
    """A digest of the sources from which the kernels were compiled."""
    return library().mw_sources().decode()


def kernel_set() -> str:
    """The kernels that run: `avx2` or `portable`."""
    return library().mw_kernels().decode()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds float32 values as the exchange does with outputs of experts, for tests."""
    values = np.ascontiguousarray(values, np.float32)
    rounded = np.empty(values.shape, jnp.bfloat16)
    library().mw_to_bfloat16(values.ctypes.data, values.size, rounded.ctypes.data)
    return rounded


def use_kernel_set(name: str) -> bool:
    """Chooses the kernels, for tests and measurements; False if this processor cannot run them."""
    return bool(library().mw_use_kernels(name.encode()))


def _declare(loaded: ctypes.CDLL) -> None:
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.mw_panel_bytes.restype = int64
    loaded.mw_panel_bytes.argtypes = (int64, int64, int64)
    loaded.mw_pack.restype = None
    loaded.mw_pack.argtypes = (pointer, int64, int64, int64, int64, pointer)
    loaded.mw_map.restype = ctypes.c_int32
    loaded.mw_map.argtypes = (pointer, int64)
    loaded.mw_unmap.restype = None
    loaded.mw_unmap.argtypes = (ctypes.c_int32,)
    loaded.mw_set_num_threads.restype = None
    loaded.mw_set_num_threads.argtypes = (ctypes.c_int,)
    loaded.mw_kernels.restype = ctypes.c_char_p
    loaded.mw_sources.restype = ctypes.c_char_p
    loaded.mw_to_bfloat16.restype = None
    loaded.mw_to_bfloat16.argtypes = (pointer, int64, pointer)
    loaded.mw_use_kernels.restype = ctypes.c_int
    loaded.mw_use_kernels.argtypes = (ctypes.c_char_p,)
