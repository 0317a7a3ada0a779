// RMSNorm, with or without the residual addition before it.
#include "norm_row.h"

namespace atom {
namespace {

template <class T>
void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    norm_row((const T*)args.x + row / args.group * args.ldg + row % args.group * args.ldx,
             args.residual ? (const T*)args.residual + row * args.ldr : nullptr, (const T*)args.weight, args.eps,
             args.cols, args.residual ? (T*)args.total + row * args.ldt : nullptr, (T*)args.out + row * args.ldo);
}

}  // namespace

void rms_norm(const NormArgs& args, int threads) {
  by_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    for_rows(args.rows, args.cols, threads, [&](int64_t begin, int64_t end) { norm_rows<T>(args, begin, end); });
  });
}

}  // namespace atom
