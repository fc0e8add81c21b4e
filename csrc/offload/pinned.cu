// See pinned.h. Host code alone, compiled with the CUDA sources.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <algorithm>
#include <map>
#include <mutex>

#include "cuda/tables.h"
#include "offload/pinned.h"

namespace precond {
namespace {

// What is pinned, for Pinned::has.
struct Blocks {
  std::mutex mutex;
  std::map<const char*, size_t> bytes;
  static Blocks& of_process() {
    static Blocks& all = *new Blocks;
    return all;
  }
};

}  // namespace

Pinned::Pinned(size_t bytes) : bytes_(bytes) {
  const RelaxedCapture relaxed;
  PRECOND_CUDA_CHECK(cudaHostAlloc(&data_, std::max(bytes, size_t(1)), cudaHostAllocDefault));
  Blocks& blocks = Blocks::of_process();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  blocks.bytes[static_cast<const char*>(data_)] = bytes;
}

Pinned::~Pinned() {
  if (data_ == nullptr) return;
  {
    Blocks& blocks = Blocks::of_process();
    const std::lock_guard<std::mutex> lock(blocks.mutex);
    blocks.bytes.erase(static_cast<const char*>(data_));
  }
  discard_pinned(data_);
}

bool Pinned::has(const void* address) {
  Blocks& blocks = Blocks::of_process();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  auto found = blocks.bytes.upper_bound(static_cast<const char*>(address));
  if (found == blocks.bytes.begin()) return false;
  --found;
  return static_cast<const char*>(address) < found->first + found->second;
}

}  // namespace precond
