"""The few functions a layer is made of. `decoder` composes them and knows nothing of how they sum.

    Ops        the interface (interface.py)
    PureOps    XLA only, in fixed tiles (pure.py)
    NativeOps  C++ kernels for CPUs (native.py, native/)
    GpuOps     Pallas kernels for a GPU (gpu.py; imported from there, since Pallas takes its time)

They keep one contract: a row's result has the same bits whatever rows stand beside it, however
many, and wherever in the batch it stands. Reductions therefore never take their shape from the
batch. Only GpuOps leaves it, for speed, where it is not made deterministic.
"""

from milliways.model.ops.interface import Ops as Ops
from milliways.model.ops.native import NativeOps as NativeOps
from milliways.model.ops.pure import PureOps as PureOps
