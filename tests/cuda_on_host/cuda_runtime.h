// Gives the CUDA sources of csrc/ host meanings, so that their indexing, tails, tables, uploads, streams and graphs run
// on the CPU under sanitizers. "Device" memory is a heap block of its own: what was not uploaded is not there. Blocks
// may run on several threads (CUDA_ON_HOST_THREADS), so that ThreadSanitizer sees two blocks that write the same
// element. runtime.h has what the runtime refuses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "block.h"
#include "runtime.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local  // of the block that the worker runs
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = cuda_on_host::Stream*;
using cudaEvent_t = cuda_on_host::Event*;
using cudaGraph_t = cuda_on_host::Graph*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
struct cudaFuncAttributes {};
constexpr unsigned cudaHostAllocDefault = 0, cudaEventDisableTiming = 2;

inline const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  return (text = "error " + std::to_string(error)).c_str();
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_host::last_error;
  return cuda_on_host::last_error = cudaSuccess, error;
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = cuda_on_host::kDevices, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_on_host::current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  if (device < 0 || device >= kDevices) return answer(cudaErrorInvalidDevice);
  runtime().sets += device != current_device;
  return current_device = device, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  if (is_forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  return answer(runtime().attributes[current_device]);
}
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  return cuda_on_host::answer(cuda_on_host::allocate(data, bytes, cuda_on_host::current_device));
}
inline cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  return cuda_on_host::answer(cuda_on_host::allocate(data, bytes, cuda_on_host::kHost));
}
inline cudaError_t cudaFree(void* data) { return cuda_on_host::answer(cuda_on_host::release(data, false)); }
inline cudaError_t cudaFreeHost(void* data) { return cuda_on_host::answer(cuda_on_host::release(data, true)); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  using namespace cuda_on_host;
  return answer(enqueue(stream, {{to, from}, true, [=] { std::memcpy(to, from, bytes); }}, false));
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new cuda_on_host::Event, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  Stream* const stream = stream_of(handle);
  *event = {stream, ++stream->enqueued, stream->captured != nullptr};
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  if (is_forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  if (event->captured) return answer(cudaErrorCapturedEvent);
  const bool done = event->stream == nullptr || event->stream->waited_for >= event->at;
  return answer(done ? cudaSuccess : cudaErrorNotReady);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  if (is_forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  return answer(wait_for(stream_of(handle)));
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  *stream = new Stream{current_device, {}, 0, 0, nullptr, false};
  runtime().streams.insert(*stream);
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, cuda_on_host::capture_mode), cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  bool elsewhere = false;
  each_stream([&](Stream* stream) { elsewhere = elsewhere || stream->captured != nullptr; });
  if (handle == nullptr && elsewhere) return answer(cudaErrorStreamCaptureImplicit);
  *status = stream_of(handle)->captured != nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return cuda_on_host::answer(cuda_on_host::begin_capture(stream));
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return cuda_on_host::answer(cuda_on_host::end_capture(stream, graph));
}

namespace cuda_on_host {

template <class T>
void add_address(std::vector<const void*>* addresses, const T& argument) {
  if constexpr (std::is_pointer_v<T>) addresses->push_back(argument);
}

// cudaLaunchKernel, with its arguments by their types.
template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, Args... args) {
  if (blocks < 1 || blocks >= int64_t(1) << 31 || threads < 1 || threads > 1024)
    return answer(cudaErrorInvalidConfiguration);
  Work work;
  (add_address(&work.addresses, args), ...);
  work.pinned_too = false;
  work.run = [=] {
    const char* wanted = std::getenv("CUDA_ON_HOST_THREADS");
    const int64_t workers = wanted == nullptr ? 1 : std::atoi(wanted);
    static thread_local std::vector<std::unique_ptr<Block>> runners;  // kept: fibers are dear to ThreadSanitizer
    while (int64_t(runners.size()) < workers) runners.push_back(std::make_unique<Block>());
    const auto some_blocks = [=, own = runners.data()](int64_t first) {
      blockDim.x = unsigned(threads);
      for (int64_t block = first; block < blocks; block += workers) {
        blockIdx.x = unsigned(block);
        own[first]->run(threads, [&] { kernel(args...); });
      }
    };
    std::vector<std::thread> pool;
    for (int64_t i = 1; i < workers; ++i) pool.emplace_back(some_blocks, i);
    some_blocks(0);
    for (std::thread& thread : pool) thread.join();
  };
  return answer(enqueue(stream, std::move(work), true));
}

}  // namespace cuda_on_host
