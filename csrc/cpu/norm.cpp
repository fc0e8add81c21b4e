// The norm's blocks and their sums; see norm.h.
#include "cpu/norm.h"

#include <algorithm>

#include "base/denormals.h"
#include "cpu/dispatch.h"

namespace precond {
namespace {

// Blocks that a thread takes at a time. Fewer than that in all are quicker on one thread than a second one is awake.
constexpr int64_t kBatch = 16;

// Up to kNormBlock numbers of the table.
double folded(const double* values, int64_t n, bool inf) {
  double lanes[kNormLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    double& lane = lanes[i % kNormLanes];
    lane = inf ? larger(lane, values[i]) : lane + values[i];
  }
  for (int64_t half = kNormLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = inf ? larger(lanes[i], lanes[i + half]) : lanes[i] + lanes[i + half];
  return lanes[0];
}

double fold(double* values, int64_t n, bool inf) {
  for (; n > 1; n = (n + kNormBlock - 1) / kNormBlock)
    for (int64_t begin = 0; begin < n; begin += kNormBlock)
      values[begin / kNormBlock] = folded(values + begin, std::min(kNormBlock, n - begin), inf);
  return n == 0 ? 0.0 : values[0];
}

}  // namespace

void measure_on_cpu(const Plan& plan, const Clip& clip, int threads) {
  const NormTable table = norm_table(plan, clip.classes);
  struct Part {
    int64_t first;
    const Tensor* tensor;
  };
  std::vector<Part> parts;
  for (int c = 0; c < clip.classes; ++c)
    for (int64_t i = 0; i < plan.size(); ++i)
      if (plan.tensor(i).norm_class == c && table.first[size_t(i)] >= 0 && plan.tensor(i).numel > 0)
        parts.push_back({table.first[size_t(i)], &plan.tensor(i)});
  std::vector<double> sums(size_t(table.begin.back()));
  const int64_t blocks = table.begin.back(), batches = (blocks + kBatch - 1) / kBatch;
  threads = int(std::clamp<int64_t>(batches, 1, threads));
  const NormOfBlock norm_of_block = norm_function();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const IeeeDenormals ieee;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t k = 0; k < batches; ++k) {
      // From the last to the first, where the update begins: what a cache keeps then serves it.
      const int64_t begin = (batches - 1 - k) * kBatch, end = std::min(blocks, begin + kBatch);
      auto part = std::upper_bound(parts.begin(), parts.end(), begin,
                                   [](int64_t block, const Part& p) { return block < p.first; }) -
                  1;
      for (int64_t block = begin; block < end; ++block) {
        while (part + 1 != parts.end() && (part + 1)->first <= block) ++part;
        const int64_t from = (block - part->first) * kNormBlock;
        sums[size_t(block)] = norm_of_block(part->tensor->g, plan.all_strides().data(), from,
                                            std::min(kNormBlock, part->tensor->numel - from), clip.inf != 0);
      }
    }
  }
  for (int c = 0; c < clip.classes; ++c) {
    const int64_t begin = table.begin[size_t(c)];
    clip.total[c] = fold(sums.data() + begin, table.begin[size_t(c) + 1] - begin, clip.inf != 0);
  }
}

}  // namespace precond
