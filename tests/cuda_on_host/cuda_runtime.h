// Gives the CUDA sources of csrc/ host meanings, so that their indexing, tails, tables and uploads run on the CPU under
// sanitizers. "Device" memory is a heap block of its own: what was not uploaded is not there. Blocks may run on several
// threads (CUDA_ON_HOST_THREADS), so that ThreadSanitizer sees two blocks that write the same element.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "block.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local  // of the block that the worker runs
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaError_t = int;
using cudaStream_t = struct Stream*;
using cudaEvent_t = struct Event*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
constexpr unsigned cudaHostAllocDefault = 0, cudaEventDisableTiming = 2;

inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::malloc(bytes);
  if (*data == nullptr) return 2;
  std::memset(*data, 0xff, bytes);  // NaN until something is written
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }
inline cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) { return cudaMalloc(data, bytes); }
inline cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = nullptr, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

namespace cuda_on_host {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t, Args... args) {
  const char* wanted = std::getenv("CUDA_ON_HOST_THREADS");
  const int64_t workers = wanted == nullptr ? 1 : std::atoi(wanted);
  static thread_local std::vector<std::unique_ptr<Block>> runners;  // kept: fibers are dear to ThreadSanitizer
  while (int64_t(runners.size()) < workers) runners.push_back(std::make_unique<Block>());
  const auto work = [=, own = runners.data()](int64_t first) {
    blockDim.x = unsigned(threads);
    for (int64_t block = first; block < blocks; block += workers) {
      blockIdx.x = unsigned(block);
      own[first]->run(threads, [&] { kernel(args...); });
    }
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < workers; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace cuda_on_host
