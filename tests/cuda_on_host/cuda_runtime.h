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
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDefault };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
struct cudaFuncAttributes {};
constexpr unsigned cudaHostAllocDefault = 0, cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1;
constexpr unsigned long long cudaEnableDefault = 0;
#define CUDART_VERSION 13000

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
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  Stream* const stream = stream_of(handle);
  const bool down = kind == cudaMemcpyDeviceToHost, up = kind == cudaMemcpyHostToDevice;
  // With other memory of the host a copy waits for the device, in the calling thread.
  if (stream->engine != nullptr && ((down && !is_pinned(to)) || (up && !is_pinned(from))))
    return answer(cudaErrorInvalidValue);
  trace(down ? Kind::kDownload : up ? Kind::kUpload : Kind::kOtherCopy, stream, down ? from : to, bytes);
  return answer(enqueue(handle, {{to, from}, true, [=] { std::memcpy(to, from, bytes); }}, false));
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new cuda_on_host::Event, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  Stream* const stream = stream_of(handle);
  if (stream->device != current_device) return answer(cudaErrorInvalidResourceHandle);  // where the event was made
  trace(Kind::kRecord, stream, event, 0);
  if (stream->engine != nullptr) {
    *event = {stream, stream->engine->given(), false};
    return cudaSuccess;
  }
  *event = {stream, ++stream->enqueued, stream->captured != nullptr};
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  using namespace cuda_on_host;
  std::unique_lock<std::recursive_mutex> lock(runtime().mutex);
  Stream* const stream = stream_of(handle);
  trace(Kind::kWaitForEvent, stream, event, 0);
  if (event->captured || stream->captured != nullptr) return answer(cudaErrorStreamCaptureUnsupported);
  if (event->stream == nullptr) return cudaSuccess;
  if (event->stream->engine == nullptr) return answer(run_copies(event->stream));  // its kernels have run
  const Event at = *event;
  if (stream->engine != nullptr) return stream->engine->add([at] { at.stream->engine->wait_for(at.at); }), cudaSuccess;
  lock.unlock();
  at.stream->engine->wait_for(at.at);  // at once: what reads the results next need not be a launch
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  if (is_forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  if (event->captured) return answer(cudaErrorCapturedEvent);
  const bool done =
      event->stream == nullptr || (event->stream->engine != nullptr ? event->stream->engine->has_done(event->at)
                                                                    : event->stream->waited_for >= event->at);
  return answer(done ? cudaSuccess : cudaErrorNotReady);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  using namespace cuda_on_host;
  std::unique_lock<std::recursive_mutex> lock(runtime().mutex);
  if (is_forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  Stream* const stream = stream_of(handle);
  if (stream->engine == nullptr) return answer(wait_for(stream));
  lock.unlock();
  stream->engine->wait_for(stream->engine->given());
  return answer(stream->engine->error);
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  *stream = new Stream{current_device, {}, 0, 0, nullptr, false, nullptr};
  runtime().streams.insert(*stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  if (is_forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  *stream = new Stream{current_device, {}, 0, 0, nullptr, false, std::make_unique<Engine>()};
  runtime().streams.insert(*stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  runtime().streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t handle) {
  using namespace cuda_on_host;
  const Lock lock(runtime().mutex);
  if (is_forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  Stream* const stream = stream_of(handle);
  if (stream->engine == nullptr) return answer(cudaErrorNotReady);
  if (const int error = stream->engine->error) return answer(error);
  return answer(stream->engine->has_done(stream->engine->given()) ? cudaSuccess : cudaErrorNotReady);
}
namespace cuda_on_host {
inline int stream_wait_value(cudaStream_t stream, unsigned long long address, uint32_t value, unsigned) {
  const Lock lock(runtime().mutex);
  auto* const number = reinterpret_cast<uint32_t*>(uintptr_t(address));
  if (stream->engine == nullptr || !is_pinned(number)) return cudaErrorInvalidValue;
  trace(Kind::kWaitForNumber, stream, number, value);
  stream->engine->add([=] {
    while (int32_t(__atomic_load_n(number, __ATOMIC_ACQUIRE) - value) < 0) std::this_thread::yield();
  });
  return stream->engine->error;
}
inline int stream_write_value(cudaStream_t stream, unsigned long long address, uint32_t value, unsigned) {
  const Lock lock(runtime().mutex);
  auto* const number = reinterpret_cast<uint32_t*>(uintptr_t(address));
  if (stream->engine == nullptr || !is_pinned(number)) return cudaErrorInvalidValue;
  trace(Kind::kWriteNumber, stream, number, value);
  stream->engine->add([=] { __atomic_store_n(number, value, __ATOMIC_RELEASE); });
  return stream->engine->error;
}
}  // namespace cuda_on_host
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool waits = std::strcmp(name, "cuStreamWaitValue32") == 0;
  if (!waits && std::strcmp(name, "cuStreamWriteValue32") != 0)
    return *result = cudaDriverEntryPointSymbolNotFound, cudaSuccess;
  *entry = reinterpret_cast<void*>(waits ? &cuda_on_host::stream_wait_value : &cuda_on_host::stream_write_value);
  return *result = cudaDriverEntryPointSuccess, cudaSuccess;
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
