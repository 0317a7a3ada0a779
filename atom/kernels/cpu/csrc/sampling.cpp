// Choosing tokens: the likeliest, or one drawn from what the filters leave, by the inverse distribution function.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "common.h"

namespace atom {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kBlock = 256;  // weights are summed in blocks; only the one with the answer is looked at closely
constexpr int64_t kPart = 64;     // whose largest weight is known
constexpr size_t kFew = 1024;     // so many are sorted at once
constexpr double kJustBelowOne = 1 - 0x1p-52;
// Weights are counted by exponent and five bits of mantissa; 1 is the largest.
constexpr int kBinShift = 18;
constexpr int kBins = (0x3f800000 >> kBinShift) + 1;

// The first of the largest; the first NaN if there is one.
int64_t row_argmax(const float* x, int64_t n) {
  float best = -INFINITY;
  int64_t start = 0;
  for (int64_t c = 0; c < n; c += kChunk) {
    const int64_t end = c + kChunk < n ? c + kChunk : n;
    F16x top = splat(-INFINITY);
    RegI nan[kRegs] = {};
    int64_t i = c;
    for (; i + 16 <= end; i += 16) {
      const F16x v = load16(x + i);
      for (int r = 0; r < kRegs; ++r) nan[r] |= v.r[r] != v.r[r];
      top = max(v, top);
    }
    float m = lane_max(top);
    bool any_nan = false;
    for (int r = 0; r < kRegs; ++r)
      for (int l = 0; l < kLanes; ++l) any_nan |= nan[r][l] != 0;
    for (; i < end; ++i) {
      any_nan |= x[i] != x[i];
      if (x[i] > m) m = x[i];
    }
    if (any_nan) {
      for (int64_t j = c; j < end; ++j)
        if (x[j] != x[j]) return j;
    }
    if (m > best) best = m, start = c;
  }
  for (int64_t i = start; i < n; ++i)
    if (x[i] == best) return i;
  return 0;
}

int bin_of(float weight) {
  uint32_t bits;
  memcpy(&bits, &weight, 4);
  return int(bits >> kBinShift);
}

struct Entry {
  float weight;
  int64_t id;
};

// One row's weights, exp((x - max) / temperature), and what the filters leave of them.
class Row {
 public:
  Row(Scratch& scratch, int64_t n) : n_(n) {
    weights_ = (float*)scratch.get((n + n / kBlock + n / kPart + 2) * sizeof(float));
    sums_ = weights_ + n;
    tops_ = sums_ + n / kBlock + 1;
  }

  void weigh(const float* x, float top, float temperature) {
    const float scale = 1.44269504088896341f / temperature;
    const F16x tops = splat(top), scales = splat(scale);
    for (int64_t b = 0; b < n_; b += kBlock) {
      F16x total = splat(0.0f);
      float rest = 0;
      for (int64_t c = b; c < std::min(b + kBlock, n_); c += kPart) {
        const int64_t end = std::min(c + kPart, n_);
        F16x tallest = splat(0.0f);
        int64_t i = c;
        for (; i + 16 <= end; i += 16) {
          const F16x w = exp2((load16(x + i) - tops) * scales);
          store16(weights_ + i, w);
          total = total + w;
          tallest = max(tallest, w);
        }
        float most = lane_max(tallest);
        for (; i < end; ++i) {
          rest += weights_[i] = std::exp2((x[i] - top) * scale);
          most = std::max(most, weights_[i]);
        }
        tops_[c / kPart] = most;
      }
      sums_[b / kBlock] = lane_sum(total) + rest;
    }
  }

