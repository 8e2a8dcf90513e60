// Operations on eight float32 lanes: the same source for every instruction set.
//
// The kernels are compiled once for each instruction set (see kernels_avx2.cc). The bits do not
// depend on the set: sums have a fixed order, a product that is added is always fused (rounded
// once), and lanes are combined only in `sum`, in a fixed tree. This file must be compiled without
// -ffast-math and without contraction.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef MILLIWAYS_AVX2
#include <immintrin.h>
#endif

#ifdef __FAST_MATH__
#error "fast-math would change the bits"
#endif

#define MW_INLINE static inline __attribute__((always_inline))
#define MW_INLINE_MEMBER inline __attribute__((always_inline))

namespace milliways {
namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));

constexpr int kLanes = 8;

MW_INLINE F8 load(const float* from) {
  F8 lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

MW_INLINE void store(float* to, F8 lanes) { std::memcpy(to, &lanes, sizeof lanes); }

MW_INLINE F8 broadcast(float value) { return value - F8{}; }

MW_INLINE F8 fma(F8 left, F8 right, F8 sum) {
#ifdef MILLIWAYS_AVX2
  return (F8)_mm256_fmadd_ps((__m256)left, (__m256)right, (__m256)sum);
#else
  F8 out;
  for (int i = 0; i < kLanes; i++) out[i] = __builtin_fmaf(left[i], right[i], sum[i]);
  return out;
#endif
}

MW_INLINE float fma(float left, float right, float sum) {
#ifdef MILLIWAYS_AVX2
  return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(left), _mm_set_ss(right), _mm_set_ss(sum)));
#else
  return __builtin_fmaf(left, right, sum);
#endif
}

MW_INLINE F8 to_float(I8 lanes) { return __builtin_convertvector(lanes, F8); }

MW_INLINE F8 larger(F8 left, F8 right) { return left > right ? left : right; }

// Adds the halves, then the quarters: always in this order.
MW_INLINE float sum(F8 v) {
#ifdef MILLIWAYS_AVX2
  // The same additions, of four and of two lanes at once.
  const __m128 fours = _mm_add_ps(_mm256_castps256_ps128((__m256)v),
                                  _mm256_extractf128_ps((__m256)v, 1));
  const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

MW_INLINE float largest(F8 v) {
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
}

// Eight weights as floats; exact for int8 and int16.
MW_INLINE F8 widen(const int8_t* weights) {
#ifdef MILLIWAYS_AVX2
  return (F8)_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(weights))));
#else
  F8 out;
  for (int i = 0; i < kLanes; i++) out[i] = static_cast<float>(weights[i]);
  return out;
#endif
}

MW_INLINE F8 widen(const int16_t* weights) {
#ifdef MILLIWAYS_AVX2
  return (F8)_mm256_cvtepi32_ps(
      _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights))));
#else
  F8 out;
  for (int i = 0; i < kLanes; i++) out[i] = static_cast<float>(weights[i]);
  return out;
#endif
}

// Eight bfloat16 values: the upper halves of float32.
MW_INLINE F8 widen(const uint16_t* values) {
#ifdef MILLIWAYS_AVX2
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return (F8)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
  F8 out;
  for (int i = 0; i < kLanes; i++) {
    const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    out[i] = value;
  }
  return out;
#endif
}

// Eight pairs of int8 as sixteen int16. A pair has two rows of one column.
struct Pairs8 {
#ifdef MILLIWAYS_AVX2
  __m256i values;
#else
  int16_t values[2 * kLanes];
#endif
};

MW_INLINE Pairs8 load_pairs(const int8_t* weights) {
  Pairs8 out;
#ifdef MILLIWAYS_AVX2
  out.values = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
#else
  for (int i = 0; i < 2 * kLanes; i++) out.values[i] = weights[i];
#endif
  return out;
}

