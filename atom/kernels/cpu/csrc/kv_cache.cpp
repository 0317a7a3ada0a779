// Writing keys and values into the paged cache.
#include <algorithm>

#include "attention_pack.h"
#include "tiled_cache.h"

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

#if defined(ATOM_AMX)
// The keys and values of all slots of a group of a tiled bf16 cache, whose first token it is.
void store_group(const StoreArgs& args, int64_t token) {
  const int64_t dim = args.dim, block = args.slots[token] / args.block_size, offset = args.slots[token] % args.block_size;
  for (int which = 0; which < 2; ++which)
    for (int64_t h = 0; h < args.heads; ++h) {
      char* to = (char*)((bf16*)args.cache[which].data + block * args.cache[which].block_stride +
                         group_offset(offset, h, args.heads, dim));
      const bf16* rows[kGroupSlots];
      for (int64_t i = 0; i < kGroupSlots; ++i)
        rows[i] = (const bf16*)args.source[which] + (token + i) * args.token_stride[which] +
                  h * args.head_stride[which];
      if (which == 0) pack_keys<2>(rows, dim, dim / 2, to);
      else pack_values<2>(rows, kGroupSlots, dim, kGroupSlots * 32, to);
    }
}

// Whether `token` is the first of a whole group's, in order.
bool fills_group(const StoreArgs& args, int64_t token, int64_t end) {
  const int64_t slot = args.slots[token];
  if (token + kGroupSlots > end || slot % kGroupSlots) return false;
  for (int64_t i = 1; i < kGroupSlots; ++i)
    if (args.slots[token + i] != slot + i) return false;
  return true;
}
#endif

void store_tokens(const StoreArgs& args, int64_t begin, int64_t end) {
  const int64_t dim = args.dim, heads = args.heads;
  bool tiled[2];
  for (int which = 0; which < 2; ++which)
    tiled[which] = is_tiled(args.type, args.cache[which], args.block_size, heads, dim);
  static thread_local Scratch scratch;
  f8* scaled = (f8*)scratch.get(dim);
  by_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = args.slots[token];
      if (slot < 0) continue;
#if defined(ATOM_AMX)
      if (tiled[0] && tiled[1] && !args.cache[0].scale && fills_group(args, token, end)) {
        store_group(args, token);
        token += kGroupSlots - 1;
        continue;
      }
#endif
      const int64_t block = slot / args.block_size, offset = slot % args.block_size;
      for (int which = 0; which < 2; ++which) {
        const Cache& cache = args.cache[which];
        const T* from = (const T*)args.source[which] + token * args.token_stride[which];
        const int64_t at = block * cache.block_stride;
        for (int64_t h = 0; h < heads; ++h, from += args.head_stride[which]) {
          const int64_t to = at + offset * cache.slot_stride + h * cache.head_stride;
          const int64_t group = at + group_offset(offset, h, heads, dim);
          const auto put = [&](const auto* values) {
            auto* data = (std::decay_t<decltype(*values)>*)cache.data;
            if (!tiled[which]) memcpy((void*)(data + to), values, dim * sizeof(*values));
            else if (which == 0) put_key(values, data + group, offset % kGroupSlots, dim);
            else put_value(values, data + group, offset % kGroupSlots, dim);
          };
          if (!cache.scale) {
            put(from);
            continue;
          }
          store_scaled(from, scaled, cache.scale + block * cache.scale_block_stride +
                       offset * cache.scale_slot_stride + h * cache.scale_head_stride, dim);
          put(scaled);
        }
      }
    }
  });
}

}  // namespace

void store_kv(const StoreArgs& args, int threads) {
  // A token's key in a tiled cache lies in many cache lines, which have to be read first; those of many tokens are
  // written whole.
  const bool tiled = is_tiled(args.type, args.cache[0], args.block_size, args.heads, args.dim);
  const bool few = args.tokens < 64 * threads;
  const int64_t cost = args.heads * args.dim * (tiled && few ? 8 : 1) / 2;
  for_rows(args.tokens, cost, threads, [&](int64_t begin, int64_t end) { store_tokens(args, begin, end); });
}

}  // namespace atom
