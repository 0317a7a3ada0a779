// silu(gate) * up.
#include "common.h"

namespace atom {

void silu_and_mul(const SiluArgs& args, int threads) {
  const int64_t half = args.half;
  by_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    for_rows(args.rows, half, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = (const T*)args.x + row * args.ldx;
        T* to = (T*)args.out + row * half;
        for (int64_t i = 0; i < half; i += 16)
          store_some(to + i, silu(load_some(gate + i, half - i)) * load_some(gate + half + i, half - i), half - i);
      }
    });
  });
}

}  // namespace atom
