// Causal attention over the paged cache: online softmax (Dao et al. 2022, arXiv 2205.14135) in tiles of keys.
//
// Tiles of kTile keys start at multiples of kTile, and the results of every kSplit keys are merged in order,
// whoever computed them: a query's bits don't depend on its neighbours, its chunk or the number of threads.
// Keys a query doesn't see have probability exactly 0 and change nothing.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "micro.h"

namespace atom {
namespace {

constexpr int64_t kTile = 64, kSplit = 128, kTileRows = 64;

// How the products are computed: on floats, or on bf16 pairs where the machine has the instruction.
struct OnFloat {
  using Step = StepF32;
  using Element = float;
  static constexpr int64_t width = 1;
};
struct OnBF16 {
  using Step = StepBF16;
  using Element = bf16;
  static constexpr int64_t width = 2;
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One request, KV head and run of its query tokens; a row is a (token, query head of the group).
struct Work {
  int64_t request, kv_head, first, tokens;
  int64_t partial;  // where its splits' results lie in the shared buffer
};

// The running softmax of some rows: maximum, sum in 16 lanes, weighted values.
struct State {
  float *top, *sum, *values;
  static int64_t floats(int64_t rows, int64_t width) { return round_up(rows, 16) + rows * 16 + rows * width; }
  State(float* at, int64_t rows) : top(at), sum(at + round_up(rows, 16)), values(sum + rows * 16) {}
};

#if defined(ATOM_AVX512)
ATOM_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

#if defined(ATOM_BF16_DOT)
// The first n of 32 values as bf16, exactly.
ATOM_INLINE __m512i load32(const bf16* p, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
ATOM_INLINE __m512i load32(const f8* p, int64_t n) {
  const F16x low = load_some(p, n), high = load_some(p + 16, n - 16);
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high.r[0], (__m512)low.r[0]);
}
#endif

// 16 keys (null = zeros) -> [steps][16][width].
template <class On, class C>
void pack_keys(const C* const* keys, int64_t dim, char* out) {
  const int64_t steps = (dim + On::width - 1) / On::width;
#if defined(ATOM_AVX512)
  for (int64_t s = 0; s < steps; s += 16) {
    const int64_t at = s * On::width, left = dim - at;
    __m512i r[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      if (!keys[j]) r[j] = _mm512_setzero_si512();
#if defined(ATOM_BF16_DOT)
      else if constexpr (std::is_same_v<On, OnBF16>) r[j] = load32(keys[j] + at, left);
#endif
      else if constexpr (std::is_same_v<On, OnFloat>) r[j] = (__m512i)load_some(keys[j] + at, left).r[0];
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j)
      if (s + j < steps) _mm512_storeu_si512(out + (s + j) * 64, r[j]);
  }
#else
  float* to = (float*)out;
  for (int64_t j = 0; j < 16; ++j)
    for (int64_t s = 0; s < steps; s += 16) {
      float f[16];
      const F16x v = keys[j] ? load_some(keys[j] + s, dim - s) : splat(0.0f);
      memcpy(f, &v, 64);
      for (int64_t i = 0; i < std::min<int64_t>(16, steps - s); ++i) to[(s + i) * 16 + j] = f[i];
    }
#endif
}

// keys rows (null = zeros) -> panels of 16 columns [keys / width][16][width], panel_bytes apart.
template <class On, class C>
void pack_values(const C* const* rows, int64_t keys, int64_t dim, int64_t panel_bytes, char* out) {
#if defined(ATOM_BF16_DOT)
  if constexpr (std::is_same_v<On, OnBF16>) {
    alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low_index = _mm512_load_si512(low);
    const __m512i high_index = _mm512_add_epi16(low_index, _mm512_set1_epi16(16));
    for (int64_t k = 0; k < keys; k += 2) {
      for (int64_t c = 0; c < dim; c += 32) {
        const __m512i a = rows[k] ? load32(rows[k] + c, dim - c) : _mm512_setzero_si512();
        const __m512i b = rows[k + 1] ? load32(rows[k + 1] + c, dim - c) : _mm512_setzero_si512();
        char* to = out + c / 16 * panel_bytes + k * 32;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low_index, b));
        if (dim - c > 16) _mm512_storeu_si512(to + panel_bytes, _mm512_permutex2var_epi16(a, high_index, b));
      }
    }
    return;
  }
#endif
  if constexpr (std::is_same_v<On, OnFloat>) {
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t c = 0; c < dim; c += 16)
        store16((float*)(out + c / 16 * panel_bytes) + k * 16,
                rows[k] ? load_some(rows[k] + c, dim - c) : splat(0.0f));
  }
}

