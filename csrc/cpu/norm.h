// The norm on the CPU, in the order of plan/norm.h.
#pragma once

#include "plan/norm.h"

namespace precond {

// Of `n` gradients from element `begin` on, at most kNormBlock: their sum of squares, or the largest magnitude. One
// function per instruction set.
using NormOfBlock = double (*)(const Operand& g, const Strides* strides, int64_t begin, int64_t n, bool inf);

// Fills clip.total: blocks in one parallel region, their sums added by one thread.
void measure_on_cpu(const Plan& plan, const Clip& clip, int threads);

}  // namespace precond
