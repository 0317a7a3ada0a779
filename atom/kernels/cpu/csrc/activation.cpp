// silu(gate) * up.
#include "common.h"

namespace atom {

void silu_and_mul(DType type, int64_t rows, int64_t half, const void* x, int64_t ldx, void* out, int threads) {
  by_type(type, [&](auto tag) {
    using T = decltype(tag);
    for_rows(rows, half, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = (const T*)x + row * ldx;
        T* to = (T*)out + row * half;
        for (int64_t i = 0; i < half; i += 16)
          store_some(to + i, silu(load_some(gate + i, half - i)) * load_some(gate + half + i, half - i), half - i);
      }
    });
  });
}

}  // namespace atom
