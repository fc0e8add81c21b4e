// How the host calls CUDA: checks, guards and launches, for each .cu that needs them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace precond {

#define PRECOND_CUDA_CHECK(call) check(call, #call)

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // said here; kept, it would be reported by somebody else's next check
  throw std::runtime_error(std::string("CUDA: ") + call + ": " + cudaGetErrorString(error));
}

// Sets no device: cudaSetDevice(before), to restore the one of a fresh thread, would make a context on GPU 0 for every
// rank. The caller does it by torch's guard, which knows where there are contexts.
inline void require_current(int device) {
  int current = 0;
  PRECOND_CUDA_CHECK(cudaGetDevice(&current));
  if (current != device)
    throw std::runtime_error("CUDA device " + std::to_string(device) + " must be current, but " +
                             std::to_string(current) + " is");
}

// Lets this thread allocate, free and query events while a graph is being captured, on its stream or by another thread.
// In the default mode such a call fails, and invalidates the capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { PRECOND_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // and, inside, the one before
};

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  PRECOND_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status == cudaStreamCaptureStatusActive;
}

// True once the work before the event is done. "Not ready" is an answer, but the runtime also keeps it as its last
// error, which would fail a later, unrelated check.
inline bool is_done(cudaEvent_t event) {
  const cudaError_t answer = cudaEventQuery(event);
  if (answer != cudaErrorNotReady) return check(answer, "cudaEventQuery"), true;
  cudaGetLastError();
  return false;
}

// Not kernel<<<>>>() and cudaGetLastError(), which also returns the errors of earlier calls.
// `shared`: bytes of memory that a block is given besides what its kernel declares.
template <class... Params, class... Args>
void launch_with(size_t shared, void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream,
                 Args... args) {
#if defined(__CUDACC__)
  const auto start = [&](Params... params) {
    void* addresses[] = {&params...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
                            addresses, shared, stream);
  };
  check(start(args...), "kernel launch");
#else
  static_cast<void>(shared);
  check(cuda_on_host::launch_kernel(kernel, blocks, threads, stream, args...), "kernel launch");
#endif
}
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, Args... args) {
  launch_with(0, kernel, blocks, threads, stream, args...);
}

}  // namespace precond
