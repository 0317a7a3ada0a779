// Rotary position embedding in place, in float32.
#include <algorithm>

#include "common.h"

namespace atom {
namespace {

template <class T>
float get(T x) {
  if constexpr (std::is_same_v<T, bf16>) return bf16_to_float(x.bits);
  else if constexpr (std::is_same_v<T, f16>) return f16_to_float(x.bits);
  else return x;
}
template <class T>
T put(float x) {
  if constexpr (std::is_same_v<T, bf16>) return {float_to_bf16(x)};
  else if constexpr (std::is_same_v<T, f16>) return {float_to_f16(x)};
  else return x;
}

template <class T>
void rotate(const RotaryArgs& args, int64_t token) {
  const int64_t half = args.rotary_dim / 2;
  const float* cosine = args.cos_sin + args.positions[token] * args.rotary_dim;
  const float* sine = cosine + half;
  for (int which = 0; which < 2; ++which) {
    for (int64_t h = 0; h < args.heads[which]; ++h) {
      T* x = (T*)args.x[which] + token * args.token_stride[which] + h * args.head_stride[which];
      if (args.interleaved) {
        for (int64_t i = 0; i < half; ++i) {
          const float a = get(x[2 * i]), b = get(x[2 * i + 1]);
          x[2 * i] = put<T>(a * cosine[i] - b * sine[i]);
          x[2 * i + 1] = put<T>(b * cosine[i] + a * sine[i]);
        }
        continue;
      }
      for (int64_t i = 0; i < half; i += 16) {
        const int64_t n = half - i;
        const F16x a = load_some(x + i, n), b = load_some(x + half + i, n);
        const F16x c = load_some(cosine + i, n), s = load_some(sine + i, n);
        store_some(x + i, a * c - b * s, n);
        store_some(x + half + i, b * c + a * s, n);
      }
    }
  }
}

}  // namespace

void rotate_token(const RotaryArgs& args, int64_t token) {
  by_type(args.type, [&](auto tag) { rotate<decltype(tag)>(args, token); });
}

void rotary_embedding(const RotaryArgs& args, int threads) {
  const int64_t cost = (args.heads[0] + args.heads[1]) * args.rotary_dim / 2;
  by_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    for_rows(args.tokens, cost, threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) rotate<T>(args, token);
    });
  });
}

}  // namespace atom
