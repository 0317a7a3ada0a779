// 16-lane vectors over what the machine has (one AVX-512, two AVX or four NEON/SSE registers), conversions, scratch memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "team.h"

#define ATOM_INLINE inline __attribute__((always_inline))
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ATOM_AVX512 1
#if defined(__AVX512BF16__)
#define ATOM_BF16_DOT 1
#endif
#endif

namespace atom {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kRegs = 16 / kLanes;  // registers in 16 lanes

typedef float RegF __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
typedef int32_t RegI __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8 {
  uint8_t bits;
};

struct F16x {  // 16 floats
  RegF r[kRegs];
};

#define ATOM_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kRegs; ++i)

ATOM_INLINE F16x splat(float x) {
  F16x o;
  ATOM_EACH o.r[i] = x - RegF{};
  return o;
}
ATOM_INLINE F16x operator+(F16x a, F16x b) { ATOM_EACH a.r[i] += b.r[i]; return a; }
ATOM_INLINE F16x operator-(F16x a, F16x b) { ATOM_EACH a.r[i] -= b.r[i]; return a; }
ATOM_INLINE F16x operator*(F16x a, F16x b) { ATOM_EACH a.r[i] *= b.r[i]; return a; }
ATOM_INLINE F16x operator/(F16x a, F16x b) { ATOM_EACH a.r[i] /= b.r[i]; return a; }
ATOM_INLINE F16x max(F16x a, F16x b) {  // b where either is NaN
#if defined(ATOM_AVX512)
  a.r[0] = (RegF)_mm512_max_ps((__m512)a.r[0], (__m512)b.r[0]);
#else
  ATOM_EACH a.r[i] = a.r[i] > b.r[i] ? a.r[i] : b.r[i];
#endif
  return a;
}
ATOM_INLINE F16x abs(F16x a) {
  ATOM_EACH a.r[i] = (RegF)((RegI)a.r[i] & 0x7fffffff);
  return a;
}

ATOM_INLINE float bf16_to_float(uint16_t b) {
  uint32_t u = uint32_t(b) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
ATOM_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 64);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#if defined(__aarch64__)
typedef __fp16 NativeHalf;
#else
typedef _Float16 NativeHalf;
#endif
ATOM_INLINE float f16_to_float(uint16_t b) {
  NativeHalf h;
  memcpy(&h, &b, 2);
  return float(h);
}
ATOM_INLINE uint16_t float_to_f16(float f) {
  const NativeHalf h = NativeHalf(f);
  uint16_t b;
  memcpy(&b, &h, 2);
  return b;
}

ATOM_INLINE F16x load16(const float* p) {
  F16x o;
  memcpy(&o, p, 64);
  return o;
}
ATOM_INLINE void store16(float* p, F16x v) { memcpy(p, &v, 64); }

#if defined(ATOM_AVX512)
ATOM_INLINE F16x from_bf16(__m256i bits) { return {(RegF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)}; }
#endif
#if defined(ATOM_BF16_DOT)
ATOM_INLINE __m256i to_bf16(F16x v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v.r[0]); }
#endif
ATOM_INLINE F16x load16(const bf16* p) {
  F16x o;
#if defined(ATOM_AVX512)
  o = from_bf16(_mm256_loadu_si256((const __m256i*)p));
#else
  uint32_t u[16];
  for (int i = 0; i < 16; ++i) u[i] = uint32_t(p[i].bits) << 16;
  memcpy(&o, u, 64);
#endif
  return o;
}
ATOM_INLINE void store16(bf16* p, F16x v) {
#if defined(ATOM_BF16_DOT)
  _mm256_storeu_si256((__m256i*)p, to_bf16(v));
#else
  float f[16];
  memcpy(f, &v, 64);
  for (int i = 0; i < 16; ++i) p[i].bits = float_to_bf16(f[i]);
#endif
}
ATOM_INLINE F16x load16(const f16* p) {
  F16x o;
#if defined(ATOM_AVX512)
  o.r[0] = (RegF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i) o.r[i] = (RegF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
#else
  float f[16];
  for (int i = 0; i < 16; ++i) f[i] = f16_to_float(p[i].bits);
  memcpy(&o, f, 64);
#endif
  return o;
}
ATOM_INLINE void store16(f16* p, F16x v) {
#if defined(ATOM_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v.r[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph((__m256)v.r[i], _MM_FROUND_TO_NEAREST_INT));
#else
  float f[16];
  memcpy(f, &v, 64);
  for (int i = 0; i < 16; ++i) p[i].bits = float_to_f16(f[i]);
#endif
}
// e4m3fn: its bits as a float's are the value times 2^-120, subnormals included.
ATOM_INLINE F16x load16(const f8* p) {
  F16x o;
  int32_t u[16];
  for (int i = 0; i < 16; ++i) u[i] = (int32_t(p[i].bits & 0x7f) << 20) | int32_t(uint32_t(p[i].bits & 0x80) << 24);
  memcpy(&o, u, 64);
  return o * splat(0x1p120f);
}

// The first n (0..16) elements; the other lanes are zero.
template <class T>
ATOM_INLINE F16x load_some(const T* p, int64_t n) {
  if (n >= 16) return load16(p);
  T t[16] = {};
  if (n > 0) memcpy(t, p, n * sizeof(T));
  return load16(t);
}
template <class T>
ATOM_INLINE void store_some(T* p, F16x v, int64_t n) {
  if (n >= 16) return store16(p, v);
  T t[16];
  store16(t, v);
  if (n > 0) memcpy(p, t, n * sizeof(T));
}
// Rounded to T and back.
template <class T>
ATOM_INLINE F16x rounded(F16x v) {
  T t[16];
  store16(t, v);
  return load16(t);
}
template <>
ATOM_INLINE F16x rounded<float>(F16x v) {
  return v;
}
#if defined(ATOM_BF16_DOT)
template <>
ATOM_INLINE F16x rounded<bf16>(F16x v) {
  return from_bf16(to_bf16(v));
}
#endif

ATOM_INLINE float lane_sum(F16x v) {  // always in this order
#if defined(ATOM_AVX512)
  const __m512 x = (__m512)v.r[0];
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float f[16];
  memcpy(f, &v, 64);
  for (int s = 8; s; s /= 2)
    for (int i = 0; i < s; ++i) f[i] += f[i + s];
  return f[0];
#endif
}
ATOM_INLINE float lane_max(F16x v) {
#if defined(ATOM_AVX512)
  return _mm512_reduce_max_ps((__m512)v.r[0]);
#else
  float f[16];
  memcpy(f, &v, 64);
  for (int s = 8; s; s /= 2)
    for (int i = 0; i < s; ++i) f[i] = f[i] > f[i + s] ? f[i] : f[i + s];
  return f[0];
#endif
}

// 2^x to about 2e-7 relative; 0 where it would be below the normal floats, at least 2^127 (or infinity) for very large
// x, NaN for NaN.
ATOM_INLINE F16x exp2(F16x x) {
  F16x o;
  ATOM_EACH {
#if defined(ATOM_AVX512)
    // Underflow would take the processor hundreds of cycles: lanes where it happens are not computed.
    const __mmask16 large = _mm512_cmp_ps_mask((__m512)x.r[i], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 v = (__m512)x.r[i];
    const __m512 n = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // Infinity minus infinity would be NaN.
    const RegF f = (RegF)_mm512_min_ps(_mm512_set1_ps(0.5f), _mm512_sub_ps(v, n));
#else
    RegF v = x.r[i];
    v = v < -127.0f ? -127.0f - RegF{} : v;
    v = v > 127.0f ? 127.0f - RegF{} : v;
    const RegF magic = 12582912.0f - RegF{};  // 1.5 * 2^23: adding it rounds to an integer
    const RegF shifted = v + magic;
    const RegF f = v - (shifted - magic);
    const RegF power = (RegF)(((RegI)shifted - 0x4b400000 + 127) << 23);
#endif
    RegF p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
#if defined(ATOM_AVX512)
    o.r[i] = (RegF)_mm512_maskz_scalef_ps(large, (__m512)p, n);
#else
    o.r[i] = p * power;
#endif
  }
  return o;
}
ATOM_INLINE F16x silu(F16x x) {
#if defined(ATOM_AVX512)
  // A division takes 16 cycles: an estimate and one step of Newton's, for which the divisor must be finite.
  const __m512 v = (__m512)x.r[0];
  const __m512 power = _mm512_min_ps(_mm512_set1_ps(100.0f), _mm512_mul_ps(v, _mm512_set1_ps(-1.44269504088896341f)));
  const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.0f), (__m512)exp2(F16x{(RegF)power}).r[0]);
  const __m512 guess = _mm512_rcp14_ps(divisor);
  const __m512 exact = _mm512_mul_ps(guess, _mm512_fnmadd_ps(divisor, guess, _mm512_set1_ps(2.0f)));
  return {(RegF)_mm512_mul_ps(v, exact)};
#else
  return x / (splat(1.0f) + exp2(x * splat(-1.44269504088896341f)));
#endif
}

#if defined(ATOM_BF16_DOT)
// The first n of 32 values as bf16, exactly.
ATOM_INLINE __m512i load32(const bf16* p, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
ATOM_INLINE __m512i load32(const f8* p, int64_t n) {
  const F16x low = load_some(p, n), high = load_some(p + 16, n - 16);
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high.r[0], (__m512)low.r[0]);
}
#endif

// A buffer that grows and is kept; one a thread and place of use (`static thread_local Scratch`).
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Calls f with a value of the C++ type of `type`.
template <class F>
ATOM_INLINE void by_type(DType type, F&& f) {
  if (type == DType::f32) f(float{});
  else if (type == DType::bf16) f(bf16{});
  else f(f16{});
}

}  // namespace atom
