// The gradient transform of batch normalisation preconditioning in one pass over the rows of a weight. Called by
// precond/_wrappers/standardised.py, which has the same formula in torch.
#pragma once

#include <cstdint>

namespace precond {

// Contiguous fp32: `weight_grad` and `weight_out` have `rows` rows of `length`, `bias_grad` and `bias_out` an element
// per row. `mean` and `scale` (1 / (q2 s2)) have a row of `length` per `rows_per_group` rows.
struct BnpGradients {
  const float *weight_grad, *bias_grad, *mean, *scale;
  float *weight_out, *bias_out;
  int64_t rows, length, rows_per_group;
  float inv_q2;
};

// One row of a weight; returns sum_j out_j mean_j.
using BnpRow = float (*)(const float* g, float bias_grad, const float* mean, const float* scale, int64_t length,
                         float* out);

// The same bits for any count of threads and on every instruction set.
void precondition(const BnpGradients& gradients, int threads);

}  // namespace precond
