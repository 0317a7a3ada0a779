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

int64_t outside(const TakeArgs& args) {
  for (int64_t i = 0; i < args.count; ++i)
    if (args.ids[i] < 0 || args.ids[i] >= args.rows) return i;
  return -1;
}

}  // namespace atom