  // min_p, then top_k, then top_p: each acts on what the ones before left.
  void filter(int64_t k, float p, float floor) {
    float least = floor;
    if (k < n_) {
      gather(std::max(floor, at_most_kth(k)));
      if (int64_t(entries_.size()) >= k) {
        const auto nth = entries_.begin() + (k - 1);
        std::nth_element(entries_.begin(), nth, entries_.end(), heavier);
        least = nth->weight;
      }
      entries_.erase(std::remove_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.weight < least; }),
                     entries_.end());
      if (p < 1) {
        double left = 0;
        for (const Entry& e : entries_) left += e.weight;
        least = nucleus(p * left);
      }
    } else if (p < 1) {
      if (floor > 0) keep(floor);
      double left = 0;
      for (int64_t b = 0; b * kBlock < n_; ++b) left += sums_[b];
      // Together, all lighter ones are lighter than what top_p leaves out.
      gather(std::max(floor, float((1 - p) * left / n_ * 0.999)));
      least = nucleus(p * left);
    }
    keep(least);
  }

  int64_t choose(float uniform) const {
    const int64_t blocks = (n_ + kBlock - 1) / kBlock;
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += sums_[b];
    const double target = std::min(uniform * total, total * kJustBelowOne);
    double before = 0;
    int64_t b = 0;
    for (; b + 1 < blocks && before + sums_[b] <= target; ++b) before += sums_[b];
    // The sum of the block in float and that in double differ in rounding: go by the fraction.
    const double fraction = (target - before) / sums_[b];
    const int64_t begin = b * kBlock, end = std::min(begin + kBlock, n_);
    double inside = 0;
    for (int64_t i = begin; i < end; ++i) inside += weights_[i];
    const double wanted = std::min(fraction * inside, inside * kJustBelowOne);
    double sum = 0;
    int64_t last = begin;
    for (int64_t i = begin; i < end; ++i) {
      if (weights_[i] <= 0) continue;
      sum += weights_[i];
      last = i;
      if (sum > wanted) break;
    }
    return last;
  }

 private:
  static bool heavier(const Entry& a, const Entry& b) { return a.weight > b.weight; }

  // No more than the k-th largest weight: so many parts of the row have one that is as large. 0 where k is too large.
  float at_most_kth(int64_t k) const {
    static thread_local std::vector<float> copy;
    const int64_t parts = (n_ + kPart - 1) / kPart;
    if (k > parts) return 0;
    copy.assign(tops_, tops_ + parts);
    std::nth_element(copy.begin(), copy.begin() + (k - 1), copy.end(), std::greater<float>());
    return copy[k - 1];
  }

  // The tokens with a weight of `least` or more, in the order of their ids.
  void gather(float least) {
    entries_.clear();
    for (int64_t b = 0; b < n_; b += kPart) {
      if (tops_[b / kPart] < least) continue;
      for (int64_t i = b; i < std::min(b + kPart, n_); ++i)
        if (weights_[i] >= least) entries_.push_back({weights_[i], i});
    }
  }

  // The smallest weight among the fewest of the heaviest entries that add up to `enough`, at least one; those that
  // tie with it but are one too many lose their weight.
  float nucleus(double enough) {
    double sum = 0;
    if (entries_.size() > kFew) {  // find the bin in which the sum is reached: only its entries are sorted
      totals_.assign(kBins, 0);
      for (const Entry& e : entries_) totals_[bin_of(e.weight)] += e.weight;
      int bin = kBins - 1, lowest = kBins - 1;
      for (const Entry& e : entries_) lowest = std::min(lowest, bin_of(e.weight));
      for (; bin > lowest && sum + totals_[bin] < enough; --bin) sum += totals_[bin];
      entries_.erase(
          std::remove_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return bin_of(e.weight) != bin; }),
          entries_.end());
    }
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.weight != b.weight ? a.weight > b.weight : a.id < b.id; });
    size_t last = 0;
    while ((sum += entries_[last].weight) < enough && last + 1 < entries_.size()) ++last;
    const float border = entries_[last].weight;
    for (size_t i = last + 1; i < entries_.size() && entries_[i].weight == border; ++i) weights_[entries_[i].id] = 0;
    return border;
  }

  void keep(float least) {
    for (int64_t b = 0; b < n_; b += kBlock) {
      const int64_t end = std::min(b + kBlock, n_);
      float lanes[16] = {};
      int64_t i = b;
      for (; i + 16 <= end; i += 16)
        for (int l = 0; l < 16; ++l) lanes[l] += weights_[i + l] = weights_[i + l] >= least ? weights_[i + l] : 0.0f;
      F16x total;
      memcpy(&total, lanes, 64);
      float sum = lane_sum(total);
      for (; i < end; ++i) sum += weights_[i] = weights_[i] >= least ? weights_[i] : 0.0f;
      sums_[b / kBlock] = sum;
    }
  }

  float *weights_, *sums_, *tops_;  // the sums of blocks, the maxima of parts
  int64_t n_;
  static thread_local std::vector<double> totals_;
  static thread_local std::vector<Entry> entries_;
};

thread_local std::vector<double> Row::totals_;
thread_local std::vector<Entry> Row::entries_;

int64_t sample_row(const SampleArgs& args, int64_t r) {
  static thread_local Scratch scratch;
  const float* x = args.logits + r * args.ldx;
  const int64_t n = args.cols;
  const int64_t likeliest = row_argmax(x, n);
  const float temperature = args.temperature[r], top = x[likeliest];
  // Without a distribution: greedy (or all but), or a row of NaN or infinities.
  if (!(1.45f / temperature <= std::numeric_limits<float>::max() && temperature > 0) || !(std::abs(top) <= std::numeric_limits<float>::max())) return likeliest;
  Row row(scratch, n);
  row.weigh(x, top, temperature);
  const int64_t k = args.top_k ? std::min<int64_t>(std::max(args.top_k[r], 1), n) : n;
  const float p = args.top_p ? args.top_p[r] : 1, floor = args.min_p ? args.min_p[r] : 0;
  if (k < n || p < 1 || floor > 0) row.filter(k, p, floor);
  return row.choose(args.uniform[r]);
}

}  // namespace

void argmax(const float* x, int64_t rows, int64_t cols, int64_t ldx, int64_t* out, int threads) {
  for_rows(rows, cols / 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) out[row] = row_argmax(x + row * ldx, cols);
  });
}

void sample(const SampleArgs& args, int threads) {
  for_rows(args.rows, args.cols * 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) args.out[row] = sample_row(args, row);
  });
}

}  // namespace atom
