#include "tape.h"

namespace atom {
namespace {

// Calls that read a step's inputs, and which.
template <class Args>
bool reads_inputs(const Args&, const StepInputs&) { return true; }
bool reads_inputs(const TakeArgs& args, const StepInputs& in) { return args.ids == in.ids; }
bool reads_inputs(const RotaryArgs& args, const StepInputs& in) { return args.positions == in.positions; }
bool reads_inputs(const StoreArgs& args, const StepInputs& in) { return args.slots == in.slots; }
bool reads_inputs(const AttentionArgs& args, const StepInputs& in) {
  return args.query_start == in.query_start && args.seq_lens == in.seq_lens && args.block_table == in.block_table;
}
bool reads_inputs(const StoreAndAttendArgs& args, const StepInputs& in) {
  return (!args.rotary || reads_inputs(*args.rotary, in)) && reads_inputs(args.store, in) &&
         reads_inputs(args.attention, in);
}

template <class Args>
void give_inputs(Args&, const StepInputs&) {}
void give_inputs(TakeArgs& args, const StepInputs& in) { args.ids = in.ids; }
void give_inputs(RotaryArgs& args, const StepInputs& in) { args.positions = in.positions; }
void give_inputs(StoreArgs& args, const StepInputs& in) { args.slots = in.slots; }
void give_inputs(AttentionArgs& args, const StepInputs& in) {
  args.query_start = in.query_start;
  args.seq_lens = in.seq_lens;
  args.block_table = in.block_table;
  args.block_table_stride = in.block_table_stride;
}
void give_inputs(StoreAndAttendArgs& args, const StepInputs& in) {
  if (args.rotary) give_inputs(*args.rotary, in);
  give_inputs(args.store, in);
  give_inputs(args.attention, in);
}

}  // namespace

void Tape::add(const AttentionArgs& args) {
  const StoreArgs* store = calls_.empty() ? nullptr : std::get_if<StoreArgs>(&calls_.back());
  if (!store) {
    calls_.push_back(args);
    return;
  }
  StoreAndAttendArgs all{{}, *store, args};
  calls_.pop_back();
  const RotaryArgs* rotary = calls_.empty() ? nullptr : std::get_if<RotaryArgs>(&calls_.back());
  if (rotary && rotary->x[0] == args.query && rotary->x[1] == all.store.source[0]) {
    all.rotary = *rotary;
    calls_.pop_back();
  }
  calls_.push_back(all);
}

bool Tape::reads(const StepInputs& inputs) const {
  for (const auto& call : calls_)
    if (!std::visit([&](const auto& args) { return reads_inputs(args, inputs); }, call)) return false;
  return true;
}

int64_t Tape::replay(const StepInputs& inputs, int threads) {
  for (auto& call : calls_) std::visit([&](auto& args) { give_inputs(args, inputs); }, call);
  for (const auto& call : calls_)
    if (const TakeArgs* take = std::get_if<TakeArgs>(&call)) {
      const int64_t wrong = outside(*take);
      if (wrong >= 0) return wrong;
    }
  for (const auto& call : calls_) std::visit([&](const auto& args) { run(args, threads); }, call);
  return -1;
}

}  // namespace atom
