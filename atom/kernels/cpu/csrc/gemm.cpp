// Dense layers over packed weights: out = x * weight^T with a fused epilogue.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "largest.h"
#include "micro.h"
#include "norm_row.h"
#include "pending.h"

namespace atom {
namespace {

constexpr int64_t kGroup = 4;          // panels that share one tile of results
constexpr int64_t kBlockSteps = 1024; // of K (4 KiB a row of A, 64 KiB a panel): what stays in the L2 cache
constexpr int64_t kMaxBlockRows = 192;

template <class T>
void pack_panel(const T* weight, int64_t first, int64_t rows, int64_t k, int64_t steps, int64_t ldw, T* out) {
  constexpr int64_t width = std::is_same_v<T, bf16> ? 2 : 1;
  constexpr int64_t kTile = 64 / (width * sizeof(T));  // steps: a cache line of each row, which stays until it is used
  const int64_t whole = k / width;
  if (rows < kPanel || whole < steps) memset((void*)out, 0, steps * kPanel * width * sizeof(T));
  for (int64_t begin = 0; begin < whole; begin += kTile) {
    const int64_t end = std::min(begin + kTile, whole);
    for (int64_t j = 0; j < rows; ++j) {
      const T* row = weight + (first + j) * ldw;
      for (int64_t s = begin; s < end; ++s)
        memcpy((void*)(out + (s * kPanel + j) * width), row + s * width, width * sizeof(T));
    }
  }
  if (k % width)
    for (int64_t j = 0; j < rows; ++j) out[(whole * kPanel + j) * width] = weight[(first + j) * ldw + k - 1];
}

// Stores a tile of float results in the output's type, with silu(gate) * up of paired panels or plus the bias.
template <class Out, bool kPaired>
__attribute__((noinline)) void finish(const LinearArgs& args, const float* tile, int64_t stride, int64_t row,
                                      int64_t rows, int64_t panel, int64_t panels) {
  constexpr int64_t unit = kPaired ? 2 : 1;
  const int64_t column = panel / unit * kPanel;
  Out* out = (Out*)args.out + row * args.n + column;
  const auto value = [&](int64_t p) {
    const F16x v = load16(tile + p * 16);
    return kPaired ? silu(v) * load16(tile + p * 16 + 16) : v;
  };
  if (!args.bias && column + panels / unit * kPanel <= args.n) {  // nothing to add, nothing to cut
    for (int64_t i = 0; i < rows; ++i, out += args.n, tile += stride)
      for (int64_t p = 0; p < panels; p += unit) store16(out + p / unit * 16, value(p));
    return;
  }
  for (int64_t i = 0; i < rows; ++i, out += args.n, tile += stride)
    for (int64_t p = 0; p < panels; p += unit) {
      const int64_t first = p / unit * kPanel, left = args.n - column - first;
      F16x v = value(p);
      if (args.bias)
        by_type(args.bias_type,
                [&](auto t) { v = v + load_some((const decltype(t)*)args.bias + column + first, left); });
      store_some(out + first, v, left);
    }
}

template <class Out>
void finish(const LinearArgs& args, const float* tile, int64_t stride, int64_t row, int64_t rows, int64_t panel,
            int64_t panels) {
  if (args.paired) finish<Out, true>(args, tile, stride, row, rows, panel, panels);
  else finish<Out, false>(args, tile, stride, row, rows, panel, panels);
}

// Notes a tile's results instead.
void note(RowLargest* largest, int64_t n, const float* tile, int64_t stride, int64_t row, int64_t rows, int64_t panel,
          int64_t panels) {
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t columns = std::min(kPanel, n - (panel + p) * kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      F16x v = splat(-INFINITY);
      memcpy((void*)&v, tile + i * stride + p * kPanel, columns * sizeof(float));
      largest[row + i].see(v, int32_t(panel + p));
    }
  }
}

void epilogue(const LinearArgs& args, RowLargest* largest, const float* tile, int64_t stride, int64_t row, int64_t rows,
              int64_t panel, int64_t panels) {
  if (largest) note(largest, args.n, tile, stride, row, rows, panel, panels);
  else if (args.out_type == DType::f32) finish<float>(args, tile, stride, row, rows, panel, panels);
  else if (args.out_type == DType::bf16) finish<bf16>(args, tile, stride, row, rows, panel, panels);
  else finish<f16>(args, tile, stride, row, rows, panel, panels);
}

// What a thread needs: Registers, and a list for what it notes.
template <class Registers>
class Noting : public Registers {
 public:
  RowLargest* list(const LinearArgs& args, int part) {
    if (args.largest && (!list_ || part < part_)) list_ = args.largest->new_list();
    part_ = part;
    return list_;
  }

