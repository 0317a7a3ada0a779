// Causal attention over the paged cache: online softmax (Dao et al. 2022, arXiv 2205.14135) in tiles of keys.
//
// Tiles of kTile keys start at multiples of kTile, and the results of every kSplit keys are merged in order,
// whoever computed them: a query's bits don't depend on its neighbours, its chunk or the number of threads.
// Keys a query doesn't see have probability exactly 0 and change nothing.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "attention_pack.h"
#include "attention_tiles.h"
#include "micro.h"

namespace atom {
namespace {

constexpr int64_t kTile = 64, kSplit = 128, kTileRows = 64;
constexpr int kFewRows = 8;  // a decode has few rows and reads each key once

// How the products are computed: on floats, on bf16 pairs where the machine has the instruction, or by tiles of them.
struct OnFloat {
  using Step = StepF32;
  using Element = float;
  static constexpr int64_t width = 1, rows = 1;  // values a step; what numbers of rows are rounded up to
  static constexpr bool tiles = false;           // whether the cache is tiled
  struct Registers {
    Registers() {}
    void take(int64_t) {}  // that many rows from now on
  };
};
struct OnBF16 : OnFloat {
  using Step = StepBF16;
  using Element = bf16;
  static constexpr int64_t width = 2;
};
#if defined(ATOM_AMX)
struct OnTiles : OnBF16 {
  static constexpr int64_t rows = 16;
  static constexpr bool tiles = true;
  using Registers = RowRegisters<attention_shapes>;
};
#endif

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A run of a request's query tokens, for one KV head or several; a row is a (token, query head of the group).
struct Work {
  int64_t request, head, heads, first, tokens;
  int64_t partial;  // where its splits' results lie in the shared buffer
};

// f(std::integral_constant<int, n>) for n in 1..kMost.
template <int kMost, int N = 1, class F>
ATOM_INLINE void with_constant(int64_t n, F&& f) {
  if (n == N) f(std::integral_constant<int, N>{});
  else if constexpr (N < kMost) with_constant<kMost, N + 1>(n, f);
}

// The running softmax of some rows: maximum, sum in 16 lanes, weighted values.
struct State {
  float *top, *sum, *values;
  static int64_t floats(int64_t rows, int64_t width) { return round_up(rows, 16) + rows * 16 + rows * width; }
  State(float* at, int64_t rows) : top(at), sum(at + round_up(rows, 16)), values(sum + rows * 16) {}
};

#if defined(ATOM_BF16_DOT)
// For a few rows (a decode) packing costs more than the products: the same sums straight from the cache's rows.

// `next` are rows to fetch meanwhile, line by line: a burst of fetches would hold up the arithmetic.
template <class C, int R>
void few_scores(const C* const* keys, const C* const* next, int64_t panels, int64_t dim, const char* query,
                float* scores) {
  const int64_t steps = (dim + 1) / 2;
  for (int64_t p = 0; p < panels; ++p, keys += 16, next += 16) {
    __m512 acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s += 16) {
      __m512i t[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        t[j] = load32(keys[j] + s * 2, dim - s * 2);
        __builtin_prefetch(next[j] + s * 2, 0, 2);
      }
      transpose16(t);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        if (s + j >= steps) break;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t pair;
          memcpy(&pair, query + (r * steps + s + j) * 4, 4);
          acc[r] = _mm512_dpbf16_ps(acc[r], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)t[j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(scores + r * kTile + p * 16, acc[r]);
  }
}

template <class C, int R>
void few_values(const C* const* rows, const C* const* next, int64_t count, int64_t dim, const bf16* probabilities,
                float* values, int64_t width, bool fresh) {
  const __m512i low = interleave_low(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t c = 0; c < dim; c += 32) {
    const bool two = dim - c > 16;
    __m512 acc[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r][0] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(values + r * width + c);
      acc[r][1] = two && !fresh ? _mm512_loadu_ps(values + r * width + c + 16) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < count; k += 2) {
      const __m512i a = load32(rows[k] + c, dim - c), b = load32(rows[k + 1] + c, dim - c);
      __builtin_prefetch(next[k] + c, 0, 2);
      __builtin_prefetch(next[k + 1] + c, 0, 2);
      const __m512bh v0 = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
      const __m512bh v1 = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, probabilities + r * kTile + k, 4);
        const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], p, v0);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], p, v1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(values + r * width + c, acc[r][0]);
      if (two) _mm512_storeu_ps(values + r * width + c + 16, acc[r][1]);
    }
  }
}
#endif

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

