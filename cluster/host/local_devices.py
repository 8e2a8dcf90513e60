"""What JAX is told of a worker's devices before it is imported: how many there are is Ray's to say.

Ray shows a worker the GPUs it may use, but not how much of one where it gives out parts, and leaves
all of them visible to a worker that asked for none.
"""

from collections.abc import MutableMapping

# JAX takes three quarters of a GPU at once unless it is told otherwise; the rest is for what CUDA
# and its libraries keep besides, for each process.
WHOLE_GPU = 0.75


def tell_jax(gpus_each: float, environment: MutableMapping[str, str]) -> None:
    """Has JAX, once it is imported, use what a worker of `gpus_each` GPUs has; not more.

    What the operator set stays.
    """
    if gpus_each <= 0:
        # Else every worker would take most of the first GPU it sees.
        environment.setdefault("JAX_PLATFORMS", "cpu")
    elif gpus_each < 1:
        share = f"{WHOLE_GPU * gpus_each:.4f}"
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