// The activations of two neighbouring rows, repeated for every column.
MW_INLINE Pairs8 broadcast_pair(const int16_t* activations) {
  Pairs8 out;
#ifdef MILLIWAYS_AVX2
  int32_t both;
  std::memcpy(&both, activations, sizeof both);
  out.values = _mm256_set1_epi32(both);
#else
  for (int i = 0; i < 2 * kLanes; i++) out.values[i] = activations[i % 2];
#endif
  return out;
}

// sum + left[2i] * right[2i] + left[2i + 1] * right[2i + 1]: whole numbers, exact in any order.
MW_INLINE I8 add_products(Pairs8 left, Pairs8 right, I8 sum) {
#ifdef MILLIWAYS_AVX2
  return sum + (I8)_mm256_madd_epi16(left.values, right.values);
#else
  for (int i = 0; i < kLanes; i++) {
    sum[i] += left.values[2 * i] * right.values[2 * i] +
              left.values[2 * i + 1] * right.values[2 * i + 1];
  }
  return sum;
#endif
}

// Rounds half to even, for |value| below 2^22: the sum has no bits for a fraction.
MW_INLINE F8 round_even(F8 value) {
  const float magic = 12582912.0f;
  return (value + magic) - magic;
}

MW_INLINE I8 to_int(F8 whole) { return __builtin_convertvector(whole, I8); }

// e^x by 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients); 2 ulp, e^0 = 1 exactly.
// Arguments are limited to [-87, 88], so that the result neither overflows nor is subnormal.
MW_INLINE F8 exp(F8 x) {
  x = x < -87.0f ? broadcast(-87.0f) : x;
  x = x > 88.0f ? broadcast(88.0f) : x;
  const F8 n = round_even(x * 1.44269504088896341f);
  F8 r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  F8 p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const I8 power = (to_int(n) + 127) << 23;
  F8 scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// (1 - e^-2|x|) / (1 + e^-2|x|), with the sign of x.
MW_INLINE F8 tanh(F8 x) {
  const F8 magnitude = x < 0.0f ? -x : x;
  const F8 t = exp(-2.0f * magnitude);
  const F8 y = (1.0f - t) / (1.0f + t);
  return x < 0.0f ? -y : y;
}

// The tanh form of GELU, as x * sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
MW_INLINE F8 gelu(F8 x) {
  const F8 u = fma(x * x * x, broadcast(0.044715f), x) * 0.7978845608028654f;
  return x / (1.0f + exp(-2.0f * u));
}

// The natural logarithm of positive normal numbers (Cephes' coefficients); 1 ulp.
MW_INLINE F8 log(F8 x) {
  I8 bits;
  std::memcpy(&bits, &x, sizeof bits);
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const I8 shifted = bits - 0x3f3504f3;
  const F8 e = to_float(shifted >> 23);
  const I8 mantissa = (shifted & 0x7fffff) + 0x3f3504f3;
  F8 m;
  std::memcpy(&m, &mantissa, sizeof m);
  const F8 f = m - 1.0f;
  F8 p = broadcast(7.0376836292e-2f);
  p = fma(p, f, broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  const F8 square = f * f;
  F8 y = fma(e, broadcast(-2.12194440e-4f), p * f * square);
  y = fma(square, broadcast(-0.5f), y);
  return fma(e, broadcast(0.693359375f), f + y);
}

// -log(1 - u) for u in (0, 1): log of the rounded 1 - u, corrected for the rounding error.
MW_INLINE F8 minus_log1m(F8 u) {
  const F8 rest = 1.0f - u;
  const F8 taken = 1.0f - rest;
  return taken == 0.0f ? u : -log(rest) * (u / taken);
}

// Eight unsigned words as floats, rounded once: the sum of two exact halves.
MW_INLINE F8 to_float_unsigned(Words8 words) {
  const F8 high = to_float((I8)(words >> 16)) * 65536.0f;
  return high + to_float((I8)(words & 0xffff));
}

}  // namespace
}  // namespace milliways
