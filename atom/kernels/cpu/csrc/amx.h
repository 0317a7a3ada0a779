// Matrix products on the tile registers of Intel's AMX, for packed bf16 weights.
// A K tile is 16 steps: each element sums the even and the odd ones by themselves, then adds both to what it holds.
// That order is the hardware's, whatever rows share the tile: a row's bits don't depend on the rows beside it.
#pragma once
#include <algorithm>

#include "micro.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(ATOM_BF16_DOT) && defined(__linux__)
#define ATOM_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace atom {

#if defined(ATOM_AMX)
constexpr int64_t kStepsOfTile = 16;  // a tile holds 16 rows of 64 bytes

// Linux gives the tile registers to processes that ask.
inline bool has_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

struct StepAMX {
  static constexpr int bytes = 64, a_bytes = 4;
};

// Tiles 0..3 hold C, 4 and 5 rows of A, 6 and 7 panels of B.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileShapes(int first, int second) {
    const int of[8] = {first, first, second, second, first, second, 16, 16};
    for (int i = 0; i < 8; ++i) rows[i] = of[i], row_bytes[i] = of[i] ? 64 : 0;
  }
};

// The registers, configured as long as this lives. Intrinsics don't tell the compiler that they touch memory.
class TileRegisters {
 public:
  TileRegisters(int first, int second) : shapes_(first, second) {
    barrier();
    _tile_loadconfig(&shapes_);
  }
  ~TileRegisters() {
    _tile_release();
    barrier();
  }
  void reshape(int first, int second) {
    shapes_ = TileShapes(first, second);
    _tile_loadconfig(&shapes_);
  }
  ATOM_INLINE static void barrier() { asm volatile("" ::: "memory"); }

 private:
  TileShapes shapes_;
};

// C[R * 16, P * 16] (+)= A * B for one or two tiles of rows and one or two panels; every K tile fetches `lines` cache
// lines from `fetch` on.
template <int R, int P>
ATOM_INLINE void tile_product(const Tile& t, const char* a, const char* b, float* c, const char* fetch, int lines) {
  const int64_t c_bytes = t.c_stride * 4;
  const char* a1 = a + 16 * t.a_stride;
  float* c1 = c + 16 * t.c_stride;
  if (t.accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (P == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (R == 2) _tile_loadd(2, c1, c_bytes);
    if constexpr (R == 2 && P == 2) _tile_loadd(3, c1 + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (P == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && P == 2) _tile_zero(3);
  }
  for (int64_t s = 0; s < t.steps; s += kStepsOfTile) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, t.a_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) {
      _tile_loadd(5, a1, t.a_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    for (int i = 0; i < lines; ++i, fetch += 64) __builtin_prefetch(fetch, 0, 2);
    if constexpr (P == 2) {
      _tile_loadd(7, b + t.panel_bytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
    }
    a += 64, a1 += 64, b += 1024;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (P == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (R == 2) _tile_stored(2, c1, c_bytes);
  if constexpr (R == 2 && P == 2) _tile_stored(3, c1 + 16, c_bytes);
}

// The same where the numbers of row tiles and panels, one or two each, are known only now.
ATOM_INLINE void tile_product(bool two_rows, bool two_panels, const Tile& t, const char* a, const char* b, float* c,
                              const char* fetch, int lines) {
  if (two_panels) two_rows ? tile_product<2, 2>(t, a, b, c, fetch, lines) : tile_product<1, 2>(t, a, b, c, fetch, lines);
  else two_rows ? tile_product<2, 1>(t, a, b, c, fetch, lines) : tile_product<1, 1>(t, a, b, c, fetch, lines);
}

// `multiply` of micro.h, with registers configured for 16 rows: A and C must have room for rows rounded up to 16.
template <>
ATOM_INLINE void multiply<StepAMX>(Tile t, int64_t rows, int64_t panels) {
  TileRegisters::barrier();
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t p = 0; p < panels; p += 2)
      tile_product(rows - row > 16, panels - p > 1, t, t.a + row * t.a_stride, t.b + p * t.panel_bytes,
                   t.c + row * t.c_stride + p * 16, nullptr, 0);
  TileRegisters::barrier();
}

// `multiply_streaming` of micro.h.
template <>
ATOM_INLINE void multiply_streaming<StepAMX>(Tile t, int64_t rows, int64_t panels, const char* next) {
  if (rows <= 16) {
    // Reading the weights is what takes the time: one sequential stream.
    const TileRegisters registers(rows, 0);
    for (int64_t p = 0; p < panels; ++p) {
      const char* b = t.b + p * t.panel_bytes;
      tile_product<1, 1>(t, t.a, b, t.c + p * 16, b + 4 * kAheadBytes, 16);
    }
    return;
  }
  const int64_t blocks = (rows + 31) / 32, lines = (32 + blocks - 1) / blocks;
  int64_t shape = std::min<int64_t>(rows, 32);
  TileRegisters registers(16, shape - 16);
  for (int64_t p = 0; p < panels; p += 2) {
    const char* b = t.b + p * t.panel_bytes;
    const char* fetch = p + 2 < panels ? b + 2 * t.panel_bytes : next;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = block * 32, count = std::min<int64_t>(rows - row, 32);
      if (shape != count) {
        registers.reshape(std::min<int64_t>(count, 16), std::max<int64_t>(count - 16, 0));
        shape = count;
      }
      const bool whole = count > 16 && panels - p > 1;  // the others are few: they fetch nothing
      tile_product(count > 16, panels - p > 1, t, t.a + row * t.a_stride, b, t.c + row * t.c_stride + p * 16,
                   fetch + block * lines * 64 * (t.steps / 16), whole ? lines : 0);
    }
  }
}
#else
inline bool has_tiles() { return false; }
#endif

}  // namespace atom
