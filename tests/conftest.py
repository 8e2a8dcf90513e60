"""Settings for all tests. JAX reads its settings on import, so they are set first."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

import tests.shape_checks as shape_checks

if TYPE_CHECKING:
    from tests.served_cluster import ServedCluster

REPOSITORY = Path(__file__).resolve().parents[1]
UNIT_TESTS = REPOSITORY / "tests" / "unit"

JAX_SETTINGS = {
    # Tests of a GPU's kernels and of equal bits run on one too: MILLIWAYS_TEST_PLATFORMS=cuda,cpu
    "JAX_PLATFORMS": os.environ.get("MILLIWAYS_TEST_PLATFORMS", "cpu"),
    # Eight virtual devices, so that workers with several devices can be tested.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    # Accidental promotion or broadcasting would change bits or shapes without an error.
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Compiling is most of a test's time, and most programs did not change since the last run.
    "JAX_COMPILATION_CACHE_DIR": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax")
    ),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
os.environ.update(JAX_SETTINGS)
install_import_hook(
    "milliways.model", f"{shape_checks.__name__}.{shape_checks.check_shapes.__name__}"
)

# A shell ignores SIGINT in background jobs; processes of a test would then ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class NetworkForbidden(Exception):
    """A unit test opened a network socket."""


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Small checkpoints in the released format, with the reference's recorded results."""
    return REPOSITORY / "tests" / "golden"


@pytest.fixture(scope="session")
def cluster() -> "Iterator[ServedCluster]":
    """One real cluster for all tests; each test leaves it as it found it."""
    # Imported here, because that module imports this one.
    from tests.served_cluster import one_cluster

    with one_cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def no_network_in_unit_tests(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Allows unit tests only Unix sockets, which an event loop needs to wake itself."""
    if request.path.is_relative_to(UNIT_TESTS):
        monkeypatch.setattr(socket.socket, "__init__", _init_unix_socket)
    yield


_init_socket = socket.socket.__init__


def _init_unix_socket(
    self: socket.socket,
    family: int = -1,
    type: int = -1,
    proto: int = -1,
    fileno: int | None = None,
) -> None:
    _init_socket(self, family, type, proto, fileno)
    if self.family != socket.AF_UNIX:
        self.close()
        raise NetworkForbidden(f"{self.family.name} socket in a unit test")
