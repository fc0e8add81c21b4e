// How the host launches kernels, for each .cu that has some.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda_tensors.cuh"

namespace precond {

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + call + ": " + cudaGetErrorString(error));
}

#if defined(__CUDACC__)
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, Args... args) {
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, stream>>>(args...);
  check(cudaGetLastError(), "kernel launch");
}
#else
using cuda_on_host::launch;
#endif

// What an update kernel is launched with.
struct LaunchArgs {
  const DeviceTensor* tensors;
  const DeviceChunk* chunks;
  const Strides* strides;
  const float* rows;
  const Control* control;
  int64_t blocks;
  cudaStream_t stream;
};
using Launcher = void (*)(const LaunchArgs&);

// A rule's kernel for formats that do not stand alone.
Launcher tiled_launcher(int rule);

}  // namespace precond
