"""The ingress does not import JAX, which would cost its replicas seconds and memory."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "milliways.cluster.ray.app",
        "milliways.cluster.ingress.openai.app",
        "milliways.cluster.ingress.routing.router_source",
        "milliways.cluster.ingress.public_grpc.server",
    ],
)
def test_ingress_does_not_import_jax(module: str) -> None:
    program = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")
