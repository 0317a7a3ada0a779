// Results of the tile registers on their way to the output.
#pragma once
#include "amx.h"
#include "kernels.h"
#include "largest.h"

namespace atom {

#if defined(ATOM_AMX)
constexpr int64_t kResultStride = 2 * kPanel;  // floats: two panels, of up to two tiles of rows

// The vector units round results, and multiply them by silu of their gates, while the tile registers compute the next
// ones: done in turn it takes a tenth to a third of the time. An output that no cache holds is written past them, a
// cache line at once, as to fetch its lines first takes longer than to write them.
class Pending {
 public:
  struct Halves {
    __m256i of[2 * kPanel];
  };
  // largest: where a thread notes the results, instead of writing them; or null.
  Pending(const LinearArgs& args, RowLargest* largest, Halves& halves)
      : halves_(halves.of), n_(args.n), columns_(args.paired ? kPanel : 2 * kPanel), paired_(args.paired),
        floats_(args.out_type == DType::f32 && !args.paired), base_((bf16*)args.out), largest_(largest),
        streams_(args.m * args.n * element_size(args.out_type) > kStreamBytes && args.n % 32 == 0 &&
                 (uintptr_t)args.out % 64 == 0 && !largest_),
        takes_any_(!args.bias && (args.out_type == DType::bf16 || largest_ || (floats_ && streams_))) {}

  // Whether all float results are for `begin`, but for those that stick out.
  bool takes_floats() const { return floats_ && takes_any_; }
  // Whether `begin` is for the two panels: if nothing is added, and nothing cut off.
  bool takes(int64_t panel) const { return takes_any_ && column_of(panel) + columns_ <= n_; }

  // Two panels of up to two tiles of rows, the second of which begins `second` rows after the first (0: there is none).
  // last: the panel at which these rows end; ksteps: how long the next product takes.
  void begin(const float* tile, int64_t row, int64_t height, int64_t second, int64_t panel, int64_t last,
             int64_t ksteps) {
    const int64_t column = column_of(panel);
    tile_ = tile;
    row_ = row;
    second_ = second ? row + second : 0;
    panel_ = int32_t(panel);
    out_ = base_ + row * n_ + column;
    left_ = height;
    each_ = (height * (second ? 2 : 1) * kStepsOfTile + ksteps - 1) / ksteps;
    staged_ = 0;
    if (!streams_) return;
    if (floats_) way_ = kStreamFloats;
    else if (!paired_) way_ = column % 32 ? kStore : kStream;
    else if (column % 32) way_ = way_ == kStage ? kStreamStaged : kStore;
    else way_ = panel + 4 <= last ? kStage : kStore;
    streamed_ |= way_ != kStore;
  }
  // Some rows, so that all are done when the next product is.
  ATOM_INLINE void operator()() {
    for (int64_t i = 0; i < each_ && left_; ++i) row();
  }
  void finish() {
    while (left_) row();
  }
  // Makes all that was written visible to other threads.
  void end() {
    finish();
    if (streamed_) _mm_sfence();
  }

 private:
  static constexpr int64_t kStreamBytes = 4 << 20;
  // The two panels of a pair are half a cache line of output: it waits for the next two.
  enum Way { kStore, kStream, kStreamFloats, kStage, kStreamStaged };

  int64_t column_of(int64_t panel) const { return panel / (paired_ ? 2 : 1) * kPanel; }

  ATOM_INLINE static void stream(bf16* out, __m256i low, __m256i high) {
    _mm512_stream_si512((__m512i*)out, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  ATOM_INLINE void row() {
    const F16x first = load16(tile_), second = load16(tile_ + kPanel);
    if (largest_) {
      largest_[row_].see(first, panel_);
      largest_[row_].see(second, panel_ + 1);
    } else if (paired_) {
      const F16x v = silu(first) * second;
      if (way_ == kStore) store16(out_, v);
      else if (way_ == kStage) _mm256_store_si256(halves_ + staged_++, to_bf16(v));
      else stream(out_ - kPanel, _mm256_load_si256(halves_ + staged_++), to_bf16(v));
    } else if (way_ == kStreamFloats) {
      float* out = (float*)base_ + (out_ - base_);
      _mm512_stream_ps(out, (__m512)first.r[0]);
      _mm512_stream_ps(out + kPanel, (__m512)second.r[0]);
    } else if (way_ == kStream) {
      stream(out_, to_bf16(first), to_bf16(second));
    } else {
      store16(out_, first);
      store16(out_ + kPanel, second);
    }
    tile_ += kResultStride;
    ++row_;
    out_ += n_;
    if (--left_ == 0 && second_) {
      left_ = kPanel;
      out_ += (second_ - row_) * n_;
      row_ = second_;
      second_ = 0;
    }
  }

  __m256i* halves_;
  int64_t n_, columns_;
  bool paired_, floats_;
  bf16* base_;  // or floats
  RowLargest* largest_;
  bool streams_, takes_any_;
  const float* tile_;
  bf16* out_;
  int64_t row_, second_, left_ = 0, each_, staged_;  // second_: where the second tile's rows begin, or 0
  int32_t panel_;
  Way way_ = kStore;
  bool streamed_ = false;
};
#endif

}  // namespace atom
