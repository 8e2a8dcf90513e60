// The kernels for any processor. Without fused multiply-add they are slow, but give the same bits.
#include <cmath>

#define MILLIWAYS_KERNELS portable_kernels
#define MILLIWAYS_NAME "portable"
#include "kernels.inl"
