// RMSNorm, with or without the residual addition before it.
#include "common.h"

namespace atom {
namespace {

template <class T>
void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)args.x + row / args.group * args.ldg + row % args.group * args.ldx;
    T* out = (T*)args.out + row * args.ldo;
    const T* weight = (const T*)args.weight;
    F16x squares = splat(0.0f);
    if (args.residual) {
      const T* residual = (const T*)args.residual + row * args.ldr;
      T* total = (T*)args.total + row * args.ldt;
      for (int64_t i = 0; i < args.cols; i += 16) {
        const int64_t n = args.cols - i;
        F16x v = rounded<T>(load_some(x + i, n) + load_some(residual + i, n));
        store_some(total + i, v, n);
        squares = squares + v * v;
      }
      x = total;
    } else {
      for (int64_t i = 0; i < args.cols; i += 16) {
        F16x v = load_some(x + i, args.cols - i);
        squares = squares + v * v;
      }
    }
    const F16x factor = splat(1.0f / std::sqrt(lane_sum(squares) / float(args.cols) + args.eps));
    for (int64_t i = 0; i < args.cols; i += 16) {
      const int64_t n = args.cols - i;
      store_some(out + i, rounded<T>(load_some(x + i, n) * factor) * load_some(weight + i, n), n);
    }
  }
}

}  // namespace

void rms_norm(const NormArgs& args, int threads) {
  by_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    for_rows(args.rows, args.cols, threads, [&](int64_t begin, int64_t end) { norm_rows<T>(args, begin, end); });
  });
}

}  // namespace atom