// Where a tile's keys and values lie, for head 0: each, or in a tiled cache each group of 16. Keys [begin, end) of it
// are there. `head` is the work's first.
template <class C>
struct TileRows {
  int64_t begin = 0, end = 0, head = 0;
  const C *key[kTile], *value[kTile];
};

template <class On, class Q, class C>
class Attention {
  using Registers = typename On::Registers;

 public:
  // rotary, store: what comes before, if anything.
  Attention(const AttentionArgs& args, const RotaryArgs* rotary, const StoreArgs* store)
      : args_(args), rotary_(rotary), store_(store) {
    group_ = args.heads / args.kv_heads;
    width_ = round_up(args.dim, 16);
    steps_ = (args.dim + On::width - 1) / On::width;
    log2_scale_ = args.scale * 1.44269504088896341f;
  }

  void run(int threads) {
    const int64_t tile_tokens = std::max<int64_t>(1, kTileRows / group_), kv_heads = args_.kv_heads;
    max_rows_ = round_up(tile_tokens * group_, On::rows);
    // A decode that takes all heads at once reads the cache in long runs; with few requests, heads are shared out.
    const bool many = args_.requests >= 4 * threads;
    heads_ = many ? kv_heads : 1;
    static thread_local std::vector<Work> work;
    work.clear();
    int64_t cost = 0;
    for (int64_t r = 0; r < args_.requests; ++r) {
      const int64_t count = args_.query_start[r + 1] - args_.query_start[r];
      // The last tokens see the most: they come first, so that the threads end together.
      for (int64_t end = count; end > 0; end -= tile_tokens) {
        const int64_t first = std::max<int64_t>(0, end - tile_tokens), tokens = end - first;
        const int64_t heads = few(tokens) ? heads_ : 1;
        for (int64_t h = 0; h < kv_heads; h += heads) work.push_back({r, h, heads, first, tokens, 0});
        const KeyRange keys = key_range({r, 0, 1, first, tokens, 0});
        cost += (keys.end - keys.begin) * tokens * args_.heads * args_.dim;
      }
    }
    if (store_ && !(many && joins_store())) {
      if (rotary_) rotary_embedding(*rotary_, threads);
      store_kv(*store_, threads);
      store_ = nullptr;
    }
    if (work.empty()) return;
    if (cost < 16384) threads = 1;
    items_ = work.data();
    const int64_t count = work.size();

    static thread_local std::vector<Part> parts;
    parts.clear();
    if (threads > 1 && heads_ == 1 && count < 4 * threads) {
      int64_t partial = 0;
      for (Work& w : work) {
        const KeyRange keys = key_range(w);
        w.partial = partial;
        for (int64_t s = keys.begin / kSplit; s * kSplit < keys.end; ++s) parts.push_back({&w, s, partial++});
      }
      if (partial <= count || partial * State::floats(max_rows_, width_) > (64 << 20)) parts.clear();
    }
    std::atomic<int64_t> next{0};
    if (parts.empty()) {
      team(threads, [&](int) {
        Registers registers;
        // Known one ahead, so that its first keys can be fetched early.
        int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        while (i < count) {
          const int64_t then = next.fetch_add(1, std::memory_order_relaxed);
          registers.take(items_[i].tokens * group_);
          whole(items_[i], then < count ? items_ + then : nullptr);
          i = then;
        }
      });
      return;
    }
    static thread_local Scratch shared;
    const int64_t floats = State::floats(max_rows_, width_), total = parts.size();
    float* partials = (float*)shared.get(total * floats * sizeof(float));
    const Part* first_part = parts.data();
    std::atomic<int64_t> next_merge{0};
    team(threads, [&](int) {
      Registers registers;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
        const Part& part = first_part[i];
        registers.take(part.work->tokens * group_);
        const Buffers buffers(*this);
        load_query(*part.work, part.work->head, buffers.query);
        split(*part.work, part.index, buffers, partials + part.partial * floats, nullptr);
      }
    });
    team(threads, [&](int) {
      for (int64_t i; (i = next_merge.fetch_add(1, std::memory_order_relaxed)) < count;) {
        const Work& w = items_[i];
        const int64_t rows = w.tokens * group_;
        const KeyRange keys = key_range(w);
        const Buffers buffers(*this);
        const State state(buffers.total, rows);
        clear(state, rows);
        int64_t at = w.partial;
        for (int64_t s = keys.begin / kSplit; s * kSplit < keys.end; ++s)
          merge(state, State(partials + at++ * floats, rows), rows, width_);
        write(w, w.head, state);
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

  // Of many requests, whether whoever attends to one also fills its cache: each has one token, which goes to its end.
  bool joins_store() const {
    if (!On::tiles || !std::is_same_v<C, bf16> || !few(1) ||
        store_->tokens != args_.requests || store_->cache[0].data != args_.k.data ||
        store_->cache[1].data != args_.v.data)
      return false;
    for (int64_t r = 0; r < args_.requests; ++r) {
      const int64_t at = args_.seq_lens[r] - 1, size = args_.block_size;
      if (args_.query_start[r] != r || at < 0) return false;
      const int64_t block = args_.block_table[r * args_.block_table_stride + at / size];
      if (store_->slots[r] != block * size + at % size) return false;
    }
    return args_.query_start[args_.requests] == args_.requests;
  }

  int64_t position(int64_t request, int64_t token) const {
    return args_.seq_lens[request] - (args_.query_start[request + 1] - args_.query_start[request]) + token;
  }
  int64_t first_seen(int64_t position) const {
    return args_.window ? std::max<int64_t>(0, position - args_.window + 1) : 0;
  }
  KeyRange key_range(const Work& w) const {
    const int64_t end = std::max<int64_t>(0, position(w.request, w.first + w.tokens - 1) + 1);
    return {std::min(end, first_seen(position(w.request, w.first))), end};
  }
  bool few(int64_t tokens) const { return tokens * group_ <= kFewRows; }
  int64_t query_bytes() const { return round_up(max_rows_ * steps_ * 4, 64); }
  int64_t state_floats() const { return State::floats(max_rows_, width_); }

  // A thread's own memory; the query and the two states are one a head.
  struct Buffers {
    char *query, *keys, *values, *zeros;
    float *scores, *state, *total;
    typename On::Element* probabilities;
    explicit Buffers(const Attention& a) {
      static thread_local Scratch scratch;
      const int64_t query_bytes = a.heads_ * a.query_bytes(), key_bytes = kTile * a.steps_ * 4;
      const int64_t value_bytes = kTile * a.width_ * 4, score_bytes = a.max_rows_ * kTile * 4;
      const int64_t state_bytes = a.heads_ * a.state_floats() * 4, zero_bytes = a.width_ * 4;
      query = (char*)scratch.get(query_bytes + key_bytes + value_bytes + 2 * score_bytes + 2 * state_bytes +
                                 zero_bytes);
      keys = query + query_bytes;
      values = keys + key_bytes;
      scores = (float*)(values + value_bytes);
      probabilities = (typename On::Element*)((char*)scores + score_bytes);
      state = (float*)((char*)probabilities + score_bytes);
      total = state + state_bytes / 4;
      zeros = (char*)(total + state_bytes / 4);
      memset(zeros, 0, zero_bytes);
    }
  };

  void clear(const State& state, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) state.top[r] = -INFINITY;
    memset(state.sum, 0, rows * 64);
    memset(state.values, 0, rows * width_ * sizeof(float));
  }

  void load_query(const Work& w, int64_t head, char* query) const {
    for (int64_t t = 0; t < w.tokens; ++t) {
      const int64_t token = args_.query_start[w.request] + w.first + t;
      for (int64_t g = 0; g < group_; ++g) {
        const Q* from = (const Q*)args_.query + token * args_.q_token_stride +
                        (head * group_ + g) * args_.q_head_stride;
        auto* to = (typename On::Element*)(query + (t * group_ + g) * steps_ * 4);
        if constexpr (std::is_same_v<Q, typename On::Element>) {
          memcpy((void*)to, from, args_.dim * sizeof(Q));
          if (steps_ * On::width > args_.dim)
            memset((void*)(to + args_.dim), 0, (steps_ * On::width - args_.dim) * sizeof(Q));
        } else {
          for (int64_t i = 0; i < args_.dim; i += 16)
            store_some(to + i, load_some(from + i, args_.dim - i), args_.dim - i);
        }
      }
    }
  }

  void whole(const Work& w, const Work* following) const {
    const Buffers buffers(*this);
    const int64_t rows = w.tokens * group_, floats = state_floats();
    const KeyRange keys = key_range(w);
    const int64_t first = keys.begin / kSplit, last = (keys.end + kSplit - 1) / kSplit;
    const bool one = last - first == 1;
    if (store_ && rotary_) rotate_token(*rotary_, w.request);
    for (int64_t h = 0; h < w.heads; ++h) {
      load_query(w, w.head + h, buffers.query + h * query_bytes());
      if (!one) clear(State(buffers.total + h * floats, rows), rows);
    }
    for (int64_t s = first; s < last; ++s) {
      split(w, s, buffers, buffers.state, following);
      for (int64_t h = 0; h < w.heads && !one; ++h)
        merge(State(buffers.total + h * floats, rows), State(buffers.state + h * floats, rows), rows, width_);
    }
    for (int64_t h = 0; h < w.heads; ++h)
      write(w, w.head + h, State((one ? buffers.state : buffers.total) + h * floats, rows));
  }

  // The keys of one split, into fresh states, one a head. `following` is the work after this, if known.
  void split(const Work& w, int64_t index, const Buffers& buffers, float* states, const Work* following) const {
    const int64_t rows = w.tokens * group_;
    const KeyRange keys = key_range(w);
    const int64_t end = std::min(keys.end, (index + 1) * kSplit);
    TileRows<C> rows_now, rows_next;
    const int64_t first = std::max(index * kSplit, keys.begin / kTile * kTile);
    if (first >= end)
      for (int64_t h = 0; h < w.heads; ++h) clear(State(states + h * state_floats(), rows), rows);
    else locate(w, first, rows_now);
    for (int64_t start = first; start < end; start += kTile) {
      rows_next.begin = rows_next.end = 0;
      if (start + kTile < keys.end) locate(w, start + kTile, rows_next);
      else if (following)
        locate(*following, key_range(*following).begin / kTile * kTile, rows_next);
      for (int64_t h = 0; h < w.heads; ++h) {
        const bool last = h + 1 == w.heads;
        const Next next{last ? rows_next : rows_now, last ? rows_next.head : w.head + h + 1};
        tile(w, h, start, start == first, rows_now, next, buffers, buffers.query + h * query_bytes(),
             State(states + h * state_floats(), rows));
      }
      rows_now = rows_next;
    }
  }

  void locate(const Work& w, int64_t start, TileRows<C>& rows) const {
    const KeyRange keys = key_range(w);
    const int32_t* blocks = args_.block_table + w.request * args_.block_table_stride;
    const int64_t begin = std::max(start, keys.begin), end = std::min(start + kTile, keys.end);
    const int64_t size = args_.block_size;
    if constexpr (On::tiles) {
      for (int64_t at = begin / kGroupSlots * kGroupSlots; at < end; at += kGroupSlots) {
        const int64_t block = blocks[at / size], group = (at - start) / kGroupSlots;
        const int64_t offset = group_offset(at % size, 0, args_.kv_heads, args_.dim);
        rows.key[group] = (const C*)args_.k.data + block * args_.k.block_stride + offset;
        rows.value[group] = (const C*)args_.v.data + block * args_.v.block_stride + offset;
      }
    } else for (int64_t at = begin; at < end;) {  // runs of keys in one block
      const int64_t block = blocks[at / size], offset = at % size, count = std::min(end - at, size - offset);
      const C* key = (const C*)args_.k.data + block * args_.k.block_stride + offset * args_.k.slot_stride;
      const C* value = (const C*)args_.v.data + block * args_.v.block_stride + offset * args_.v.slot_stride;
      for (int64_t i = 0; i < count; ++i) {
        rows.key[at - start + i] = key + i * args_.k.slot_stride;
        rows.value[at - start + i] = value + i * args_.v.slot_stride;
      }
      at += count;
    }
    rows.head = w.head;
    rows.begin = begin - start;
    rows.end = std::max(begin, end) - start;
  }

  void fetch(const TileRows<C>& rows, int64_t head, int64_t from) const {
    for (int64_t j = std::max(from, rows.begin); j < rows.end; ++j)
      for (int64_t c = 0; c < args_.dim; c += 64 / (int64_t)sizeof(C)) {
        __builtin_prefetch(rows.key[j] + head * args_.k.head_stride + c, 0, 2);
        __builtin_prefetch(rows.value[j] + head * args_.v.head_stride + c, 0, 2);
      }
  }

  // A head's rows of a tile; zeros where the tile has none.
  void head_rows(const TileRows<C>& rows, int64_t head, int64_t panels, const char* zeros, const C** keys,
                 const C** values) const {
    for (int64_t j = 0; j < panels * 16; ++j) keys[j] = values[j] = (const C*)zeros;
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      keys[j] = rows.key[j] + head * args_.k.head_stride;
      values[j] = rows.value[j] + head * args_.v.head_stride;
    }
  }

  void scales(const Work& w, const Cache& cache, int64_t head, int64_t start, const TileRows<C>& rows,
              float* out) const {
    memset(out, 0, kTile * sizeof(float));
    const int32_t* blocks = args_.block_table + w.request * args_.block_table_stride;
    for (int64_t j = rows.begin; j < rows.end; ++j)
      out[j] = cache.scale[blocks[(start + j) / args_.block_size] * cache.scale_block_stride +
                           (start + j) % args_.block_size * cache.scale_slot_stride + head * cache.scale_head_stride];
  }

  // What is read after a head's rows of a tile.
  struct Next {
    const TileRows<C>& rows;
    int64_t head;
  };

  // The share of the work's head h in the tile that starts at key `start`; what comes next is fetched meanwhile.
  // fresh: it is the first of its state, which holds nothing yet.
  void tile(const Work& w, int64_t h, int64_t start, bool fresh, const TileRows<C>& rows_now, Next next,
            const Buffers& buffers, const char* query, const State& state) const {
    const int64_t rows = w.tokens * group_, panels = (rows_now.end + 15) / 16;
    const int64_t head = w.head + h;
    alignas(64) float key_scale[kTile], value_scale[kTile];
    if (args_.k.scale) {
      scales(w, args_.k, head, start, rows_now, key_scale);
      scales(w, args_.v, head, start, rows_now, value_scale);
    }
    const auto weigh = [&] { softmax(w, start, panels, fresh, buffers, state, key_scale, value_scale); };
#if defined(ATOM_AMX)
    if constexpr (On::tiles) {
      const bool newest = store_ && start + rows_now.end == args_.seq_lens[w.request];
      return groups(rows, head, fresh, rows_now, newest ? w.request : -1, next, buffers, query, state, weigh);
    }
#endif
    const C *keys[kTile], *values[kTile];
    head_rows(rows_now, head, panels, buffers.zeros, keys, values);
#if defined(ATOM_BF16_DOT)
    if constexpr (std::is_same_v<On, OnBF16>) {
      if (few(w.tokens)) {
        const C *next_keys[kTile], *next_values[kTile];
        head_rows(next.rows, next.head, kTile / 16, buffers.zeros, next_keys, next_values);
        with_constant<kFewRows>(rows, [&](auto r) {
          few_scores<C, r()>(keys, next_keys, panels, args_.dim, query, buffers.scores);
        });
        weigh();
        with_constant<kFewRows>(rows, [&](auto r) {
          few_values<C, r()>(values, next_values, panels * 16, args_.dim, buffers.probabilities, state.values, width_,
                             fresh);
        });
        return fetch(next.rows, next.head, panels * 16);
      }
    }
#endif
    const int64_t key_panel = steps_ * 64, value_panel = kTile * 4 * 16 / On::width;
    for (int64_t p = 0; p < panels; ++p)
      pack_keys<On::width>(keys + p * 16, args_.dim, steps_, buffers.keys + p * key_panel);
    pack_values<On::width>(values, panels * 16, args_.dim, value_panel, buffers.values);
    fetch(next.rows, next.head, 0);
    multiply<typename On::Step>({steps_, query, steps_ * 4, buffers.keys, key_panel, buffers.scores, kTile, false,
                                 nullptr}, rows, panels);
    weigh();
    multiply<typename On::Step>({panels * 16 / On::width, (const char*)buffers.probabilities,
                                 kTile * (int64_t)sizeof(typename On::Element), buffers.values, value_panel,
                                 state.values, width_, !fresh, nullptr}, rows, width_ / 16);
  }

#if defined(ATOM_AMX)
  // The same over the groups of a tiled cache. Its last slot is for the token number `token`, if that is not negative.
  template <class F>
  ATOM_INLINE void groups(int64_t rows, int64_t head, bool fresh, const TileRows<C>& now, int64_t token, Next next,
                          const Buffers& buffers, const char* query, const State& state,
                          F&& weigh) const {
    constexpr int64_t kGroups = kTile / kGroupSlots;
    const int64_t size = kGroupSlots * args_.dim, bytes = size * 2;
    const int64_t first = now.begin / kGroupSlots, last = (now.end + kGroupSlots - 1) / kGroupSlots;
    const char *keys[kGroups], *values[kGroups];
    FetchAhead fetch(size * sizeof(C));
    for (int64_t g = next.rows.begin / kGroupSlots; g * kGroupSlots < next.rows.end; ++g) {
      fetch.add(next.rows.key[g] + next.head * size);
      fetch.add(next.rows.value[g] + next.head * size);
    }
    for (int64_t g = first; g < last; ++g) {
      keys[g] = (const char*)(now.key[g] + head * size);
      values[g] = (const char*)(now.value[g] + head * size);
      if constexpr (!std::is_same_v<C, bf16>) {
        widen((const C*)keys[g], size, buffers.keys + g * bytes);
        widen((const C*)values[g], size, buffers.values + g * bytes);
        keys[g] = buffers.keys + g * bytes;
        values[g] = buffers.values + g * bytes;
      }
      const int64_t from = now.begin - g * kGroupSlots, to = now.end - g * kGroupSlots;
      if constexpr (std::is_same_v<C, bf16>)
        if (token >= 0 && to <= kGroupSlots) {
          const auto source = [&](int which) {
            return (const bf16*)store_->source[which] + token * store_->token_stride[which] +
                   head * store_->head_stride[which];
          };
          put_key_and_copy(source(0), to - 1, args_.dim, (bf16*)keys[g], buffers.keys + g * bytes);
          put_value_and_copy(source(1), from, to - 1, args_.dim, (bf16*)values[g], buffers.values + g * bytes);
          keys[g] = buffers.keys + g * bytes;
          values[g] = buffers.values + g * bytes;
          continue;
        }
      if (from > 0 || to < kGroupSlots) {
        clean_values(values[g], from, to, args_.dim, buffers.values + g * bytes);
        values[g] = buffers.values + g * bytes;
      }
    }
    for (int64_t r = 0; r < rows; r += 16)
      tile_scores(query + r * args_.dim * 2, args_.dim, keys, first, last, buffers.scores + r * kTile, kTile, fetch);
    weigh();
    for (int64_t r = 0; r < rows; r += 16)
      tile_values((const char*)(buffers.probabilities + r * kTile), kTile, values, first, last,
                  state.values + r * width_, args_.dim, fresh, fetch);
    fetch.some(kTile);
  }
#endif

  void softmax(const Work& w, int64_t start, int64_t panels, bool fresh, const Buffers& buffers, const State& state,
               const float* key_scale, const float* value_scale) const {
    for (int64_t t = 0, r = 0; t < w.tokens; ++t) {
      const int64_t last = position(w.request, w.first + t), first = first_seen(last);
      // Panels after the last key that is seen have probability 0.
      const int64_t seen = std::clamp<int64_t>((last - start) / 16 + 1, 1, panels), end = r + group_;
      with_constant<kTile / 16>(seen, [&](auto n) {
        for (; r < end; ++r) {
          softmax_row<n()>(fresh, buffers, state, r, first - start, last - start, key_scale, value_scale);
          for (int64_t p = n(); p < panels; ++p) store16(buffers.probabilities + r * kTile + p * 16, splat(0.0f));
        }
      });
    }
  }

  // Scores of a row -> probabilities relative to the new maximum; what was summed before is rescaled to it.
  // Keys first..last of the tile are seen.
  template <int kPanels>
  ATOM_INLINE void softmax_row(bool fresh, const Buffers& buffers, const State& state, int64_t r, int64_t first,
                               int64_t last, const float* key_scale, const float* value_scale) const {
    constexpr bool scaled = std::is_same_v<C, f8>;
    float* scores = buffers.scores + r * kTile;
    auto* probabilities = buffers.probabilities + r * kTile;
    F16x s[kPanels], top = splat(-INFINITY);
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      s[p] = load16(scores + p * 16) * splat(log2_scale_);
      if constexpr (scaled) s[p] = s[p] * load16(key_scale + p * 16);
      if (p * 16 < first || p * 16 + 15 > last) s[p] = masked(s[p], first - p * 16, last - p * 16);
      top = max(s[p], top);
    }
    const float before = fresh ? -INFINITY : state.top[r], now = std::max(before, lane_max(top));
    const F16x shift = splat(now == -INFINITY ? 0.0f : now);
    F16x sum = fresh ? splat(0.0f) : load16(state.sum + r * 16);
    if (fresh) {
      state.top[r] = now;
    } else if (now != before) {
      const F16x factor = exp2(splat(before) - shift);
      sum = sum * factor;
      for (int64_t c = 0; c < width_; c += 16)
        store16(state.values + r * width_ + c, load16(state.values + r * width_ + c) * factor);
      state.top[r] = now;
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      F16x e = exp2(s[p] - shift);
      sum = sum + e;
      if constexpr (scaled) e = e * load16(value_scale + p * 16);
      store16(probabilities + p * 16, e);
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

  void write(const Work& w, int64_t head, const State& state) const {
    for (int64_t r = 0; r < w.tokens * group_; ++r) {
      const int64_t token = args_.query_start[w.request] + w.first + r / group_;
      Q* out = (Q*)args_.output + token * args_.o_token_stride + (head * group_ + r % group_) * args_.o_head_stride;
      const float sum = lane_sum(load16(state.sum + r * 16));
      const F16x factor = splat(sum == 0.0f ? 0.0f : 1.0f / sum);
      for (int64_t c = 0; c < args_.dim; c += 16)
        store_some(out + c, load16(state.values + r * width_ + c) * factor, args_.dim - c);
    }
  }

  const AttentionArgs& args_;
  const RotaryArgs* rotary_;
  const StoreArgs* store_;
  const Work* items_ = nullptr;
  int64_t group_, width_, steps_, max_rows_ = 0, heads_ = 1;
  float log2_scale_;
};

void attend(const RotaryArgs* rotary, const StoreArgs* store, const AttentionArgs& args, int threads) {
  const auto by = [&](auto on, auto query) {
    using On = decltype(on);
    using Q = decltype(query);
    if (args.k.type == DType::f8e4m3) Attention<On, Q, f8>(args, rotary, store).run(threads);
    else Attention<On, Q, Q>(args, rotary, store).run(threads);
  };
  if (args.type == DType::f32) return by(OnFloat{}, float{});
  if (args.type == DType::f16) return by(OnFloat{}, f16{});
#if defined(ATOM_AMX)
  if (is_tiled(args.type, args.k, args.block_size, args.kv_heads, args.dim)) return by(OnTiles{}, bf16{});
#endif
#if defined(ATOM_BF16_DOT)
  by(OnBF16{}, bf16{});
#else
  by(OnFloat{}, bf16{});
#endif
}

}  // namespace

void paged_attention(const AttentionArgs& args, int threads) { attend(nullptr, nullptr, args, threads); }

void paged_attention(const RotaryArgs* rotary, const StoreArgs& store, const AttentionArgs& args, int threads) {
  attend(rotary, &store, args, threads);
}

}  // namespace atom
