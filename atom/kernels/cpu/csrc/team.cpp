// The threads behind team.h: they look for work for a while, then sleep.
#include "team.h"

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#endif

namespace atom {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread looks for work: longer than the pauses within a step, shorter than those between two.
constexpr auto kAlert = std::chrono::microseconds(150);
// From then on it lets others have the core between two looks.
constexpr auto kSelfish = std::chrono::microseconds(15);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
inline void let_others_run() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#else
  std::this_thread::yield();
#endif
}

std::vector<int> bound_cpus;  // of thread i; changed by who holds the pool's callers

int bind_thread(std::thread::native_handle_type handle, int cpu) {
#if defined(__linux__)
  cpu_set_t* set = CPU_ALLOC(cpu + 1);
  if (!set) return ENOMEM;
  const size_t size = CPU_ALLOC_SIZE(cpu + 1);
  CPU_ZERO_S(size, set);
  CPU_SET_S(cpu, size, set);
  const int error = pthread_setaffinity_np(handle, size, set);
  CPU_FREE(set);
  return error;
#else
  (void)handle, (void)cpu;
  return ENOTSUP;
#endif
}

// Waits until `done`, at most `limit`; whether it came true.
template <class F>
bool spin(F&& done, Clock::duration limit) {
  for (int i = 0; i < 64; ++i) {
    if (done()) return true;
    relax();
  }
  const Clock::time_point start = Clock::now();
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
    const Clock::duration spent = Clock::now() - start;
    if (spent > limit) return false;
    if (spent > kSelfish) let_others_run();
  }
}

class Pool {
 public:
  void run(int threads, void (*work)(void*, int), void* context) {
    grow(threads);
    work_ = work;
    context_ = context;
    threads_ = threads;
    const uint64_t round = (gate_.load(std::memory_order_relaxed) >> kRoundShift) + 1;
    gate_.store(round << kRoundShift | kOpen, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(context, 0);
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);  // from now on nobody comes in
    while (!spin([&] { return !(gate_.load(std::memory_order_acquire) & kInside); }, kAlert)) {
    }
  }

  // Makes the threads and binds them to bound_cpus; later ones are bound as they start.
  int bind(int threads) {
    grow(threads);
    int error = 0;
    for (int i = 1; i < size_ && !error; ++i) error = bind_one(i);
    return error;
  }

  std::mutex callers;

 private:
  // The gate: the round, whether it may be joined, and how many are inside.
  static constexpr int kRoundShift = 16;
  static constexpr uint64_t kOpen = 1 << 15, kInside = kOpen - 1;

  void grow(int threads) {
    for (; size_ < threads; ++size_) {
      std::thread thread(&Pool::live, this, size_);
      handles_.push_back(thread.native_handle());
      thread.detach();
      bind_one(size_);
    }
  }

  int bind_one(int thread) {
    return thread < int(bound_cpus.size()) ? bind_thread(handles_[thread - 1], bound_cpus[thread]) : 0;
  }

  void live(int thread) {
    uint64_t seen = 0;
    const auto joinable = [&](uint64_t gate) { return (gate & kOpen) && gate >> kRoundShift != seen; };
    for (;;) {
      if (!spin([&] { return joinable(gate_.load(std::memory_order_acquire)); }, kAlert)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return joinable(gate_.load(std::memory_order_seq_cst)); });
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
      }
      uint64_t gate = gate_.load(std::memory_order_acquire);
      while (joinable(gate)) {
        if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
        seen = gate >> kRoundShift;
        if (thread < threads_) work_(context_, thread);
        gate_.fetch_sub(1, std::memory_order_acq_rel);
        break;
      }
    }
  }

  std::atomic<uint64_t> gate_{0};
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
  int size_ = 1;  // the caller is the first
  std::vector<std::thread::native_handle_type> handles_;  // of the others
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return *found;
  static std::mutex making;
  const std::lock_guard<std::mutex> lock(making);
  if (!pool.load(std::memory_order_acquire)) {
#if defined(__unix__) || defined(__APPLE__)
    // A forked process has none of the threads: it makes its own.
    static const int once = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
    (void)once;
#endif
    pool.store(new Pool, std::memory_order_release);  // never deleted: its threads live as long as the process
  }
  return *pool.load(std::memory_order_acquire);
}

}  // namespace

void run_team(int threads, void (*work)(void*, int), void* context) {
  Pool& found = the_pool();
  const std::unique_lock<std::mutex> lock(found.callers, std::try_to_lock);
  if (!lock.owns_lock()) return work(context, 0);  // another caller has the threads
  found.run(std::min(threads, kMaxThreads), work, context);
}

int bind_team(const int* cpus, int count) {
  Pool& found = the_pool();
  const std::lock_guard<std::mutex> lock(found.callers);
  bound_cpus.assign(cpus, cpus + count);
  return found.bind(std::min(count, kMaxThreads));
}

}  // namespace atom
