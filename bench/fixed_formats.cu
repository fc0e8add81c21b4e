// The kernel for mixed formats, with the formats of what is benchmarked fixed and full runs only: for
// bench/codegen.py, which counts what one path takes. Part of no build.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include "../csrc/cuda/mixed.cuh"
#include "../csrc/rules/adam.h"

namespace precond {

#define PRECOND_FIXED(...)                                                                                  \
  template __global__ void update_mixed_kernel<Adam<L2>, FixedFormats<__VA_ARGS__>>(                        \
      const DeviceTensor* tensors, const DeviceChunk* chunks, const Strides* strides, const float* scalars, \
      const Control* control);
PRECOND_FIXED(Format::bf16_split24, Format::bf16, Format::int8, Format::uint8)
PRECOND_FIXED(Format::bf16_stochastic, Format::bf16, Format::int8, Format::uint8)
PRECOND_FIXED(Format::bf16_stochastic, Format::bf16, Format::int4, Format::uint4)

}  // namespace precond
