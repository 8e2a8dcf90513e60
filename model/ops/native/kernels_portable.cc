// The kernels for any processor. Slow where it has no fused multiply-add, but of the same bits.
#include <cmath>

#define MILLIWAYS_KERNELS portable_kernels
#define MILLIWAYS_NAME "portable"
#include "kernels.inl"
