// Compiled once per family of rules, with PRECOND_FAMILY naming it: the kernels of mixed.cuh and fixed.cuh, beside
// those of plain.cu.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include "cuda/family.h"
#include "cuda/fixed.cuh"
#include "cuda/mixed.cuh"
#include "rules/family.h"

namespace precond {
inline namespace PRECOND_ISA {
namespace PRECOND_FAMILY {

template <class Rule>
void launch_mixed(const UpdateArgs& a) {
  launch(&update_mixed_kernel<Rule>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.strides, a.scalars,
         a.control);
}
// With parts: one kernel, with an average or without.
template <class Rule>
void launch_parts(const UpdateArgs& a) {
  launch_with(a.noting == nullptr ? 0 : sizeof(SharedStatistics), &update_parts_kernel<Rule>, a.blocks, kThreads,
              a.stream, a.tensors, a.chunks, a.strides, a.scalars, a.control, a.noting);
}
#define PRECOND_KERNEL(name, ...) &launch_mixed<__VA_ARGS__>,
#define PRECOND_PARTS(name, ...) &launch_parts<WithAverage<__VA_ARGS__>>,
extern const LaunchUpdate kMixed[];
const LaunchUpdate kMixed[] = {PRECOND_RULES_AND_PARTS(PRECOND_KERNEL, PRECOND_PARTS, PRECOND_PARTS)};
#undef PRECOND_KERNEL
#undef PRECOND_PARTS

template <class Rule, class P, class G, class... S>
void launch_fixed(const UpdateArgs& a) {
  launch(&update_fixed_kernel<Rule, P, G, S...>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.scalars,
         a.control);
}
template <class Rule, class P, class G, class Mean, class Square, int... K>
constexpr LaunchUpdate fixed_kernel(std::integer_sequence<int, K...>) {
  return &launch_fixed<Rule, P, G, state_format<Rule, K, Mean, Square>...>;
}
template <class Rule, class P, class G, class Mean, class Square>
constexpr LaunchUpdate fixed_kernel() {
  if constexpr (!kOften<Rule> || (Rule::kSquares == 0 && Square::kStoring == Storing::drawn))
    return nullptr;
  else
    return fixed_kernel<Rule, P, G, Mean, Square>(std::make_integer_sequence<int, Rule::kStates>{});
}
template <class Rule>
constexpr FixedKernels fixed_kernels() {
#define PRECOND_KERNEL(...) fixed_kernel<Rule, __VA_ARGS__>(),
  return {{PRECOND_FIXED(PRECOND_KERNEL)}};
#undef PRECOND_KERNEL
}
#define PRECOND_KERNELS(name, ...) fixed_kernels<__VA_ARGS__>(),
#define PRECOND_PARTS(name, ...) FixedKernels{},
extern const FixedKernels kFixed[];
const FixedKernels kFixed[] = {PRECOND_RULES_AND_PARTS(PRECOND_KERNELS, PRECOND_PARTS, PRECOND_PARTS)};
#undef PRECOND_KERNELS
#undef PRECOND_PARTS

}  // namespace PRECOND_FAMILY
}  // namespace PRECOND_ISA
}  // namespace precond
