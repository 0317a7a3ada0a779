// Weights live in huge pages where the system has them: a token reads them all, and 4 KiB pages cost translations.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace atom_memory {

constexpr size_t kPage = size_t(2) << 20, kChunk = size_t(32) << 20;

// Tensors are cut from chunks in order; a chunk is freed with its last tensor.
inline std::shared_ptr<char> chunk(size_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  char* data = (char*)std::aligned_alloc(kPage, bytes);
  if (!data) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {data, [](char* p) { std::free(p); }};
}

// Of a tensor, in whole cache lines.
inline size_t bytes_of(at::IntArrayRef shape, at::ScalarType type) {
  const size_t count = std::accumulate(shape.begin(), shape.end(), size_t(1), std::multiplies<size_t>());
  return (count * c10::elementSize(type) + 63) / 64 * 64;
}

inline at::Tensor allocate(at::IntArrayRef shape, at::ScalarType type) {
  static std::mutex mutex;
  static std::weak_ptr<char> current;
  static size_t used = 0;
  const size_t bytes = bytes_of(shape, type);
  std::shared_ptr<char> owner;
  char* data;
  if (bytes >= kChunk / 2) {
    owner = chunk(bytes);
    data = owner.get();
  } else {
    const std::lock_guard<std::mutex> lock(mutex);
    owner = current.lock();
    if (!owner || used + bytes > kChunk) {
      owner = chunk(kChunk);
      current = owner;
      used = 0;
    }
    data = owner.get() + used;
    used += bytes;
  }
  return at::from_blob(data, shape, [owner](void*) {}, at::TensorOptions().dtype(type));
}

}  // namespace atom_memory
