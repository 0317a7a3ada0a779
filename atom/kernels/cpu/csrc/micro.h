// Register tiles: C[MR, NR * 16] (+)= A[MR, K] * B, where B is packed in panels of 16 columns.
// Every element is one chain of multiply-adds over K in order, whatever MR and NR are: a row's bits
// don't depend on the rows beside it.
#pragma once
#include "common.h"

namespace atom {

#if defined(ATOM_AVX512)
constexpr int kMaxRows = 6, kMaxPanels = 4;
#else
constexpr int kMaxRows = 6, kMaxPanels = 1;
#endif

struct Tile {
  int64_t steps;        // of K
  const char* a;        // rows of float, or of bf16 pairs with ATOM_BF16_DOT
  int64_t a_stride;     // bytes from row to row
  const char* b;
  int64_t panel_bytes;  // from panel to panel
  float* c;
  int64_t c_stride;     // floats
  bool accumulate;      // else C starts from zero
  const char* prefetch; // what to fetch meanwhile, see Prefetch
};

// How a step of B looks: F32 and F16 have one value a column, BF16 has two (and A two floats or a bf16 pair).
struct StepF32 {
  static constexpr int bytes = 64, a_bytes = 4;
};
struct StepF16 {
  static constexpr int bytes = 32, a_bytes = 4;
};
#if defined(ATOM_BF16_DOT)
struct StepBF16 {
  static constexpr int bytes = 64, a_bytes = 4;
};
#else
struct StepBF16 {
  static constexpr int bytes = 64, a_bytes = 8;
};
#endif

// Every step may fetch a line from each of one or two panels that come later, or its own panels' lines ahead.
enum class Prefetch { none, ahead, one, two };
constexpr int kAheadBytes = 1024;

template <class Step, int MR, int NR, Prefetch kPrefetch>
void micro_kernel(const Tile& t) {
  const int64_t steps = t.steps, a_stride = t.a_stride, panel = t.panel_bytes;
  const char* a = t.a;
  const char* b = t.b;
  const char* prefetch = t.prefetch;
  F16x acc[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = t.accumulate ? load16(t.c + i * t.c_stride + j * 16) : splat(0.0f);

  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kPrefetch == Prefetch::ahead) {
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) __builtin_prefetch(b + j * panel + kAheadBytes, 0, 2);
    } else if constexpr (kPrefetch != Prefetch::none) {
      __builtin_prefetch(prefetch, 0, 2);
      if constexpr (kPrefetch == Prefetch::two) __builtin_prefetch(prefetch + panel, 0, 2);
      prefetch += Step::bytes;
    }
    if constexpr (std::is_same_v<Step, StepBF16>) {
#if defined(ATOM_BF16_DOT)
      __m512bh bv[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) bv[j] = (__m512bh)_mm512_loadu_si512(b + j * panel);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        int32_t pair;
        memcpy(&pair, a + i * a_stride, 4);
        __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) acc[i][j].r[0] = (RegF)_mm512_dpbf16_ps((__m512)acc[i][j].r[0], av, bv[j]);
      }
#else
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        F16x bv[NR];
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) {
          bv[j] = load16((const float*)(b + j * panel));
          ATOM_EACH bv[j].r[i] = (RegF)(half ? (RegI)bv[j].r[i] & int32_t(0xffff0000) : (RegI)bv[j].r[i] << 16);
        }
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          F16x av = splat(((const float*)(a + i * a_stride))[half]);
#pragma GCC unroll 4
          for (int j = 0; j < NR; ++j) acc[i][j] = acc[i][j] + av * bv[j];
        }
      }
#endif
    } else {
      F16x bv[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        if constexpr (std::is_same_v<Step, StepF16>) bv[j] = load16((const f16*)(b + j * panel));
        else bv[j] = load16((const float*)(b + j * panel));
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        F16x av = splat(*(const float*)(a + i * a_stride));
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) acc[i][j] = acc[i][j] + av * bv[j];
      }
    }
    a += Step::a_bytes;
    b += Step::bytes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) store16(t.c + i * t.c_stride + j * 16, acc[i][j]);
}

using Micro = void (*)(const Tile&);

template <class Step, Prefetch kPrefetch, int kPanels = kMaxPanels>
struct MicroTable {
  Micro f[kMaxRows + 1][kPanels + 1] = {};
  template <int MR, int NR>
  constexpr void fill() {
    if constexpr (MR <= kMaxRows) {
      f[MR][NR] = micro_kernel<Step, MR, NR, kPrefetch>;
      if constexpr (NR < kPanels) fill<MR, NR + 1>();
      else fill<MR + 1, 1>();
    }
  }
  constexpr MicroTable() { fill<1, 1>(); }
};

// C[rows, panels * 16] (+)= A * B for any size, in register tiles, from memory that is likely cached.
template <class Step>
ATOM_INLINE void multiply(Tile t, int64_t rows, int64_t panels) {
  static constexpr MicroTable<Step, Prefetch::none> table;
  const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
  const char *a = t.a, *b = t.b;
  float* c = t.c;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = rows * block / blocks, end = rows * (block + 1) / blocks;
    for (int64_t p = 0; p < panels; p += kMaxPanels) {
      t.a = a + row * t.a_stride;
      t.b = b + p * t.panel_bytes;
      t.c = c + row * t.c_stride + p * 16;
      table.f[end - row][panels - p < kMaxPanels ? panels - p : kMaxPanels](t);
    }
  }
}

// The same for up to kMaxPanels panels of weights that come from memory; `next` are the ones used after these.
template <class Step>
ATOM_INLINE void multiply_streaming(Tile t, int64_t rows, int64_t panels, const char* next) {
  const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
  if (kMaxPanels == 1 || blocks == 1) {
    // Panel after panel is one sequential stream, which the hardware fetches best.
    static constexpr MicroTable<Step, Prefetch::ahead, 1> ahead;
    static constexpr MicroTable<Step, Prefetch::none, 1> none;
    const char* a = t.a;
    float* c = t.c;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = rows * block / blocks, end = rows * (block + 1) / blocks;
        t.a = a + row * t.a_stride;
        t.c = c + row * t.c_stride + p * 16;
        (block ? none.f : ahead.f)[end - row][1](t);
      }
      t.b += t.panel_bytes;
    }
    return;
  }
  // The first blocks of rows fetch the next panels, evenly: all four of them with two or more blocks.
  static constexpr MicroTable<Step, Prefetch::none> none;
  static constexpr MicroTable<Step, Prefetch::one> one;
  static constexpr MicroTable<Step, Prefetch::two> two;
  const int64_t each = blocks < kMaxPanels ? 2 : 1;
  const char* a = t.a;
  float* c = t.c;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = rows * block / blocks, end = rows * (block + 1) / blocks;
    t.a = a + row * t.a_stride;
    t.c = c + row * t.c_stride;
    t.prefetch = next + block * each * t.panel_bytes;
    if (block * each >= kMaxPanels) none.f[end - row][panels](t);
    else if (each == 2) two.f[end - row][panels](t);
    else one.f[end - row][panels](t);
  }
}

}  // namespace atom
