"""Settings of JAX for a worker's devices, which must be made before JAX is imported.

Ray shows a worker the GPUs that it may use. It does not limit how much of a shared GPU is used, and
it shows all GPUs to a worker that asked for none.
"""

from collections.abc import MutableMapping

# By default JAX reserves three quarters of a GPU. CUDA and its libraries need the rest, for each
# process.
WHOLE_GPU = 0.75


def tell_jax(gpus_each: float, environment: MutableMapping[str, str]) -> None:
    """Limits JAX, before it is imported, to what a worker with `gpus_each` GPUs may use.

    Variables that the operator set keep their values.
    """
    if gpus_each <= 0:
        # Otherwise every worker would take most of the first GPU it sees.
        environment.setdefault("JAX_PLATFORMS", "cpu")
    elif gpus_each < 1:
        share = f"{WHOLE_GPU * gpus_each:.4f}"
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
