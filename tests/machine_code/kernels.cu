// The CUDA kernels that are executed, one CASE a line:
//
//   CASE(title, rule, formats of p, g and each state, kernel as its template is called)
//
// To add one, add a line, and its bounds to tests/test_machine_code.py; a rule that no line has yet also goes into
// cpu_text.cpp. listed.py reads these lines, build.py leaves out those that are not asked for and finds a kernel in the
// machine code by its last argument, launch.py passes what csrc's launchers pass, by the types of the parameters.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <cstddef>

#include "csrc/cuda_kernel.cuh"
#include "csrc/cuda_tiled.cuh"

#define PASTED(a, b) a##b
#define NAMED(line) PASTED(kernel_of_line_, line)
#define CASE(title, rule, formats, ...) \
  extern const void* const NAMED(__LINE__) = reinterpret_cast<const void*>(&__VA_ARGS__);

namespace precond {

// launch.py packs these structures as bytes.
static_assert(sizeof(Operand) == 24 && offsetof(Operand, format) == 8 && offsetof(Operand, strides) == 12 &&
              offsetof(Operand, beside) == 16);
static_assert(kMaxStates == 3 && offsetof(DeviceTensor, numel) == 120 && offsetof(DeviceTensor, place) == 128 &&
              offsetof(DeviceTensor, row) == 152 && offsetof(DeviceTensor, sign) == 156 &&
              offsetof(DeviceTensor, draws) == 160 && sizeof(DeviceTensor) == 168);
static_assert(offsetof(DeviceChunk, tensor) == 8 && sizeof(DeviceChunk) == 16);
static_assert(offsetof(Control, skip) == 4 && offsetof(Control, clip_value) == 8 && sizeof(Control) == 12);
static_assert(kThreads == 256 && kBlockElements == 8192);

// clang-format off
// Formats that stand alone: a kernel for each rule and formats.
CASE("AdamW fp32", "Adam<L2>", "fp32 fp32 fp32 fp32", update_kernel<Adam<L2>, Fp32, Fp32, Fp32>)
CASE("AdamW bf16", "Adam<L2>", "bf16 bf16 bf16 bf16", update_kernel<Adam<L2>, Bf16, Bf16, Bf16>)
CASE("AdamW fp16", "Adam<L2>", "fp16 fp16 fp16 fp16", update_kernel<Adam<L2>, Fp16, Fp16, Fp16>)
CASE("AdamW fp32 + bf16 states, nearest", "Adam<L2>", "fp32 fp32 bf16 bf16", update_kernel<Adam<L2>, Fp32, Fp32, Bf16>)
CASE("SGD momentum fp32", "SGDMomentum<Coupled>", "fp32 fp32 fp32", update_kernel<SGDMomentum<Coupled>, Fp32, Fp32, Fp32>)
CASE("Lion fp32", "Lion<L2>", "fp32 fp32 fp32", update_kernel<Lion<L2>, Fp32, Fp32, Fp32>)
CASE("Adagrad fp32", "Adagrad<Coupled>", "fp32 fp32 fp32", update_kernel<Adagrad<Coupled>, Fp32, Fp32, Fp32>)

// All others: a kernel for each rule, formats known at run time.
CASE("AdamW fp32 + bf16 states, v drawn", "Adam<L2>", "fp32 fp32 bf16 bf16_stochastic", update_tiled_kernel<Adam<L2>, FormatsOfTensor>)
CASE("AdamW split24 + int8", "Adam<L2>", "bf16_split24 bf16 int8 uint8", update_tiled_kernel<Adam<L2>, FormatsOfTensor>)
CASE("AdamW stochastic + int8", "Adam<L2>", "bf16_stochastic bf16 int8 uint8", update_tiled_kernel<Adam<L2>, FormatsOfTensor>)
CASE("AdamW stochastic + int4", "Adam<L2>", "bf16_stochastic bf16 int4 uint4", update_tiled_kernel<Adam<L2>, FormatsOfTensor>)
CASE("AdamW split32 + fp32", "Adam<L2>", "bf16_split32 bf16 fp32 fp32", update_tiled_kernel<Adam<L2>, FormatsOfTensor>)
// clang-format on

}  // namespace precond
