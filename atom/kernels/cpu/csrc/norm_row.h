// RMSNorm of a row.
#pragma once
#include "common.h"

namespace atom {

// residual == null: out = rms_norm(x), which may be x. Otherwise total = x + residual and out = rms_norm(total).
// Never inlined: compiled once, it rounds alike wherever it is called.
template <class T>
__attribute__((noinline)) void norm_row(const T* x, const T* residual, const T* weight, float eps, int64_t cols,
                                        T* total, T* out) {
  F16x squares = splat(0.0f);
  if (residual) {
    for (int64_t i = 0; i < cols; i += 16) {
      const int64_t n = cols - i;
      F16x v = rounded<T>(load_some(x + i, n) + load_some(residual + i, n));
      store_some(total + i, v, n);
      squares = squares + v * v;
    }
    x = total;
  } else {
    for (int64_t i = 0; i < cols; i += 16) {
      F16x v = load_some(x + i, cols - i);
      squares = squares + v * v;
    }
  }
  const F16x factor = splat(1.0f / std::sqrt(lane_sum(squares) / float(cols) + eps));
  for (int64_t i = 0; i < cols; i += 16) {
    const int64_t n = cols - i;
    store_some(out + i, rounded<T>(load_some(x + i, n) * factor) * load_some(weight + i, n), n);
  }
}

#if defined(ATOM_BF16_DOT)
// Even and odd columns apart: 32 elements widen by a shift and a mask, which is half of the work of widening 16 twice.
struct EvenOdd {
  F16x even, odd;
};
ATOM_INLINE EvenOdd widen(__m512i x) {
  return {{(RegF)_mm512_slli_epi32(x, 16)}, {(RegF)_mm512_and_si512(x, _mm512_set1_epi32(-65536))}};
}
ATOM_INLINE __m512i narrow(F16x even, F16x odd) {
  alignas(64) static constexpr uint16_t kOrder[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd.r[0], (__m512)even.r[0]);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}
ATOM_INLINE void store32(bf16* p, __m512i v, int64_t n) {
  if (n >= 32) _mm512_storeu_si512(p, v);
  else _mm512_mask_storeu_epi16(p, (__mmask32)((1ull << n) - 1), v);
}

template <bool kAdds>
void norm_row_wide(const bf16* x, const bf16* residual, const bf16* weight, float eps, int64_t cols, bf16* total,
                   bf16* out) {
  F16x even = splat(0.0f), odd = splat(0.0f);
  for (int64_t i = 0; i < cols; i += 32) {
    const int64_t n = cols - i;
    EvenOdd v = widen(load32(x + i, n));
    if (kAdds) {
      const EvenOdd r = widen(load32(residual + i, n));
      const __m512i sum = narrow(v.even + r.even, v.odd + r.odd);
      store32(total + i, sum, n);
      v = widen(sum);
    }
    even = even + v.even * v.even;
    odd = odd + v.odd * v.odd;
  }
  if (kAdds) x = total;
  const F16x factor = splat(1.0f / std::sqrt(lane_sum(even + odd) / float(cols) + eps));
  for (int64_t i = 0; i < cols; i += 32) {
    const int64_t n = cols - i;
    const EvenOdd v = widen(load32(x + i, n)), w = widen(load32(weight + i, n));
    const EvenOdd y = widen(narrow(v.even * factor, v.odd * factor));
    store32(out + i, narrow(y.even * w.even, y.odd * w.odd), n);
  }
}

template <>
__attribute__((noinline)) inline void norm_row(const bf16* x, const bf16* residual, const bf16* weight, float eps,
                                               int64_t cols, bf16* total, bf16* out) {
  if (residual) norm_row_wide<true>(x, residual, weight, eps, cols, total, out);
  else norm_row_wide<false>(x, residual, weight, eps, cols, total, out);
}
#endif

}  // namespace atom
