// The CUDA kernels that are executed, one CASE a line:
//
//   CASE(title, rule in a list of csrc/rules, formats of p, g and each state, kernel as its template is called)
//
// To add one, add a line, and its bounds to tests/test_machine_code.py; a rule that no line has yet also goes into
// cpu_text.cpp. listed.py reads these lines, build.py leaves out those that are not asked for and finds a kernel in the
// machine code by its last argument, launch.py passes what csrc's launchers pass, by the types of the parameters.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <cstddef>

#include "cuda/fixed.cuh"
#include "cuda/mixed.cuh"
#include "cuda/plain.cuh"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/dual.h"
#include "rules/gauss_newton.h"
#include "rules/lion.h"
#include "rules/parts.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

#define PASTED(a, b) a##b
#define NAMED(line) PASTED(kernel_of_line_, line)
#define CASE(title, rule, formats, ...) \
  extern const void* const NAMED(__LINE__) = reinterpret_cast<const void*>(&__VA_ARGS__);

namespace precond {

// launch.py packs these structures as bytes.
static_assert(sizeof(Operand) == 24 && offsetof(Operand, format) == 8 && offsetof(Operand, strides) == 12 &&
              offsetof(Operand, beside) == 16);
static_assert(kMaxStates == 4 && offsetof(DeviceTensor, numel) == 144 && offsetof(DeviceTensor, place) == 152 &&
              offsetof(DeviceTensor, scalars) == 176 && offsetof(DeviceTensor, sign) == 180 &&
              offsetof(DeviceTensor, draws) == 184 && sizeof(DeviceTensor) == 192);
static_assert(offsetof(DeviceChunk, tensor) == 8 && sizeof(DeviceChunk) == 16);
static_assert(offsetof(Control, skip) == 4 && offsetof(Control, clip_value) == 8 && sizeof(Control) == 12);
static_assert(kMaxDims == 16 && offsetof(Strides, size) == 8 && offsetof(Strides, stride) == 136 &&
              sizeof(Strides) == 264);
static_assert(kThreads == 256 && kBlockElements == 8192);

// clang-format off
// Formats that stand alone: a kernel for each rule and formats.
CASE("AdamW fp32", "adamw", "fp32 fp32 fp32 fp32", update_kernel<Adam<L2>, Fp32, Fp32, Fp32>)
CASE("AdamW bf16", "adamw", "bf16 bf16 bf16 bf16", update_kernel<Adam<L2>, Bf16, Bf16, Bf16>)
CASE("AdamW fp16", "adamw", "fp16 fp16 fp16 fp16", update_kernel<Adam<L2>, Fp16, Fp16, Fp16>)
CASE("AdamW fp32 + bf16 states, nearest", "adamw", "fp32 fp32 bf16 bf16", update_kernel<Adam<L2>, Fp32, Fp32, Bf16>)
CASE("AdamW bf16, fp32 gradients and states", "adamw", "bf16 fp32 fp32 fp32", update_kernel<Adam<L2>, Bf16, Fp32, Fp32>)
CASE("AdamW fp32, fp16 gradients", "adamw", "fp32 fp16 fp32 fp32", update_kernel<Adam<L2>, Fp32, Fp16, Fp32>)
CASE("AdamW fp32 + ema", "adamw+ema", "fp32 fp32 fp32 fp32 fp32", update_kernel<WithParts<Adam<L2>, true>, Fp32, Fp32, Fp32>)
CASE("AdamW fp32, masks", "adamw+parts", "fp32 fp32 fp32 fp32", update_kernel<WithParts<Adam<L2>, false>, Fp32, Fp32, Fp32>)
CASE("SGD momentum fp32", "sgd_momentum", "fp32 fp32 fp32", update_kernel<SGDMomentum<Coupled>, Fp32, Fp32, Fp32>)
CASE("Lion fp32", "lion", "fp32 fp32 fp32", update_kernel<Lion<L2>, Fp32, Fp32, Fp32>)
CASE("Adagrad fp32", "adagrad", "fp32 fp32 fp32", update_kernel<Adagrad<Coupled>, Fp32, Fp32, Fp32>)
CASE("RMSprop, centered, momentum, bf16", "rmsprop_centered_momentum", "bf16 bf16 bf16 bf16 bf16", update_kernel<RMSpropCenteredMomentum<Coupled>, Bf16, Bf16, Bf16>)
CASE("AdamW L1 fp32", "adamw_l1", "fp32 fp32 fp32 fp32", update_kernel<Adam<L1Proximal<AdaptiveThreshold>>, Fp32, Fp32, Fp32>)
CASE("DualDescent, power, momentum, fp32", "dual_power_momentum", "fp32 fp32 fp32", update_kernel<DualMomentum<PowerMap, L2>, Fp32, Fp32, Fp32>)
CASE("GaussNewton, own, root, fp32", "gauss_newton_own_root", "fp32 fp32 fp32 fp32", update_kernel<GaussNewtonOwnRoot<L2>, Fp32, Fp32, Fp32>)

// All others: a kernel for each rule, formats known at run time.
CASE("AdamW bf16, fp32 gradients, mixed states", "adamw", "bf16 fp32 fp32 bf16", update_mixed_kernel<Adam<L2>>)
CASE("AdamW fp32 + bf16 states, v drawn", "adamw", "fp32 fp32 bf16 bf16_stochastic", update_mixed_kernel<Adam<L2>>)
CASE("AdamW split24 + int8", "adamw", "bf16_split24 bf16 int8 uint8", update_mixed_kernel<Adam<L2>>)
CASE("AdamW stochastic + int8", "adamw", "bf16_stochastic bf16 int8 uint8", update_mixed_kernel<Adam<L2>>)
CASE("AdamW stochastic + int4", "adamw", "bf16_stochastic bf16 int4 uint4", update_mixed_kernel<Adam<L2>>)
CASE("AdamW split32 + fp32", "adamw", "bf16_split32 bf16 fp32 fp32", update_mixed_kernel<Adam<L2>>)
CASE("AdamW split24 + int8 + bf16 ema", "adamw+ema", "bf16_split24 bf16 int8 uint8 bf16_stochastic", update_parts_kernel<WithParts<Adam<L2>, true>>)
CASE("AdamW AMSGrad split24 + int8", "adamw_amsgrad", "bf16_split24 bf16 int8 uint8 uint8", update_mixed_kernel<AdamAmsgrad<L2>>)

// Whole chunks: a kernel for each rule and formats that training uses most.
CASE("AdamW split24 + int8, whole", "adamw", "bf16_split24 bf16 int8 uint8", update_fixed_kernel<Adam<L2>, Bf16Split24, Bf16, Codes<true, 8>, Codes<false, 8>>)
CASE("AdamW stochastic + int8, whole", "adamw", "bf16_stochastic bf16 int8 uint8", update_fixed_kernel<Adam<L2>, Bf16Stochastic, Bf16, Codes<true, 8>, Codes<false, 8>>)
CASE("AdamW split24 + int4, whole", "adamw", "bf16_split24 bf16 int4 uint4", update_fixed_kernel<Adam<L2>, Bf16Split24, Bf16, Codes<true, 4>, Codes<false, 4>>)
CASE("AdamW stochastic + int4, whole", "adamw", "bf16_stochastic bf16 int4 uint4", update_fixed_kernel<Adam<L2>, Bf16Stochastic, Bf16, Codes<true, 4>, Codes<false, 4>>)
CASE("AdamW split32 + fp32, whole", "adamw", "bf16_split32 bf16 fp32 fp32", update_fixed_kernel<Adam<L2>, Bf16Split32, Bf16, Fp32, Fp32>)
CASE("AdamW fp32 + bf16 states, whole", "adamw", "fp32 fp32 bf16 bf16_stochastic", update_fixed_kernel<Adam<L2>, Fp32, Fp32, Bf16, Bf16Stochastic>)
CASE("AdamW bf16 + bf16 states, whole", "adamw", "bf16 bf16 bf16 bf16_stochastic", update_fixed_kernel<Adam<L2>, Bf16, Bf16, Bf16, Bf16Stochastic>)
CASE("SGD momentum split24 + int8, whole", "sgd_momentum", "bf16_split24 bf16 int8", update_fixed_kernel<SGDMomentum<Coupled>, Bf16Split24, Bf16, Codes<true, 8>>)
CASE("Lion split24 + int8, whole", "lion", "bf16_split24 bf16 int8", update_fixed_kernel<Lion<L2>, Bf16Split24, Bf16, Codes<true, 8>>)

// Any strides of formats that stand alone, element by element.
CASE("AdamW any layout", "adamw", "bf16 fp32 fp32 bf16", update_any_kernel<Adam<L2>>)
// clang-format on

}  // namespace precond
