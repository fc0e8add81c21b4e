// What streams do with numbers in pinned memory: wait for one, write one. The driver's, found at run time, so that
// nothing is linked with it.
#pragma once

#include "cuda/launch.h"

namespace precond {

class MemoryOperations {
 public:
  static const MemoryOperations& of_process() {
    static const MemoryOperations all;
    return all;
  }
  // Until the number, taken modulo 2^32, is at least `value`.
  void wait(cudaStream_t stream, const uint32_t* number, uint32_t value) const {
    check(wait_(stream, reinterpret_cast<uintptr_t>(number), value, 0), "cuStreamWaitValue32");
  }
  // After all that the stream has been given before, and seen by whoever reads the number.
  void write(cudaStream_t stream, uint32_t* number, uint32_t value) const {
    check(write_(stream, reinterpret_cast<uintptr_t>(number), value, 0), "cuStreamWriteValue32");
  }

 private:
  // CUstream, CUdeviceptr, cuuint32_t, flags; 0 as flags is GEQ, and a write with a barrier before it.
  using OnNumber = int (*)(cudaStream_t, unsigned long long, uint32_t, unsigned);
  MemoryOperations() : wait_(found("cuStreamWaitValue32")), write_(found("cuStreamWriteValue32")) {}
  static OnNumber found(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &result);
#endif
    check(error, "cudaGetDriverEntryPoint");
    if (result != cudaDriverEntryPointSuccess || entry == nullptr)
      throw std::runtime_error("offload needs a driver of CUDA 12 or newer: it has no " + std::string(name));
    return reinterpret_cast<OnNumber>(entry);
  }
  static void check(int error, const char* call) {
    if (error != 0) throw std::runtime_error("CUDA: " + std::string(call) + ": error " + std::to_string(error));
  }

  OnNumber wait_, write_;
};

}  // namespace precond
