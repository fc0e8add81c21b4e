// Tables in device memory, kept like the host's: for cuda_plan.cu.
#pragma once

#include <cstring>
#include <vector>

#include "cuda_launch.h"

namespace precond {

#define PRECOND_CUDA_CHECK(call) check(call, #call)

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    PRECOND_CUDA_CHECK(cudaGetDevice(&before_));
    if (device != before_) PRECOND_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// Pinned memory that uploads read from. A block is used again only after its copy has run; one that a graph captured
// stays, since every replay reads it.
class Staging {
 public:
  ~Staging() {
    for (Block& block : blocks_) {
      cudaEventDestroy(block.done);
      cudaFreeHost(block.data);
    }
  }
  void copy(void* to, const void* from, size_t bytes, cudaStream_t stream, bool capturing) {
    Block& block = find(bytes);
    std::memcpy(block.data, from, bytes);
    PRECOND_CUDA_CHECK(cudaMemcpyAsync(to, block.data, bytes, cudaMemcpyHostToDevice, stream));
    if (capturing)
      block.captured = true;
    else
      PRECOND_CUDA_CHECK(cudaEventRecord(block.done, stream));
  }
  // So that a capture, which may not allocate, finds a free block of this size.
  void reserve(size_t bytes) { find(bytes); }

 private:
  struct Block {
    void* data;
    size_t bytes;
    cudaEvent_t done;
    bool captured;
  };
  Block& find(size_t bytes) {
    for (Block& block : blocks_)
      if (!block.captured && block.bytes >= bytes && cudaEventQuery(block.done) == cudaSuccess) return block;
    Block block{nullptr, bytes + bytes / 2 + 4096, nullptr, false};
    PRECOND_CUDA_CHECK(cudaHostAlloc(&block.data, block.bytes, cudaHostAllocDefault));
    PRECOND_CUDA_CHECK(cudaEventCreateWithFlags(&block.done, cudaEventDisableTiming));
    blocks_.push_back(block);
    return blocks_.back();
  }
  std::vector<Block> blocks_;
};

// A table in device memory and what the host last put there.
template <class T>
class Table {
 public:
  ~Table() { cudaFree(device_); }
  T* device() const { return device_; }
  std::vector<T> host;

  // Room for n elements that a kernel writes; the host then no longer knows the content.
  T* room_for(size_t n) {
    sent_.clear();
    if (capacity_ >= n) return device_;
    PRECOND_CUDA_CHECK(cudaFree(device_));  // waits for work that still reads it; only when a table grows
    device_ = nullptr;
    capacity_ = n + n / 2;
    PRECOND_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&device_), capacity_ * sizeof(T)));
    return device_;
  }

  // `always`: the device's copy may be another one, because a captured graph writes it at each replay.
  void upload(Staging* staging, cudaStream_t stream, bool capturing, bool always) {
    const size_t bytes = host.size() * sizeof(T);
    if (bytes == 0) return;
    if (!always && sent_.size() == host.size() && std::memcmp(sent_.data(), host.data(), bytes) == 0) return;
    room_for(host.size());
    staging->copy(device_, host.data(), bytes, stream, capturing);
    if (!capturing) staging->reserve(bytes);
    sent_ = host;
  }

 private:
  T* device_ = nullptr;
  size_t capacity_ = 0;
  std::vector<T> sent_;
};

}  // namespace precond
