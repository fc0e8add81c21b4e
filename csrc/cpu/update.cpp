// The one parallel region of a step; see update.h.
#include "cpu/update.h"

#include <algorithm>

#include "base/denormals.h"
#include "cpu/dispatch.h"
#include "cpu/statistics.h"

namespace precond {

// Below this many elements one thread is quicker than waking a second one.
constexpr int64_t kSerialElements = 32768;

void run_on_cpu(Plan* plan, const std::vector<GroupRow>& groups, const Control& control, int threads,
                const Extras& extras) {
  if (control.skip != 0.0f) return;
  const std::vector<float>& scalars = plan->fill_scalars(groups, extras.factors);

  int64_t elements = 0;
  for (int64_t i = 0; i < plan->size(); ++i)
    if (plan->tensor(i).active) elements += plan->tensor(i).numel;
  if (elements < kSerialElements) threads = 1;
  const bool takes_statistics = extras.sums != nullptr;
  const std::vector<Chunk>& chunks = plan->chunks(threads, takes_statistics ? kNormBlock : kChunkAlign);
  std::vector<int64_t> block_of;
  std::vector<double> table;
  if (takes_statistics) {
    block_of = statistic_blocks(*plan);
    table.resize(size_t(block_of.back()) * kBlockStatistics);
  }
  const std::vector<int32_t>& first = plan->batches();
  const int64_t count = int64_t(chunks.size()), batches = int64_t(first.size());
  threads = int(std::min<int64_t>(threads, batches));

  const UpdateChunk* update = update_table();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const IeeeDenormals ieee;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t b = 0; b < batches; ++b) {
      const int64_t end = b + 1 < batches ? first[size_t(b) + 1] : count;
      for (int64_t c = first[size_t(b)]; c < end; ++c) {
        const Chunk& chunk = chunks[size_t(c)];
        const Tensor& t = plan->tensor(chunk.tensor);
        double* const statistics =
            takes_statistics
                ? &table[size_t(block_of[size_t(chunk.tensor)] + chunk.begin / kNormBlock) * kBlockStatistics]
                : nullptr;
        update[t.rule]({&t, plan->all_strides().data(), &scalars[size_t(t.scalars) * kScalarFloats], &control,
                        groups[size_t(t.group)].sign, chunk.begin, chunk.count, statistics, extras.only});
      }
    }
  }
  if (takes_statistics) fold_statistics(*plan, block_of, table.data(), extras.sums);
  if (!extras.only) plan->count_step();
}

}  // namespace precond
