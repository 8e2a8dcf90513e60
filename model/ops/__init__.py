"""The kernels of a layer, behind one interface. `decoder` composes them.

    import jax.numpy as jnp
    from milliways.model.ops.select import KernelChoice, select_ops

    ops, loader = select_ops(KernelChoice())
    print(ops.rms_norm(jnp.ones((2, 8)), jnp.ones(8)))

It owns `Ops`, the interface (`interface`), its implementations, and the choice between them
(`select`):

    PureOps    XLA only, in tiles of a fixed size (`pure`)
    NativeOps  C++ kernels for CPUs (`native`, native/)
    GpuOps     Pallas kernels for a GPU (`gpu`; not imported here, since Pallas loads slowly)

Invariants:

- The result of a row has the same bits with any other rows in the batch, any number of rows, and
  any position of the row. So the shape of a reduction never depends on the batch. GpuOps does not
  promise this by default, for speed; it does if it is `deterministic`.
- An implementation has no state and is hashable.
"""

from milliways.model.ops.interface import Ops as Ops
from milliways.model.ops.native import NativeOps as NativeOps
from milliways.model.ops.pure import PureOps as PureOps
