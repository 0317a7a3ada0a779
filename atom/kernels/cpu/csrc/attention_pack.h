// Rows of keys and values as the products of attention read them: a step of K holds one value, or a pair of bf16.
#pragma once
#include <algorithm>

#include "common.h"

namespace atom {

#if defined(ATOM_AVX512)
ATOM_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

#if defined(ATOM_BF16_DOT)
// Permutation of two vectors that pairs the first 16 values of one with those of the other.
ATOM_INLINE __m512i interleave_low() {
  alignas(64) static const uint16_t index[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_load_si512(index);
}
#endif

// 16 keys -> [steps][16][kWidth].
template <int kWidth, class C>
void pack_keys(const C* const* keys, int64_t dim, int64_t steps, char* out) {
#if defined(ATOM_AVX512)
  for (int64_t s = 0; s < steps; s += 16) {
    const int64_t at = s * kWidth, left = dim - at;
    __m512i r[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
#if defined(ATOM_BF16_DOT)
      if constexpr (kWidth == 2) r[j] = load32(keys[j] + at, left);
#endif
      if constexpr (kWidth == 1) r[j] = (__m512i)load_some(keys[j] + at, left).r[0];
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j)
      if (s + j < steps) _mm512_storeu_si512(out + (s + j) * 64, r[j]);
  }
#else
  float* to = (float*)out;
  for (int64_t j = 0; j < 16; ++j)
    for (int64_t s = 0; s < steps; s += 16) {
      float f[16];
      const F16x v = load_some(keys[j] + s, dim - s);
      memcpy(f, &v, 64);
      for (int64_t i = 0; i < std::min<int64_t>(16, steps - s); ++i) to[(s + i) * 16 + j] = f[i];
    }
#endif
}

// keys rows -> panels of 16 columns [keys / kWidth][16][kWidth], panel_bytes apart.
template <int kWidth, class C>
void pack_values(const C* const* rows, int64_t keys, int64_t dim, int64_t panel_bytes, char* out) {
#if defined(ATOM_BF16_DOT)
  if constexpr (kWidth == 2) {
    const __m512i low = interleave_low(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t k = 0; k < keys; k += 2) {
      for (int64_t c = 0; c < dim; c += 32) {
        const __m512i a = load32(rows[k] + c, dim - c), b = load32(rows[k + 1] + c, dim - c);
        char* to = out + c / 16 * panel_bytes + k * 32;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
        if (dim - c > 16) _mm512_storeu_si512(to + panel_bytes, _mm512_permutex2var_epi16(a, high, b));
      }
    }
    return;
  }
#endif
  if constexpr (kWidth == 1) {
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t c = 0; c < dim; c += 16)
        store16((float*)(out + c / 16 * panel_bytes) + k * 16, load_some(rows[k] + c, dim - c));
  }
}

}  // namespace atom
