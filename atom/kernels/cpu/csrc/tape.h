// The kernel calls of a step, recorded once and run again without Python. A tape owns no memory: what its calls read
// and write must stay where it was, but for the step's inputs, which are given anew each time.
#pragma once
#include <optional>
#include <variant>
#include <vector>

#include "kernels.h"

namespace atom {

inline void run(const LinearArgs& args, int threads) { linear(args, threads); }
inline void run(const TakeArgs& args, int threads) { take_rows(args, threads); }
inline void run(const NormArgs& args, int threads) { rms_norm(args, threads); }
inline void run(const SiluArgs& args, int threads) { silu_and_mul(args, threads); }
inline void run(const RotaryArgs& args, int threads) { rotary_embedding(args, threads); }
inline void run(const StoreArgs& args, int threads) { store_kv(args, threads); }
inline void run(const AttentionArgs& args, int threads) { paged_attention(args, threads); }

struct StoreAndAttendArgs {
  std::optional<RotaryArgs> rotary;
  StoreArgs store;
  AttentionArgs attention;
};
inline void run(const StoreAndAttendArgs& args, int threads) {
  paged_attention(args.rotary ? &*args.rotary : nullptr, args.store, args.attention, threads);
}

// What changes from step to step; the numbers of tokens, requests and blocks a row may be read up to do not.
struct StepInputs {
  const int64_t *ids, *positions, *slots;
  const int32_t *query_start, *seq_lens, *block_table;
  int64_t block_table_stride;
};

class Tape {
 public:
  template <class Args>
  void add(const Args& args) { calls_.push_back(args); }
  // As one call with those before that rotate for it and fill a cache.
  void add(const AttentionArgs& args);

  // Whether all that the calls read of a step is among these inputs, which were those of the recorded step.
  bool reads(const StepInputs& inputs) const;
  // The number of an id outside of its table, which keeps anything from being run; -1: none was.
  int64_t replay(const StepInputs& inputs, int threads);

 private:
  std::vector<std::variant<LinearArgs, TakeArgs, NormArgs, SiluArgs, RotaryArgs, StoreArgs, AttentionArgs,
                           StoreAndAttendArgs>> calls_;
};

}  // namespace atom