 private:
  RowLargest* list_ = nullptr;
  int part_ = 0;
};

// Rows of A as the register tiles read them.
struct Operand {
  const char* data;  // null: to be made by make_rows
  int64_t stride;    // bytes
};

// The type in which rows of `type` are multiplied.
inline DType operand_type(DType type) {
#if defined(ATOM_BF16_DOT)
  if (type == DType::bf16) return type;
#endif
  (void)type;
  return DType::f32;
}

// x as it is, where that is possible.
Operand operand(const LinearArgs& args) {
  const DType type = operand_type(args.type);
  const int64_t width = ksteps(args.type, args.k) * kwidth(args.type);
  const bool as_is = !args.norm.weight && type == args.type && width == args.k;
  if (as_is) return {(const char*)args.x, args.ldx * element_size(args.type)};
  return {nullptr, width * element_size(type)};
}

// In the operand's type, and with zeros behind it.
void convert_row(const LinearArgs& args, const void* from, char* to) {
  const int64_t size = element_size(args.type);
  if (operand_type(args.type) == args.type) {
    if (from != to) memcpy(to, from, args.k * size);
    memset(to + args.k * size, 0, (ksteps(args.type, args.k) * kwidth(args.type) - args.k) * size);
  } else if (args.type == DType::bf16) {
    for (int64_t i = 0; i < args.k; ++i) ((float*)to)[i] = bf16_to_float(((const bf16*)from)[i].bits);
    if (args.k % 2) ((float*)to)[args.k] = 0;
  } else {
    for (int64_t i = 0; i < args.k; i += 16)
      store_some((float*)to + i, load_some((const f16*)from + i, args.k - i), args.k - i);
  }
}

// Rows [begin, end) of the operand, the first at `to`: normalized where asked, and converted.
void make_rows(const LinearArgs& args, int64_t begin, int64_t end, char* to, int64_t stride) {
  static thread_local Scratch scratch;
  const RowNorm& norm = args.norm;
  by_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    const bool converts = operand_type(args.type) != args.type;
    T* const apart = norm.weight && converts ? (T*)scratch.get(args.k * sizeof(T)) : nullptr;
    for (int64_t row = begin; row < end; ++row, to += stride) {
      const T* x = (const T*)args.x + row * args.ldx;
      if (norm.weight) {
        T* const residual = norm.residual ? (T*)norm.residual + row * norm.ldr : nullptr;
        T* const normed = converts ? apart : (T*)to;
        norm_row(x, residual, (const T*)norm.weight, norm.eps, args.k, residual, normed);
        x = normed;
      }
      convert_row(args, x, to);
    }
  });
}

