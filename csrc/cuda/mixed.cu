// Compiled once per family of rules, with PRECOND_FAMILY naming it: the kernels of mixed.cuh, beside those of plain.cu.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include "cuda/family.h"
#include "cuda/mixed.cuh"
#include "rules/family.h"

namespace precond {
inline namespace PRECOND_ISA {
namespace PRECOND_FAMILY {

template <class Rule>
void launch_mixed(const UpdateArgs& a) {
  launch(&update_mixed_kernel<Rule, FormatsOfTensor>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.strides,
         a.scalars, a.control);
}
#define PRECOND_KERNEL(name, ...) &launch_mixed<__VA_ARGS__>,
extern const LaunchUpdate kMixed[];
const LaunchUpdate kMixed[] = {PRECOND_RULES(PRECOND_KERNEL)};
#undef PRECOND_KERNEL

}  // namespace PRECOND_FAMILY
}  // namespace PRECOND_ISA
}  // namespace precond
