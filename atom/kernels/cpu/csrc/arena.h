// Memory of the tensors between the kernels of recorded steps: reused as each is freed, and never given back while
// a tape may write to it.
#pragma once
#include <iterator>
#include <map>

#include "memory.h"

namespace atom_memory {

// First fit among free ranges. All tapes of an engine share one: each begins with all of it free.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  at::Tensor tensor(at::IntArrayRef shape, at::ScalarType type) {
    const size_t bytes = std::max<size_t>(64, bytes_of(shape, type));  // every tensor has an address of its own
    char* data = take(bytes);
    return at::from_blob(data, shape, [arena = shared_from_this(), data, bytes](void*) { arena->give(data, bytes); },
                         at::TensorOptions().dtype(type));
  }

 private:
  static constexpr size_t kArenaChunk = size_t(8) << 20;

  char* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = free_.begin();
    while (found != free_.end() && found->second < bytes) ++found;
    if (found == free_.end()) {
      const size_t size = std::max(kArenaChunk, bytes);
      chunks_.push_back(chunk(size));
      found = free_.emplace(chunks_.back().get(), size).first;
    }
    char* data = found->first;
    const size_t rest = found->second - bytes;
    free_.erase(found);
    if (rest) free_.emplace(data + bytes, rest);
    return data;
  }

  void give(char* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto here = free_.emplace(data, bytes).first;
    const auto next = std::next(here);
    if (next != free_.end() && here->first + here->second == next->first) {
      here->second += next->second;
      free_.erase(next);
    }
    if (here == free_.begin()) return;
    const auto before = std::prev(here);
    if (before->first + before->second != here->first) return;
    before->second += here->second;
    free_.erase(here);
  }

  std::mutex mutex_;
  std::map<char*, size_t> free_;  // address -> bytes; neighbours are merged
  std::vector<std::shared_ptr<char>> chunks_;
};

}  // namespace atom_memory