// Rows [m0, m1) and panels [p0, p1) of the result.
template <class Step>
void linear_block(const LinearArgs& args, RowLargest* largest, Operand a, int64_t m0, int64_t m1, int64_t p0,
                  int64_t p1) {
  static thread_local Scratch scratch;
  const int64_t steps = ksteps(args.type, args.k);
  const int64_t panel_bytes = steps * Step::bytes;
  const int64_t block_steps = std::min(steps, kBlockSteps);
  const int64_t fit = (384 << 10) / (block_steps * Step::a_bytes) / kMaxRows * kMaxRows;
  const int64_t block_rows = std::min(kMaxBlockRows, std::max<int64_t>(8 * kMaxRows, fit));
  float* tile = (float*)scratch.get(std::min(m1 - m0, block_rows) * kGroup * kPanel * sizeof(float));
  const char* packed = (const char*)args.packed;
  for (int64_t row = m0; row < m1; row += block_rows) {
    const int64_t rows = std::min(block_rows, m1 - row);
    for (int64_t p = p0; p < p1; p += kGroup) {
      const int64_t panels = std::min(kGroup, p1 - p);
      for (int64_t s = 0; s < steps; s += block_steps) {
        Tile t;
        t.steps = std::min(block_steps, steps - s);
        t.a = a.data + row * a.stride + s * Step::a_bytes;
        t.a_stride = a.stride;
        t.b = packed + p * panel_bytes + s * Step::bytes;
        t.panel_bytes = panel_bytes;
        t.c = tile;
        t.c_stride = kGroup * kPanel;
        t.accumulate = s > 0;
        const char* next = s + block_steps < steps ? t.b + block_steps * Step::bytes
                                                   : packed + (p + kGroup) * panel_bytes;
        multiply_streaming<Step>(t, rows, panels, next);
      }
      epilogue(args, largest, tile, kGroup * kPanel, row, rows, p, panels);
    }
  }
}

#if defined(ATOM_AMX)
constexpr int64_t kTilesGroup = 8;  // panels at most; kGroup where K takes several blocks, so that a stream fetches one

struct NothingBeside {
  ATOM_INLINE void operator()() {}
  void finish() {}
};

// For one tile of rows, reading the weights is what takes the time: one sequential stream.
void one_tile(Tile t, int64_t panels) {
  for (int64_t p = 0; p < panels; ++p, t.b += t.panel_bytes, t.c += kPanel) {
    t.prefetch = t.b + 4 * kAheadBytes;
    NothingBeside beside;
    tile_product<1, 1>(t, 0, {16, 0}, beside);
  }
}

// The same by tile registers: two tiles of rows stay in the L1 cache while they meet the panels of a group. Meanwhile
// the next group is fetched, unless it begins at `limit`, where another thread's panels do. Rows that are not made yet
// are made when their block's turn comes, and stay in the L2 cache until it is over.
void linear_tiles(RowTiles& tiles, const LinearArgs& args, RowLargest* largest, Operand a, int64_t m0, int64_t m1,
                  int64_t p0, int64_t p1, int64_t limit) {
  static thread_local Scratch scratch;
  const int64_t steps = ksteps(args.type, args.k), panel_bytes = steps * 64;
  const int64_t block_steps = std::min(steps, kBlockSteps);
  const int64_t most = std::min(block_steps == steps ? kTilesGroup : kGroup, p1 - p0);
  constexpr int64_t kResult = 32 * kResultStride;
  const bool whole = block_steps == steps;  // all of K at once
  const int64_t results = whole ? 1 : kMaxBlockRows / 32 * kGroup / 2;
  float* result = (float*)scratch.get(results * kResult * sizeof(float));
  static thread_local Scratch made;
  char* const own = a.data ? nullptr : (char*)made.get(std::min(kMaxBlockRows, m1 - m0) * a.stride);
  Pending::Halves halves;
  Pending pending(args, largest, halves);
  const bool plain =
      args.out_type == DType::f32 && !args.bias && !args.paired && whole && !pending.takes_floats();
  for (int64_t row = m0; row < m1; row += kMaxBlockRows) {
    const int64_t rows = std::min(kMaxBlockRows, m1 - row);
    if (own) make_rows(args, row, row + rows, own, a.stride);
    const char* const block_rows = own ? own : a.data + row * a.stride;
    tiles.take(rows);
    const int64_t blocks = (tiles.count() + 1) / 2;
    for (int64_t group = p0; group < p1; group += most) {
      const int64_t end = std::min(group + most, p1), pairs = (end - group + 1) / 2;
      const char* const begin = (const char*)args.packed + group * panel_bytes;
      for (int64_t s = 0; s < steps; s += block_steps) {
        const bool last = s + block_steps >= steps;
        const char* const next = !last         ? begin + (s + block_steps) * 64
                                 : end < limit ? begin + (end - group) * panel_bytes
                                               : nullptr;
        Fetch fetch{0, pairs * 2 * panel_bytes / kStreams};  // all streams together cover a group
        if (next) fetch.lines = int((32 + kStreams * blocks - 1) / (kStreams * blocks));
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t first = row + tiles.first(2 * block), second = row + tiles.first(2 * block + 1) - first;
          const char* const tile_rows = block_rows + tiles.first(2 * block) * a.stride;
          const bool two = 2 * block + 1 < tiles.count();
          for (int64_t p = group; p < end; p += 2) {
            Tile t;
            t.steps = std::min(block_steps, steps - s);
            t.a = tile_rows + s * 4;
            t.a_stride = a.stride;
            t.b = begin + (p - group) * panel_bytes + s * 64;
            t.panel_bytes = panel_bytes;
            t.c = result + (whole ? 0 : block * kGroup / 2 + (p - group) / 2) * kResult;
            t.c_stride = kResultStride;
            t.accumulate = s > 0;
            t.prefetch = next + (block * pairs + (p - group) / 2) * fetch.lines * t.steps * 4;
            const int64_t panels = std::min<int64_t>(2, end - p);
            const bool direct = plain && (!two || second == 16) && (p + panels) * kPanel <= args.n;
            if (direct) {  // the registers are the result
              t.c = (float*)args.out + first * args.n + p * kPanel;
              t.c_stride = args.n;
            }
            const auto product = [&](auto& beside) {
              if (panels == 2) two ? tile_product<2, 2>(t, second, fetch, beside) : tile_product<1, 2>(t, 0, fetch, beside);
              else two ? tile_product<2, 1>(t, second, {}, beside) : tile_product<1, 1>(t, 0, {}, beside);
            };
            if (tiles.count() == 1) {
              pending.finish();  // its place is taken
              one_tile(t, panels);
            } else if (plain) {
              NothingBeside beside;
              product(beside);
            } else {
              product(pending);
            }
            if (!last || direct) continue;
            if (tiles.count() > 1 && panels == 2 && pending.takes(p)) {
              pending.begin(t.c, first, tiles.height(), two ? second : 0, p, end, t.steps);
              continue;
            }
            epilogue(args, largest, t.c, kResultStride, first, tiles.height(), p, panels);
            if (two) epilogue(args, largest, t.c + 16 * kResultStride, kResultStride, first + second, 16, p, panels);
          }
        }
      }
      if (!whole) pending.finish();  // the next group takes its place
    }
  }
  pending.end();
}
#endif

}  // namespace

