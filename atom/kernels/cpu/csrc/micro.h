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
  const char* prefetch; // one cache line a step is fetched from here; null: the panels' own next lines
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

template <class Step>
ATOM_INLINE void multiply_step(F16x& c, const char* a, F16x b);

constexpr int kPrefetchBytes = 2048;

template <class Step, int MR, int NR, bool kStream>
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
    if constexpr (kStream) {
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) __builtin_prefetch(b + j * panel + kPrefetchBytes, 0, 3);
    } else {
      __builtin_prefetch(prefetch, 0, 2);
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

template <class Step, bool kStream>
struct MicroTable {
  Micro f[kMaxRows + 1][kMaxPanels + 1] = {};
  template <int MR, int NR>
  constexpr void fill() {
    if constexpr (MR <= kMaxRows && NR <= kMaxPanels) {
      f[MR][NR] = micro_kernel<Step, MR, NR, kStream>;
      if constexpr (NR < kMaxPanels) fill<MR, NR + 1>();
      else fill<MR + 1, 1>();
    }
  }
  constexpr MicroTable() { fill<1, 1>(); }
};

// C[rows, panels * 16] (+)= A * B for any size, in register tiles. `next`: the panels used after these.
template <class Step>
ATOM_INLINE void multiply(Tile t, int64_t rows, int64_t panels, const char* next) {
  static constexpr MicroTable<Step, false> resident;
  static constexpr MicroTable<Step, true> streaming;
  const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
  const char *a = t.a, *b = t.b;
  float* c = t.c;
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = rows * (block + 1) / blocks;
    for (int64_t p = 0; p < panels; p += kMaxPanels) {
      const int64_t width = panels - p < kMaxPanels ? panels - p : kMaxPanels;
      t.a = a + row * t.a_stride;
      t.b = b + p * t.panel_bytes;
      t.c = c + row * t.c_stride + p * 16;
      // With enough blocks of rows each fetches one of the next panels; else the first streams ahead.
      if (blocks >= kMaxPanels && next) {
        t.prefetch = block < kMaxPanels ? next + block * t.panel_bytes : t.b;
        resident.f[end - row][width](t);
      } else if (block == 0 && next) {
        streaming.f[end - row][width](t);
      } else {
        t.prefetch = t.b;
        resident.f[end - row][width](t);
      }
    }
    row = end;
  }
}

}  // namespace atom
