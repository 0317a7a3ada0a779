// Where the tile registers do attention, a cache block holds its keys and values as those read them: in groups of 16
// slots, a group's heads one after another, each
//   keys   [dim / 2][16 slots][2]: a step of K is two dimensions, a column is a slot;
//   values [dim / 16][8][16][2]: a panel of 16 dimensions, whose step is two slots.
// Nothing outside the C++ kernels looks into a cache. Scales lie as everywhere.
#pragma once
#include "amx.h"

namespace atom {

constexpr int64_t kGroupSlots = 16;

// Whether a model of `type` keeps this cache so.
inline bool is_tiled(DType type, const Cache& cache, int64_t block_size, int64_t heads, int64_t dim) {
  return has_tiles() && type == DType::bf16 && dim % 32 == 0 && block_size % kGroupSlots == 0 &&
         cache.head_stride == dim && cache.slot_stride == heads * dim;
}

// Elements from the start of a block to a head of the group that holds `slot`.
inline int64_t group_offset(int64_t slot, int64_t head, int64_t heads, int64_t dim) {
  return (slot / kGroupSlots * heads + head) * kGroupSlots * dim;
}

template <class T>
void put_key(const T* from, T* group, int64_t slot, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 2) memcpy((void*)(group + (d * 16 + slot * 2)), from + d, 2 * sizeof(T));
}
template <class T>
void put_value(const T* from, T* group, int64_t slot, int64_t dim) {
  T* to = group + slot / 2 * 32;
#if defined(ATOM_AVX512)
  if constexpr (sizeof(T) == 2) {  // a line at once, of which every second value is left as it is
    const __mmask32 mine = 0x55555555u << slot % 2;
    for (int64_t d = 0; d < dim; d += 16, to += 256) {
      const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + d)));
      _mm512_mask_storeu_epi16((void*)to, mine, _mm512_sllv_epi32(pairs, _mm512_set1_epi32(slot % 2 * 16)));
    }
    return;
  }
#endif
  for (int64_t d = 0; d < dim; ++d) to[d / 16 * 256 + d % 16 * 2 + slot % 2] = from[d];
}

}  // namespace atom
