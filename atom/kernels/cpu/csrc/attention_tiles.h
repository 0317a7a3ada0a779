// The two products of attention by tile registers, over the groups of 16 slots of a tiled cache.
// Sums are in the hardware's order, group after group, whatever rows share a tile.
#pragma once
#include "tiled_cache.h"

namespace atom {

#if defined(ATOM_AMX)
// 0 to 3: results, 4 and 5: rows of queries and probabilities, 6 and 7: keys and values of a group.
inline TileShapes attention_shapes(int height) {
  TileShapes shapes(height);
  shapes.set(5, height, 32);
  shapes.set(7, 8);
  return shapes;
}

// The intrinsics want a register's number as it is written.
template <int T>
struct Result;
#define ATOM_RESULT(T)                                                                         \
  template <>                                                                                  \
  struct Result<T> {                                                                           \
    ATOM_INLINE static void zero() { _tile_zero(T); }                                          \
    ATOM_INLINE static void load(const float* p, int64_t bytes) { _tile_loadd(T, p, bytes); }  \
    ATOM_INLINE static void store(float* p, int64_t bytes) { _tile_stored(T, p, bytes); }      \
    ATOM_INLINE static void add_scores() { _tile_dpbf16ps(T, 4, 6); }                          \
    ATOM_INLINE static void add_values() { _tile_dpbf16ps(T, 5, 7); }                          \
  };
ATOM_RESULT(0)
ATOM_RESULT(1)
ATOM_RESULT(2)
ATOM_RESULT(3)

// f(Result<i>, i) for i in first..last-1, within 0..3.
template <class F>
ATOM_INLINE void each_result(int64_t first, int64_t last, F&& f) {
  if (first <= 0 && last > 0) f(Result<0>{}, 0);
  if (first <= 1 && last > 1) f(Result<1>{}, 1);
  if (first <= 2 && last > 2) f(Result<2>{}, 2);
  if (first <= 3 && last > 3) f(Result<3>{}, 3);
}

// What to fetch meanwhile: the groups read next, all of them line by line in turn. Memory answers eight streams into
// the L1 cache a fifth faster than one after another into the L2 cache.
class FetchAhead {
 public:
  ATOM_INLINE explicit FetchAhead(int64_t group_bytes) : end_(group_bytes) {}
  ATOM_INLINE void add(const void* group) { streams_[count_++] = (const char*)group; }  // its keys or values
  ATOM_INLINE void some(int lines) {
    for (; lines > 0 && at_ < end_; --lines, at_ += 64)
      for (int i = 0; i < count_; ++i) __builtin_prefetch(streams_[i] + at_, 0, 3);
  }

 private:
  const char* streams_[8];
  int count_ = 0;
  int64_t at_ = 0, end_;
};

// Scores of a tile of rows, `stride` floats apart, with groups first..last-1; queries are dim bf16 each, contiguous.
ATOM_INLINE void tile_scores(const char* queries, int64_t dim, const char* const* keys, int64_t first, int64_t last,
                             float* scores, int64_t stride, FetchAhead& next) {
  TileRegisters::barrier();
  each_result(first, last, [](auto result, int) { result.zero(); });
  for (int64_t s = 0; s < dim / 32; ++s) {
    _tile_loadd(4, queries + s * 64, dim * 2);
    each_result(first, last, [&](auto result, int g) {
      _tile_loadd(6, keys[g] + s * 1024, 64);
      result.add_scores();
      next.some(2);
    });
  }
  each_result(first, last, [&](auto result, int g) { result.store(scores + g * 16, stride * 4); });
  TileRegisters::barrier();
}

// sums [rows][dim] += probabilities of groups first..last-1 (bf16 rows, `stride` apart) times their values; `fresh`
// sums hold nothing yet.
ATOM_INLINE void tile_values(const char* probabilities, int64_t stride, const char* const* values, int64_t first,
                             int64_t last, float* sums, int64_t dim, bool fresh, FetchAhead& next) {
  TileRegisters::barrier();
  for (int64_t panel = 0; panel < dim / 16; panel += 4) {
    const int64_t panels = std::min<int64_t>(4, dim / 16 - panel);
    each_result(0, panels, [&](auto result, int p) {
      fresh ? result.zero() : result.load(sums + (panel + p) * 16, dim * 4);
    });
    for (int64_t g = first; g < last; ++g) {
      _tile_loadd(5, probabilities + g * 32, stride * 2);
      each_result(0, panels, [&](auto result, int p) {
        _tile_loadd(7, values[g] + (panel + p) * 512, 64);
        result.add_values();
        next.some(1);
      });
    }
    each_result(0, panels, [&](auto result, int p) { result.store(sums + (panel + p) * 16, dim * 4); });
  }
  TileRegisters::barrier();
}

// A group of a float8 cache as bf16, exactly.
inline void widen(const f8* from, int64_t count, char* to) {
  for (int64_t i = 0; i < count; i += 32) _mm512_storeu_si512(to + i * 2, load32(from + i, 32));
}

// Slots first..last-1 of a group's values; zeros for the others, which may hold anything.
inline void clean_values(const char* from, int64_t first, int64_t last, int64_t dim, char* to) {
  for (int64_t step = 0; step < 8; ++step) {
    const bool even = 2 * step >= first && 2 * step < last, odd = 2 * step + 1 >= first && 2 * step + 1 < last;
    const __mmask32 keep = (even ? 0x55555555u : 0u) | (odd ? 0xaaaaaaaau : 0u);
    for (int64_t panel = 0; panel < dim / 16; ++panel) {
      const int64_t at = panel * 512 + step * 64;
      _mm512_storeu_si512(to + at, _mm512_maskz_loadu_epi16(keep, from + at));
    }
  }
}

// A decode's key goes into its group, in the cache and in a copy of the group that can be read at once: tile loads would
// wait for the single stores of 4 bytes a line.
inline void put_key_and_copy(const bf16* key, int64_t slot, int64_t dim, bf16* group, char* copy) {
  const __mmask16 mine = __mmask16(1u << slot);
  for (int64_t d = 0; d < dim; d += 2, group += 32, copy += 64) {
    int32_t pair;
    memcpy(&pair, key + d, 4);
    const __m512i line = _mm512_mask_set1_epi32(_mm512_loadu_si512(group), mine, pair);
    _mm512_storeu_si512(group, line);
    _mm512_storeu_si512(copy, line);
  }
}

// The same of a value. Slots from `first` on are in the copy, zeros for all others.
inline void put_value_and_copy(const bf16* value, int64_t first, int64_t slot, int64_t dim, bf16* group, char* copy) {
  clean_values((const char*)group, first, slot, dim, copy);
  put_value(value, (bf16*)copy, slot, dim);
  put_value(value, group, slot, dim);
}
#endif

}  // namespace atom
