// Tables in device memory, kept like the host's: for executor.cu.
//
// A captured graph copies its tables again at each replay, so the memory that it reads and writes must stay: a plan
// that was captured frees nothing until it is destroyed, and the optimizer keeps such a plan as long as it lives.
#pragma once

#include <cstring>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace precond {

// Memory that nobody needs any more. A destructor only puts it here: Python's garbage collector may run it while a
// graph is being captured, by any thread, and to free memory then is forbidden. The next step that is not captured
// frees it.
class Discarded {
 public:
  using Free = cudaError_t (*)(void*);
  static Discarded& of_process() {
    static Discarded* const all = new Discarded;  // never destroyed: at exit the driver may be gone first
    return *all;
  }
  void add(void* what, Free how) {
    if (what == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    items_.emplace_back(what, how);
  }
  void free_all() {
    std::vector<std::pair<void*, Free>> items;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      items.swap(items_);
    }
    cudaError_t first = cudaSuccess;
    for (const auto& [what, how] : items)
      if (const cudaError_t error = how(what); first == cudaSuccess) first = error;
    check(first, "free");
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<void*, Free>> items_;
};

inline void discard_device(void* data) {
  Discarded::of_process().add(data, [](void* what) { return cudaFree(what); });
}
inline void discard_pinned(void* data) {
  Discarded::of_process().add(data, [](void* what) { return cudaFreeHost(what); });
}
inline void discard_event(cudaEvent_t event) {
  Discarded::of_process().add(event, [](void* what) { return cudaEventDestroy(static_cast<cudaEvent_t>(what)); });
}

// How one step uses its tables.
struct Use {
  cudaStream_t stream;
  bool capturing;
  // A graph was or is being captured. Its replays write the tables, so the host no longer knows what is there; and the
  // tables' memory must stay.
  bool captured;
};

// Pinned memory that the uploads of one table read from. A block is used again when its copy has run; one that a graph
// captured stays, since every replay reads it.
class Staging {
 public:
  ~Staging() {
    for (const Block& block : blocks_) {
      discard_event(block.done);
      discard_pinned(block.data);
    }
    for (void* data : captured_) discard_pinned(data);
  }

  void copy(void* to, const void* from, size_t bytes, const Use& use) {
    if (use.capturing) {
      captured_.push_back(pinned(bytes));
      return send(to, captured_.back(), from, bytes, use.stream);
    }
    const Block block = take(bytes);
    blocks_.push_back(block);
    send(to, block.data, from, bytes, use.stream);
    PRECOND_CUDA_CHECK(cudaEventRecord(block.done, use.stream));
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
    cudaEvent_t done;
  };
  static void* pinned(size_t bytes) {
    void* data = nullptr;
    PRECOND_CUDA_CHECK(cudaHostAlloc(&data, bytes, cudaHostAllocDefault));
    return data;
  }
  static void send(void* to, void* block, const void* from, size_t bytes, cudaStream_t stream) {
    std::memcpy(block, from, bytes);
    PRECOND_CUDA_CHECK(cudaMemcpyAsync(to, block, bytes, cudaMemcpyHostToDevice, stream));
  }
  // Only the oldest block is asked: where it is still in use, so are the others.
  Block take(size_t bytes) {
    while (!blocks_.empty() && is_done(blocks_.front().done)) {
      const Block block = blocks_.front();
      blocks_.pop_front();
      if (block.bytes >= bytes) return block;
      discard_event(block.done);
      discard_pinned(block.data);
    }
    Block block{nullptr, bytes + bytes / 2, nullptr};
    block.data = pinned(block.bytes);
    PRECOND_CUDA_CHECK(cudaEventCreateWithFlags(&block.done, cudaEventDisableTiming));
    return block;
  }
  std::deque<Block> blocks_;  // the oldest first
  std::vector<void*> captured_;
};

// A table in device memory and what the host last put there. Compared as bytes: a T has no padding, or padding of
// zeros.
template <class T>
class Table {
 public:
  Table() = default;
  Table(const Table&) = delete;
  ~Table() {
    discard_device(device_);
    for (void* data : outgrown_) discard_device(data);
  }
  T* device() const { return device_; }
  std::vector<T> host;

  // Room for n elements that a kernel writes; the host then no longer knows the content.
  T* room_for(size_t n, const Use& use) {
    sent_.clear();
    if (capacity_ >= n) return device_;
    if (use.captured)
      outgrown_.push_back(device_);
    else
      discard_device(device_);
    device_ = nullptr;
    capacity_ = 0;
    const size_t capacity = n + n / 2;
    PRECOND_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&device_), capacity * sizeof(T)));
    capacity_ = capacity;
    return device_;
  }

  void upload(const Use& use) {
    const size_t bytes = host.size() * sizeof(T);
    if (bytes == 0) return;
    if (!use.captured && sent_.size() == host.size() && std::memcmp(sent_.data(), host.data(), bytes) == 0) return;
    room_for(host.size(), use);
    staging_.copy(device_, host.data(), bytes, use);
    sent_ = host;
  }

 private:
  T* device_ = nullptr;
  size_t capacity_ = 0;
  std::vector<T> sent_;
  std::vector<void*> outgrown_;  // that a graph may still use
  Staging staging_;
};

}  // namespace precond
