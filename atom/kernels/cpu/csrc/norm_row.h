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

}  // namespace atom
