// Threads that share work, and don't wait for one that comes late: a busy neighbour may hold a core for milliseconds.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace atom {

// Calls work(context, thread) on the caller as thread 0 and on those of threads 1..threads-1 that come before the
// caller is through. Returns when all that came have ended.
void run_team(int threads, void (*work)(void* context, int thread), void* context);

// From now on thread i > 0 runs on cpus[i] alone, and beyond `count` where it likes, as thread 0 does: that is whoever
// calls, and threads that it makes would inherit its binding. 0, or the system's error number.
int bind_team(const int* cpus, int count);

template <class F>
void team(int threads, F&& f) {
  if (threads <= 1) return f(0);
  using Call = std::remove_reference_t<F>;
  run_team(threads, [](void* context, int thread) { (*(Call*)context)(thread); }, (void*)&f);
}

struct Range {
  int64_t begin, end;
};
// Part i of n things, contiguous and balanced.
inline Range share(int64_t n, int64_t i, int64_t parts) { return {n * i / parts, n * (i + 1) / parts}; }

constexpr int kMaxThreads = 256;

// What a thread needs while it takes part, if anything.
struct Nothing {
  Nothing() {}
};

// f(own, part, begin, end) over the ranges of all parts, at most `grain` at a time; `own` is the thread's. Thread i
// begins with part i; who is through with its own takes from the others'.
template <class Own = Nothing, class G, class F>
void shares(int parts, int64_t grain, G&& range_of, F&& f) {
  parts = std::min(parts, kMaxThreads);
  if (parts <= 1) {
    Own own;
    const Range r = range_of(0);
    if (r.begin < r.end) f(own, 0, r.begin, r.end);
    return;
  }
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Part all[kMaxThreads];
  for (int i = 0; i < parts; ++i) {
    const Range r = range_of(i);
    all[i].next.store(r.begin, std::memory_order_relaxed);
    all[i].end = r.end;
  }
  team(parts, [&](int thread) {
    Own own;
    for (int i = 0; i < parts; ++i) {
      const int part = thread + i < parts ? thread + i : thread + i - parts;
      Part& p = all[part];
      while (p.next.load(std::memory_order_relaxed) < p.end) {
        const int64_t begin = p.next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= p.end) break;
        f(own, part, begin, std::min(begin + grain, p.end));
      }
    }
  });
}

// f(begin, end) over n rows of `cost` elements each, in pieces worth handing to a thread.
template <class F>
void for_rows(int64_t n, int64_t cost, int threads, F&& f) {
  constexpr int64_t kPiece = 8192;  // elements: some microseconds
  const int64_t grain = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, cost));
  const int parts = int(std::min<int64_t>(threads, n / grain));
  shares(parts, grain, [&](int i) { return share(n, i, std::max(1, parts)); },
         [&](Nothing&, int, int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace atom
