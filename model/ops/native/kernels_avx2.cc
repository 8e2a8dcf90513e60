// The kernels for x86 processors with AVX2 and FMA, chosen at run time.
//
// Library headers come before the target. Otherwise their inline functions would be compiled for
// AVX2, and the linker might use these copies in the whole library.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MILLIWAYS_AVX2
#define MILLIWAYS_KERNELS avx2_kernels
#define MILLIWAYS_NAME "avx2"
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace milliways {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace milliways
#endif