ATOM_INLINE void store_probability(float* p, F16x v) { store16(p, v); }
ATOM_INLINE void store_probability(bf16* p, F16x v) { store16(p, v); }

// `part` after `total`, in that order. An empty part changes nothing.
void merge(const State& total, const State& part, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.top[r] == -INFINITY) continue;
    float* values = total.values + r * width;
    const float* more = part.values + r * width;
    if (total.top[r] == -INFINITY) {
      total.top[r] = part.top[r];
      memcpy(total.sum + r * 16, part.sum + r * 16, 64);
      memcpy(values, more, width * sizeof(float));
      continue;
    }
    const float top = std::max(total.top[r], part.top[r]);
    const F16x a = exp2(splat(total.top[r] - top)), b = exp2(splat(part.top[r] - top));
    total.top[r] = top;
    store16(total.sum + r * 16, load16(total.sum + r * 16) * a + load16(part.sum + r * 16) * b);
    for (int64_t c = 0; c < width; c += 16) store16(values + c, load16(values + c) * a + load16(more + c) * b);
  }
}

template <class On, class Q, class C>
class Attention {
 public:
  Attention(const AttentionArgs& args) : args_(args) {
    group_ = args.heads / args.kv_heads;
    width_ = round_up(args.dim, 16);
    steps_ = (args.dim + On::width - 1) / On::width;
    log2_scale_ = args.scale * 1.44269504088896341f;
  }

  void run(int threads) {
    const int64_t tile_tokens = std::max<int64_t>(1, kTileRows / group_);
    max_rows_ = tile_tokens * group_;
    static thread_local std::vector<Work> work;
    work.clear();
    int64_t cost = 0;
    for (int64_t r = 0; r < args_.requests; ++r) {
      const int64_t count = args_.query_start[r + 1] - args_.query_start[r];
      // The last tokens see the most: they come first, so that the threads end together.
      for (int64_t end = count; end > 0; end -= tile_tokens) {
        const int64_t first = std::max<int64_t>(0, end - tile_tokens);
        for (int64_t h = 0; h < args_.kv_heads; ++h) work.push_back({r, h, first, end - first, 0});
        const KeyRange keys = key_range(r, first, end - first);
        cost += (keys.end - keys.begin) * (end - first) * args_.heads * args_.dim;
      }
    }
    if (work.empty()) return;
    if (cost < 16384) threads = 1;
    items_ = work.data();
    const int64_t count = work.size();

    static thread_local std::vector<Part> parts;
    parts.clear();
    if (threads > 1 && count < 4 * threads) {
      int64_t partial = 0;
      for (Work& w : work) {
        const KeyRange keys = key_range(w.request, w.first, w.tokens);
        w.partial = partial;
        for (int64_t s = keys.begin / kSplit; s * kSplit < keys.end; ++s) parts.push_back({&w, s, partial++});
      }
      if (partial <= count || partial * State::floats(max_rows_, width_) > (64 << 20)) parts.clear();
    }
    std::atomic<int64_t> next{0};
    if (parts.empty()) {
      parallel(threads, [&](int, int) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) whole(items_[i]);
      });
      return;
    }
    static thread_local Scratch shared;
    const int64_t floats = State::floats(max_rows_, width_), total = parts.size();
    float* partials = (float*)shared.get(total * floats * sizeof(float));
    const Part* first_part = parts.data();
    std::atomic<int64_t> next_merge{0};
    parallel(threads, [&](int, int) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
        const Part& part = first_part[i];
        const Buffers buffers(*this);
        load_query(*part.work, buffers);
        split(*part.work, part.index, buffers,
              State(partials + part.partial * floats, part.work->tokens * group_));
      }
