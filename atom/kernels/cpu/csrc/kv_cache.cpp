// Writing keys and values into the paged cache.
#include <algorithm>

#include "common.h"

namespace atom {
namespace {

// Round to nearest even; x is within +-448 or NaN.
ATOM_INLINE uint8_t float_to_e4m3(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint8_t sign = uint8_t(u >> 24 & 0x80);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7f;
  if (u < (121u << 23)) {  // below 2^-6: multiples of 2^-9, which adding 2^14 rounds to
    float f;
    memcpy(&f, &u, 4);
    f += 16384.0f;
    memcpy(&u, &f, 4);
    return uint8_t(sign | (u - 0x46800000));
  }
  u += 0x7ffff + (u >> 20 & 1);
  return uint8_t(sign | ((u >> 20) - (120 << 3)));
}

template <class T>
void store_scaled(const T* from, f8* to, float* scale, int64_t dim) {
  F16x top = splat(0.0f);
  bool nan = false;
  for (int64_t i = 0; i < dim; i += 16) {
    const F16x v = abs(load_some(from + i, dim - i));
    float f[16];
    memcpy(f, &v, 64);
    for (float lane : f) nan |= lane != lane;
    top = max(top, v);
  }
  *scale = nan ? NAN : std::max(lane_max(top), 1e-10f) / 448.0f;
  for (int64_t i = 0; i < dim; i += 16) {
    const F16x v = load_some(from + i, dim - i) / splat(*scale);
    float f[16];
    memcpy(f, &v, 64);
    for (int64_t j = 0; j < std::min<int64_t>(16, dim - i); ++j) {
      const float clamped = f[j] > 448.0f ? 448.0f : f[j] < -448.0f ? -448.0f : f[j];
      to[i + j].bits = float_to_e4m3(clamped);
    }
  }
}

}  // namespace

void store_kv(const StoreArgs& args, int threads) {
  const int64_t bytes = element_size(args.type);
  for_rows(args.tokens, args.heads * args.dim / 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = args.slots[token];
      if (slot < 0) continue;
      const int64_t block = slot / args.block_size, offset = slot % args.block_size;
      for (int which = 0; which < 2; ++which) {
        const Cache& cache = args.cache[which];
        const char* from = (const char*)args.source[which] + token * args.token_stride[which] * bytes;
        const int64_t at = block * cache.block_stride + offset * cache.slot_stride;
        for (int64_t h = 0; h < args.heads; ++h) {
          const char* head = from + h * args.head_stride[which] * bytes;
          const int64_t to = at + h * cache.head_stride;
          if (cache.scale) {
            float* scale = cache.scale + block * cache.scale_block_stride + offset * cache.scale_slot_stride +
                           h * cache.scale_head_stride;
            by_type(args.type, [&](auto tag) {
              store_scaled((const decltype(tag)*)head, (f8*)cache.data + to, scale, args.dim);
            });
          } else {
            memcpy((char*)cache.data + to * bytes, head, args.dim * bytes);
          }
        }
      }
    }
  });
}

}  // namespace atom
