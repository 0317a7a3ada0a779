// The largest result of every row, without the results: to write them all and read them again takes longer.
#pragma once
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "common.h"

namespace atom {

// Of a row, the largest of every column of the panels seen, and which panel's it was.
struct alignas(64) RowLargest {
  F16x value = splat(-std::numeric_limits<float>::infinity());
  RegI panel[kRegs] = {};
  RegI nan[kRegs] = {};  // not zero where there was one

  // Panels come in rising order: the first of equals stays.
  ATOM_INLINE void see(F16x v, int32_t from) {
    ATOM_EACH {
      const RegI larger = v.r[i] > value.r[i];
      nan[i] |= v.r[i] != v.r[i];
      value.r[i] = larger ? v.r[i] : value.r[i];
      panel[i] = larger ? from - RegI{} : panel[i];
    }
  }
};

// Of all rows. Each thread notes what it sees in lists of its own: one, and another for the panels below its first.
class Largest {
 public:
  Largest(int64_t rows, int threads) : rows_(rows), lists_(2 * threads) {}

  RowLargest* new_list() { return (lists_[used_++] = std::make_unique<RowLargest[]>(rows_)).get(); }
  // The first column of the largest, or -1 if there was a NaN.
  int64_t of(int64_t row) const {
    float best = -std::numeric_limits<float>::infinity();
    int64_t first = std::numeric_limits<int64_t>::max();
    for (int list = 0; list < used_; ++list) {
      const RowLargest& seen = lists_[list][row];
      float values[kPanel];
      int32_t panels[kPanel], nans[kPanel];
      memcpy(values, &seen.value, 64), memcpy(panels, seen.panel, 64), memcpy(nans, seen.nan, 64);
      for (int64_t i = 0; i < kPanel; ++i) {
        if (nans[i]) return -1;
        const int64_t column = panels[i] * kPanel + i;
        if (values[i] > best || (values[i] == best && column < first)) best = values[i], first = column;
      }
    }
    return first;
  }

 private:
  int64_t rows_;
  std::vector<std::unique_ptr<RowLargest[]>> lists_;
  std::atomic<int> used_{0};
};

}  // namespace atom
