// The kernels of mixed.cuh, in a file of their own: nvcc takes minutes for them, side by side with the others.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include "cuda/launch.h"
#include "cuda/mixed.cuh"

namespace precond {
namespace {

template <class Rule>
void launch_tiled(const LaunchArgs& a) {
  launch(&update_tiled_kernel<Rule, FormatsOfTensor>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.strides,
         a.rows, a.control);
}
#define PRECOND_TILED(name, ...) &launch_tiled<__VA_ARGS__>,
constexpr Launcher kTiledLaunchers[] = {PRECOND_ALL_RULES(PRECOND_TILED)};
#undef PRECOND_TILED

}  // namespace

Launcher tiled_launcher(int rule) { return kTiledLaunchers[rule]; }

}  // namespace precond
