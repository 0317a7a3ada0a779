// Rows of a table by their number.
#include "common.h"

namespace atom {

void take_rows(const TakeArgs& args, int threads) {
  for_rows(args.count, args.row_bytes / 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      memcpy((char*)args.out + i * args.row_bytes, (const char*)args.table + args.ids[i] * args.stride_bytes,
             args.row_bytes);
  });
}

}  // namespace atom
