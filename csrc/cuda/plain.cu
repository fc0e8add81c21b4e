// Compiled once per family of rules, with PRECOND_FAMILY naming it: the kernels of plain.cuh, and the family's
// prologue.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <tuple>

#include "cuda/family.h"
#include "cuda/plain.cuh"
#include "rules/family.h"

namespace precond {
inline namespace PRECOND_ISA {
namespace PRECOND_FAMILY {

// Jobs of other families' rules are left to their kernels.
__global__ void scalars_kernel(const ScalarsJob* jobs, int32_t count, const DeviceGroup* groups,
                               const Override* overrides, int32_t override_count, const Control* control, int32_t first,
                               int32_t counts, float* scalars) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= count) return;
  const ScalarsJob job = jobs[j];
  if (job.group < 0) return;
  DeviceGroup group = groups[job.group];
  read_overrides(overrides, override_count, job.group, group.hyper);
  const bool skip = control->skip != 0.0f || counts == 0;
  int32_t number = first;
#define PRECOND_PREPARE(name, ...) \
  if (group.rule == number++) prepare<__VA_ARGS__>(job, group.hyper, skip, scalars + j * kScalarFloats);
#define PRECOND_PARTS(name, ...) PRECOND_PREPARE(name, WithAverage<__VA_ARGS__>)
  PRECOND_RULES_AND_PARTS(PRECOND_PREPARE, PRECOND_PARTS, PRECOND_PARTS)
#undef PRECOND_PREPARE
#undef PRECOND_PARTS
}

void launch_scalars(const ScalarsArgs& a) {
  launch(&scalars_kernel, (a.count + 127) / 128, 128, a.stream, a.jobs, a.count, a.groups, a.overrides,
         a.override_count, a.control, a.first, int32_t(a.counts), a.scalars);
}

template <class Rule, class P, class G, class S>
void launch_update(const UpdateArgs& a) {
  launch(&update_kernel<Rule, P, G, S>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.scalars, a.control);
}
template <class Rule>
void launch_any(const UpdateArgs& a) {
  launch(&update_any_kernel<Rule>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.strides, a.scalars, a.control);
}

// The formats of p, g and states that have a kernel. Those that training makes: p and g alike, or gradients and states
// in fp32 beside weights of 16 bits. Of rules that are taken often, every mix of fp32 and one kind of 16 bits. A kernel
// more is compiled for each of 88 rules and six architectures; other formats have that of mixed.cuh. States of a rule
// without any are counted as p is.
// With parts only rules that are taken often have some, of what a training in fp32 or bf16 makes.
template <class Rule>
constexpr bool has_kernel(Format p, Format g, Format s) {
  if constexpr (kHasParts<Rule>)
    return kOftenWithParts<Rule> && p == g && p != Format::fp16 && (s == Format::fp32 || (s == p && Rule::kMasksOnly));
  const int kinds = (1 << int(p) | 1 << int(g) | 1 << int(s)) & ~(1 << int(Format::fp32));
  if ((kinds & (kinds - 1)) != 0) return false;
  if (Rule::kStates == 0 && s != p) return false;
  if (kOften<Rule> || kOftenMixed<Rule> || p == g) return true;
  return g == Format::fp32 && (s == Format::fp32 || Rule::kStates == 0);
}
using AllFormats = std::tuple<Fp32, Bf16, Fp16>;
template <class Rule, int kP, int kG, int kS>
constexpr LaunchUpdate fast_kernel() {
  if constexpr (has_kernel<Rule>(Format(kP), Format(kG), Format(kS)))
    return &launch_update<Rule, std::tuple_element_t<kP, AllFormats>, std::tuple_element_t<kG, AllFormats>,
                          std::tuple_element_t<kS, AllFormats>>;
  else
    return nullptr;
}
// Strides of rules with parts are for the kernel of mixed.cuh.
template <class Rule>
constexpr LaunchUpdate any_kernel() {
  if constexpr (kHasParts<Rule>)
    return nullptr;
  else
    return &launch_any<Rule>;
}
template <class Rule, int... I>
constexpr PlainKernels kernels_of(std::integer_sequence<int, I...>) {
  return {{fast_kernel<Rule, I / (kPlainFormats * kPlainFormats), I / kPlainFormats % kPlainFormats,
                       I % kPlainFormats>()...,
           any_kernel<Rule>()}};
}
#define PRECOND_KERNELS(name, ...) kernels_of<__VA_ARGS__>(std::make_integer_sequence<int, kAny>{}),
#define PRECOND_MASKS(name, ...) PRECOND_KERNELS(name, WithMasks<__VA_ARGS__>)
#define PRECOND_AVERAGE(name, ...) PRECOND_KERNELS(name, WithAverage<__VA_ARGS__>)
extern const PlainKernels kPlain[];
const PlainKernels kPlain[] = {PRECOND_RULES_AND_PARTS(PRECOND_KERNELS, PRECOND_MASKS, PRECOND_AVERAGE)};
#undef PRECOND_KERNELS
#undef PRECOND_MASKS
#undef PRECOND_AVERAGE

}  // namespace PRECOND_FAMILY
}  // namespace PRECOND_ISA
}  // namespace precond
