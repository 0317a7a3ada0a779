// The first of the largest of each row; NaN counts as largest.
#include "common.h"

namespace atom {
namespace {

constexpr int64_t kChunk = 4096;

int64_t row_argmax(const float* x, int64_t n) {
  float best = -INFINITY;
  int64_t start = 0;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t end = c + kChunk < n ? c + kChunk : n;
    F16x top = splat(-INFINITY);
    RegI nan[kRegs] = {};
    int64_t i = c;
    for (; i + 16 <= end; i += 16) {
      const F16x v = load16(x + i);
      for (int r = 0; r < kRegs; ++r) nan[r] |= v.r[r] != v.r[r];
      top = max(v, top);
    }
    float m = lane_max(top);
    bool any_nan = false;
    for (int r = 0; r < kRegs; ++r)
      for (int l = 0; l < kLanes; ++l) any_nan |= nan[r][l] != 0;
    for (; i < end; ++i) {
      any_nan |= x[i] != x[i];
      if (x[i] > m) m = x[i];
    }
    if (any_nan) {
      for (int64_t j = c; j < end; ++j)
        if (x[j] != x[j]) return j;
    }
    if (m > best) best = m, start = c;
  }
  for (int64_t i = start; i < n; ++i)
    if (x[i] == best) return i;
  return 0;
}

}  // namespace

void argmax(const float* x, int64_t rows, int64_t cols, int64_t ldx, int64_t* out, int threads) {
  for_rows(rows, cols / 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) out[row] = row_argmax(x + row * ldx, cols);
  });
}

}  // namespace atom