#pragma omp barrier
      for (int64_t i; (i = next_merge.fetch_add(1, std::memory_order_relaxed)) < count;) {
        const Work& w = items_[i];
        const int64_t rows = w.tokens * group_;
        const KeyRange keys = key_range(w.request, w.first, w.tokens);
        const Buffers buffers(*this);
        const State state(buffers.total, rows);
        clear(state, rows);
        int64_t at = w.partial;
        for (int64_t s = keys.begin / kSplit; s * kSplit < keys.end; ++s)
          merge(state, State(partials + at++ * floats, rows), rows, width_);
        write(w, state);
      }
    });
  }

 private:
  struct KeyRange {
    int64_t begin, end;
  };
  struct Part {
    const Work* work;
    int64_t index, partial;
  };

  int64_t position(int64_t request, int64_t token) const {
    return args_.seq_lens[request] - (args_.query_start[request + 1] - args_.query_start[request]) + token;
  }
  int64_t first_seen(int64_t position) const {
    return args_.window ? std::max<int64_t>(0, position - args_.window + 1) : 0;
  }
  KeyRange key_range(int64_t request, int64_t first, int64_t tokens) const {
    const int64_t end = std::max<int64_t>(0, position(request, first + tokens - 1) + 1);
    return {std::min(end, first_seen(position(request, first))), end};
  }

  // A thread's own memory.
  struct Buffers {
    char *query, *keys, *values;
    float *scores, *state, *total;
    typename On::Element* probabilities;
    explicit Buffers(const Attention& a) {
      static thread_local Scratch scratch;
      const int64_t query_bytes = round_up(a.max_rows_ * a.steps_ * 4, 64), key_bytes = kTile * a.steps_ * 4;
      const int64_t value_bytes = kTile * a.width_ * 4, score_bytes = a.max_rows_ * kTile * 4;
      const int64_t state_bytes = State::floats(a.max_rows_, a.width_) * 4;
      query = (char*)scratch.get(query_bytes + key_bytes + value_bytes + 2 * score_bytes + 2 * state_bytes);
      keys = query + query_bytes;
      values = keys + key_bytes;
      scores = (float*)(values + value_bytes);
      probabilities = (typename On::Element*)((char*)scores + score_bytes);
      state = (float*)((char*)probabilities + score_bytes);
      total = state + state_bytes / 4;
    }
  };

  void clear(const State& state, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) state.top[r] = -INFINITY;
    memset(state.sum, 0, rows * 64);
    memset(state.values, 0, rows * width_ * sizeof(float));
  }

  void load_query(const Work& w, const Buffers& buffers) const {
    for (int64_t t = 0; t < w.tokens; ++t) {
      const int64_t token = args_.query_start[w.request] + w.first + t;
      for (int64_t g = 0; g < group_; ++g) {
        const Q* from = (const Q*)args_.query + token * args_.q_token_stride +
                        (w.kv_head * group_ + g) * args_.q_head_stride;
        auto* to = (typename On::Element*)(buffers.query + (t * group_ + g) * steps_ * 4);
        if constexpr (std::is_same_v<Q, typename On::Element>) {
          memcpy((void*)to, from, args_.dim * sizeof(Q));
          if (args_.dim % On::width) to[args_.dim] = {};
        } else {
          for (int64_t i = 0; i < args_.dim; i += 16)
            store_some(to + i, load_some(from + i, args_.dim - i), args_.dim - i);
        }
      }
    }
  }

  void whole(const Work& w) const {
    const Buffers buffers(*this);
    const int64_t rows = w.tokens * group_;
    const KeyRange keys = key_range(w.request, w.first, w.tokens);
    const int64_t first = keys.begin / kSplit, last = (keys.end + kSplit - 1) / kSplit;
    load_query(w, buffers);
    const State part(buffers.state, rows), total(buffers.total, rows);
    if (last - first == 1) {
      split(w, first, buffers, part);
      return write(w, part);
    }
    clear(total, rows);
    for (int64_t s = first; s < last; ++s) {
      split(w, s, buffers, part);
      merge(total, part, rows, width_);
    }
    write(w, total);
  }

  // The keys of one split, into a fresh state.
  void split(const Work& w, int64_t index, const Buffers& buffers, const State& state) const {
    const int64_t rows = w.tokens * group_;
    const KeyRange keys = key_range(w.request, w.first, w.tokens);
    clear(state, rows);
    const int64_t end = std::min(keys.end, (index + 1) * kSplit);
    for (int64_t start = std::max(index * kSplit, keys.begin / kTile * kTile); start < end; start += kTile)
      tile(w, start, std::max(start, keys.begin), std::min(end, start + kTile), buffers, state);
  }

  // Keys [begin, end) of the tile that starts at `start`.
  void tile(const Work& w, int64_t start, int64_t begin, int64_t end, const Buffers& buffers,
            const State& state) const {
    const int64_t rows = w.tokens * group_, panels = (end - start + 15) / 16;
    const int32_t* blocks = args_.block_table + w.request * args_.block_table_stride;
    const C *keys[kTile], *values[kTile];
    alignas(64) float key_scale[kTile], value_scale[kTile];
    int64_t block = begin / args_.block_size, offset = begin % args_.block_size;
    for (int64_t j = 0; j < panels * 16; ++j) {
      if (start + j < begin || start + j >= end) {
        keys[j] = values[j] = nullptr;
        key_scale[j] = value_scale[j] = 0.0f;
        continue;
      }
      const int64_t b = blocks[block];
      keys[j] = (const C*)args_.k.data + b * args_.k.block_stride + offset * args_.k.slot_stride +
                w.kv_head * args_.k.head_stride;
      values[j] = (const C*)args_.v.data + b * args_.v.block_stride + offset * args_.v.slot_stride +
                  w.kv_head * args_.v.head_stride;
      if (args_.k.scale) {
        key_scale[j] = args_.k.scale[b * args_.k.scale_block_stride + offset * args_.k.scale_slot_stride +
                                     w.kv_head * args_.k.scale_head_stride];
        value_scale[j] = args_.v.scale[b * args_.v.scale_block_stride + offset * args_.v.scale_slot_stride +
                                       w.kv_head * args_.v.scale_head_stride];
      }
      if (++offset == args_.block_size) offset = 0, ++block;
    }
    const int64_t key_panel = steps_ * 64, value_panel = kTile * 4 * 16 / On::width;
    for (int64_t p = 0; p < panels; ++p)
      pack_keys<On>(keys + p * 16, args_.dim, buffers.keys + p * key_panel);
    pack_values<On>(values, panels * 16, args_.dim, value_panel, buffers.values);

    Tile t{steps_, buffers.query, steps_ * 4, buffers.keys, key_panel, buffers.scores, kTile, false, nullptr};
    multiply<typename On::Step>(t, rows, panels, nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t last = position(w.request, w.first + r / group_), first = first_seen(last);
      softmax_row(buffers, state, r, panels, first - start, last - start,
                  args_.k.scale ? key_scale : nullptr, value_scale);
    }
    t = {panels * 16 / On::width, (const char*)buffers.probabilities, kTile * (int64_t)sizeof(typename On::Element),
         buffers.values, value_panel, state.values, width_, true, nullptr};
    multiply<typename On::Step>(t, rows, width_ / 16, nullptr);
  }

  // Scores of a row -> probabilities relative to the new maximum; what was summed before is rescaled to it.
  // Keys first..last of the tile are seen.
  void softmax_row(const Buffers& buffers, const State& state, int64_t r, int64_t panels, int64_t first, int64_t last,
                   const float* key_scale, const float* value_scale) const {
    float* scores = buffers.scores + r * kTile;
    auto* probabilities = buffers.probabilities + r * kTile;
    F16x s[kTile / 16], top = splat(-INFINITY);
    for (int64_t p = 0; p < panels; ++p) {
      s[p] = load16(scores + p * 16) * splat(log2_scale_);
      if (key_scale) s[p] = s[p] * load16(key_scale + p * 16);
      if (p * 16 < first || p * 16 + 15 > last) s[p] = masked(s[p], first - p * 16, last - p * 16);
      top = max(s[p], top);
    }
    const float before = state.top[r], now = std::max(before, lane_max(top));
    const F16x shift = splat(now == -INFINITY ? 0.0f : now);
    F16x sum = load16(state.sum + r * 16);
    if (now != before) {
      const F16x factor = exp2(splat(before) - shift);
      sum = sum * factor;
      for (int64_t c = 0; c < width_; c += 16)
        store16(state.values + r * width_ + c, load16(state.values + r * width_ + c) * factor);
      state.top[r] = now;
    }
    for (int64_t p = 0; p < panels; ++p) {
      F16x e = exp2(s[p] - shift);
      sum = sum + e;
      if (key_scale) e = e * load16(value_scale + p * 16);
      store_probability(probabilities + p * 16, e);
    }
    store16(state.sum + r * 16, sum);
  }

  ATOM_INLINE static F16x masked(F16x x, int64_t first, int64_t last) {
    const int32_t low = int32_t(std::clamp<int64_t>(first, 0, 16)), high = int32_t(std::clamp<int64_t>(last, -1, 15));
    ATOM_EACH {
      RegI lane;
      for (int l = 0; l < kLanes; ++l) lane[l] = i * kLanes + l;
      x.r[i] = (lane >= low) & (lane <= high) ? x.r[i] : -INFINITY - RegF{};
    }
    return x;
  }

  void write(const Work& w, const State& state) const {
    for (int64_t r = 0; r < w.tokens * group_; ++r) {
      const int64_t token = args_.query_start[w.request] + w.first + r / group_;
      Q* out = (Q*)args_.output + token * args_.o_token_stride + (w.kv_head * group_ + r % group_) * args_.o_head_stride;
      const float sum = lane_sum(load16(state.sum + r * 16));
      const F16x factor = splat(sum == 0.0f ? 0.0f : 1.0f / sum);
      for (int64_t c = 0; c < args_.dim; c += 16)
        store_some(out + c, load16(state.values + r * width_ + c) * factor, args_.dim - c);
    }
  }

  const AttentionArgs& args_;
  const Work* items_ = nullptr;
  int64_t group_, width_, steps_, max_rows_ = 0;
  float log2_scale_;
};

template <class On, class Q, class C>
void attend(const AttentionArgs& args, int threads) {
  Attention<On, Q, C>(args).run(threads);
}

}  // namespace

void paged_attention(const AttentionArgs& args, int threads) {
  const bool scaled = args.k.type == DType::f8e4m3;
  if (args.type == DType::f32) {
    scaled ? attend<OnFloat, float, f8>(args, threads) : attend<OnFloat, float, float>(args, threads);
  } else if (args.type == DType::f16) {
    scaled ? attend<OnFloat, f16, f8>(args, threads) : attend<OnFloat, f16, f16>(args, threads);
  } else {
#if defined(ATOM_BF16_DOT)
    using On = OnBF16;
#else
    using On = OnFloat;
#endif
    scaled ? attend<On, bf16, f8>(args, threads) : attend<On, bf16, bf16>(args, threads);
  }
}

}  // namespace atom
