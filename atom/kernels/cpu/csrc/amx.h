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

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int count, int bytes = 64) { rows[tile] = count, row_bytes[tile] = count ? bytes : 0; }
  // Tiles 0..3 hold C, 4 and 5 rows of A, 6 and 7 panels of B.
  explicit TileShapes(int height) {
    for (int i = 0; i < 8; ++i) set(i, i < 6 ? height : 16);
  }
};
inline TileShapes product_shapes(int height) { return TileShapes(height); }

// The registers, configured as long as this lives. Intrinsics don't tell the compiler that they touch memory.
class TileRegisters {
 public:
  explicit TileRegisters(const TileShapes& shapes) : shapes_(shapes) {
    barrier();
    _tile_loadconfig(&shapes_);
  }
  ~TileRegisters() {
    _tile_release();
    barrier();
  }
  void reshape(const TileShapes& shapes) {
    shapes_ = shapes;
    barrier();
    _tile_loadconfig(&shapes_);
  }
  ATOM_INLINE static void barrier() { asm volatile("" ::: "memory"); }

 private:
  TileShapes shapes_;
};

// The same for tiles of up to 16 rows, in the shapes that kShapes gives for their height. A change of shape takes as
// long as a sixth of a product.
template <TileShapes (*kShapes)(int height)>
class RowRegisters {
 public:
  void take(int64_t rows) {  // that many from now on, in tiles
    const int height = int(std::min<int64_t>(rows, 16));
    if (height != height_) registers_.reshape(kShapes(height_ = height));
  }
  int64_t height() const { return height_; }

 private:
  int height_ = 16;
  TileRegisters registers_{kShapes(16)};
};

// What every K tile of a product fetches: the next lines of each of kStreams streams, which begin `stride` bytes apart.
// The hardware runs ahead of a stream: memory answers eight faster than one.
constexpr int kStreams = 8;
struct Fetch {
  int lines = 0;  // of each stream
  int64_t stride = 0;
};

// C[R * 16, P * 16] (+)= A * B for one or two tiles of rows and one or two panels; the second tile begins `second` rows
// after the first. t.prefetch is where the first stream begins; one tile of rows and one panel have only that. A stays
// in the L1 cache, as B is read past it.
// A register is loaded again as soon as its products are given out: where another thread of the core takes its share,
// loads and products add up unless they lie far apart, and what stands between them must be short.
// beside() does a little of something else, which the vector units have time for; it is called for every K tile but one.
template <int R, int P, class Beside>
__attribute__((noinline)) void tile_product(const Tile& t, int64_t second, Fetch fetched, Beside& beside) {
  const int64_t c_bytes = t.c_stride * 4, a_stride = t.a_stride;
  const char *a = t.a, *b = t.b, *ahead = t.prefetch, *a1 = a + second * a_stride, *b1 = b + t.panel_bytes;
  float *c = t.c, *c1 = c + 16 * t.c_stride;
  Beside own = beside;  // where no store can change it
  constexpr int kHalf = R * P == 1 ? 1 : kStreams / 2;
  const auto fetch = [&](int first) {
    for (int i = 0; i < fetched.lines; ++i)
      for (int j = first; j < first + kHalf; ++j) __builtin_prefetch(ahead + i * 64 + j * fetched.stride, 0, 2);
  };
  TileRegisters::barrier();
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
  _tile_stream_loadd(6, b, 64);
  _tile_loadd(4, a, a_stride);
  if constexpr (R == 2) _tile_loadd(5, a1, a_stride);
  if constexpr (P == 2) _tile_stream_loadd(7, b1, 64);
  for (int64_t left = t.steps - kStepsOfTile; left > 0; left -= kStepsOfTile) {
    a += 64, a1 += 64, b += 1024, b1 += 1024;
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
    _tile_stream_loadd(6, b, 64);
    fetch(0);
    if constexpr (P == 2) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, a, a_stride);
    own();
    if constexpr (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
    if constexpr (P == 2) _tile_stream_loadd(7, b1, 64);
    if constexpr (R * P > 1) fetch(kHalf);
    if constexpr (R == 2) _tile_loadd(5, a1, a_stride);
    ahead += fetched.lines * 64;
  }
  fetch(0);
  if constexpr (R * P > 1) fetch(kHalf);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (P == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
  own.finish();  // before its place is taken
  _tile_stored(0, c, c_bytes);
  if constexpr (P == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (R == 2) _tile_stored(2, c1, c_bytes);
  if constexpr (R == 2 && P == 2) _tile_stored(3, c1 + 16, c_bytes);
  TileRegisters::barrier();
  beside = own;
}

// The registers of a thread that multiplies rows, and how these are cut into tiles: all have one height, and the last may
// begin with rows of the one before it.
class RowTiles : public RowRegisters<product_shapes> {
 public:
  void take(int64_t rows) {
    rows_ = rows;
    RowRegisters::take(rows);
  }
  int64_t count() const { return (rows_ + 15) / 16; }
  int64_t first(int64_t tile) const { return std::min(tile * 16, rows_ - height()); }

 private:
  int64_t rows_ = 0;
};
#else
inline bool has_tiles() { return false; }
#endif

}  // namespace atom