int64_t ksteps(DType type, int64_t k) {
  const int64_t steps = (k + kwidth(type) - 1) / kwidth(type);
#if defined(ATOM_AMX)
  if (type == DType::bf16) return (steps + kStepsOfTile - 1) / kStepsOfTile * kStepsOfTile;
#endif
  return steps;
}

void pack_weight(DType type, const void* weight, int64_t n, int64_t k, int64_t ldw, bool paired, void* packed,
                 int threads) {
  by_type(type, [&](auto tag) {
    using T = decltype(tag);
    const int64_t panels = num_panels(n, paired), half = n / 2;
    const int64_t size = ksteps(type, k) * kwidth(type) * kPanel;
    for_rows(panels, size, threads, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = paired ? p / 2 * kPanel : p * kPanel;
        const int64_t rows = std::min(kPanel, (paired ? half : n) - first);
        pack_panel((const T*)weight, first + (paired && p % 2 ? half : 0), rows, k, ksteps(type, k), ldw,
                   (T*)packed + p * size);
      }
    });
  });
}

void linear(const LinearArgs& args, int threads) {
  if (!args.m || !args.n) return;
  threads = std::min(threads, kMaxThreads);
  const int64_t unit = args.paired ? 2 : 1;
  const int64_t columns = (args.n + kPanel - 1) / kPanel;  // panels, or pairs of panels
  if (args.m * args.n * args.k * unit < 65536) threads = 1;
  // Threads share the columns; where these are few, also the rows.
  int64_t best_rows = 1, best = INT64_MAX;
  for (int64_t by_rows = 1; by_rows <= threads; ++by_rows) {
    if (threads % by_rows || by_rows * 8 > args.m + 7) continue;
    const int64_t by_columns = threads / by_rows;
    const int64_t cost = ((args.m + by_rows - 1) / by_rows) * ((columns + by_columns - 1) / by_columns);
    if (cost < best) best = cost, best_rows = by_rows;
  }
  Operand a = operand(args);
#if defined(ATOM_AMX)
  using Tiles = Noting<RowTiles>;
  const bool by_tiles = args.type == DType::bf16 && has_tiles();
  const int64_t panels = columns * unit;
  // Tiles would wait for the rows if every few columns read all of them: of many rows, each thread takes its own.
  if (by_tiles && args.m >= threads * kMaxBlockRows) {
    const int64_t most = (args.m + threads - 1) / threads;  // a thread's, cut into equal blocks of whole tiles
    const int64_t size = (most / ((most + kMaxBlockRows - 1) / kMaxBlockRows) + 31) / 32 * 32;
    shares<Tiles>(threads, 1, [&](int part) { return share((args.m + size - 1) / size, part, threads); },
                  [&](Tiles& own, int part, int64_t begin, int64_t end) {
                    linear_tiles(own, args, own.list(args, part), a, begin * size, std::min(args.m, end * size), 0,
                                 panels, panels);
                  });
    return;
  }
#endif
  static thread_local Scratch scratch;
  if (!a.data) {
    char* const made = (char*)scratch.get(args.m * a.stride);
    for_rows(args.m, args.k, threads, [&](int64_t begin, int64_t end) {
      make_rows(args, begin, end, made + begin * a.stride, a.stride);
    });
    a.data = made;
  }
  const auto columns_of = [&](int part) { return share(columns, part / best_rows, threads / best_rows); };
#if defined(ATOM_AMX)
  if (by_tiles) {
    // Of few columns each thread takes few at a time, so that all end together: fewest where rows are so long that they
    // leave the L1 cache in any case.
    constexpr int64_t kTilesRow = 768;  // two tiles of such rows fill it
    int64_t grain = kGroup;
    if (panels >= 64 * kTilesGroup * threads) grain = kTilesGroup;
    else if (panels < 16 * kGroup * threads && args.k > kTilesRow) grain = 2;
    shares<Tiles>(threads, grain / unit, columns_of, [&](Tiles& own, int part, int64_t begin, int64_t end) {
      const Range m = share(args.m, part % best_rows, best_rows);
      linear_tiles(own, args, own.list(args, part), a, m.begin, m.end, begin * unit, end * unit,
                   columns_of(part).end * unit);
    });
    return;
  }
#endif
  using Plain = Noting<Nothing>;
  shares<Plain>(threads, kGroup / unit, columns_of, [&](Plain& own, int part, int64_t begin, int64_t end) {
    const Range m = share(args.m, part % best_rows, best_rows);
    RowLargest* const largest = own.list(args, part);
    if (args.type == DType::f32) linear_block<StepF32>(args, largest, a, m.begin, m.end, begin * unit, end * unit);
    else if (args.type == DType::bf16) linear_block<StepBF16>(args, largest, a, m.begin, m.end, begin * unit, end * unit);
    else linear_block<StepF16>(args, largest, a, m.begin, m.end, begin * unit, end * unit);
  });
}

void linear_argmax(LinearArgs args, int64_t* out, int threads) {
  Largest largest(args.m, std::min(threads, kMaxThreads));
  args.largest = &largest;
  linear(args, threads);
  args.largest = nullptr;
  std::vector<float> results;
  for (int64_t row = 0; row < args.m; ++row) {
    out[row] = largest.of(row);
    if (out[row] >= 0) continue;
    LinearArgs one = args;
    results.resize(args.n);
    one.m = 1;
    one.x = (const char*)args.x + row * args.ldx * element_size(args.type);
    one.out = results.data();
    linear(one, threads);
    argmax(results.data(), 1, args.n, args.n, out + row, threads);
  }
}

const char* isa() {
  if (has_tiles()) return "amx_bf16";
#if defined(ATOM_BF16_DOT)
  return "avx512_bf16";
#elif defined(ATOM_AVX512)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__aarch64__)
  return "neon";
#else
  return "generic";
#endif
}

}  // namespace atom
