// Chunking, scalars and the one parallel region of a step; see plan.h.
#include "plan/plan.h"

#include <algorithm>

#include "base/denormals.h"
#include "cpu/dispatch.h"

namespace precond {
namespace {

// Below this many elements one thread is quicker than waking a second one.
constexpr int64_t kSerialElements = 32768;
// What a chunk costs beyond its elements, in elements: the call and the row.
constexpr int64_t kChunkOverhead = 64;

}  // namespace

int32_t Plan::add(const Tensor& tensor) {
  tensors_.push_back(tensor);
  cut_for_ = 0;
  return int32_t(tensors_.size()) - 1;
}

const std::vector<Chunk>& Plan::chunks(int threads) {
  if (cut_for_ == threads) return chunks_;
  cut_for_ = threads;
  int64_t size = fixed_chunk_;
  if (size == 0) {
    int64_t total = 0;
    for (const Tensor& t : tensors_) total += t.numel;
    size = std::clamp(total / (kChunksPerThread * threads), kMinChunk, kMaxChunk);
  }
  size = (size + kChunkAlign - 1) / kChunkAlign * kChunkAlign;
  chunks_.clear();
  batches_.assign(1, 0);
  int64_t cost = 0;
  for (int32_t i = 0; i < int32_t(tensors_.size()); ++i) {
    for (int64_t begin = 0; begin < tensors_[i].numel; begin += size) {
      const int64_t count = std::min(size, tensors_[i].numel - begin);
      if (cost > 0 && cost + count > size) {
        batches_.push_back(int32_t(chunks_.size()));
        cost = 0;
      }
      chunks_.push_back({i, begin, count});
      cost += count + kChunkOverhead;
    }
  }
  return chunks_;
}

int32_t Plan::add_strides(const Strides& strides) {
  strides_.push_back(strides);
  return int32_t(strides_.size()) - 1;
}

// Tensors of one group nearly always share a step, so a row is computed for the first and reused, or copied beside a
// seed.
const std::vector<float>& Plan::fill_rows(const std::vector<GroupRow>& groups) {
  const IeeeDenormals ieee;
  struct Key {
    float step = -1.0f;
    bool fresh = false;
    int32_t row = -1;
  };
  std::vector<Key> last(groups.size());
  rows_.clear();
  for (Tensor& t : tensors_) {
    if (!t.active) continue;
    const float step = t.step == nullptr ? 0.0f : *t.step + 1.0f;
    Key& key = last[t.group];
    if (key.row < 0 || key.step != step || key.fresh != t.fresh) {
      key = {step, t.fresh, int32_t(rows_.size() / kRowFloats)};
      rows_.resize(rows_.size() + kRowFloats);
      rules()[t.rule].fill_row(groups[t.group].hyper, step, t.fresh, &rows_[size_t(key.row) * kRowFloats]);
    }
    t.row = key.row;
    if (!t.draws) continue;
    t.row = int32_t(rows_.size() / kRowFloats);
    rows_.resize(rows_.size() + kRowFloats);
    float* row = &rows_[size_t(t.row) * kRowFloats];
    std::copy_n(&rows_[size_t(key.row) * kRowFloats], kSeedInRow, row);
    put_seed(seed_of(t.key, uint64_t(step)), row);
  }
  return rows_;
}

void Plan::count_step() {
  for (Tensor& t : tensors_) {
    if (!t.active) continue;
    if (t.step != nullptr && !t.step_on_device) *t.step += 1.0f;
    t.fresh = false;
  }
}

void Plan::run(const std::vector<GroupRow>& groups, const Control& control, int threads) {
  fill_rows(groups);

  int64_t elements = 0;
  for (const Tensor& t : tensors_)
    if (t.active) elements += t.numel;
  if (elements < kSerialElements) threads = 1;
  const std::vector<Chunk>& all = chunks(threads);
  const int64_t count = int64_t(all.size()), batches = int64_t(batches_.size());
  threads = int(std::min<int64_t>(threads, batches));

  const UpdateChunk* update = update_table();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const IeeeDenormals ieee;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t b = 0; b < batches; ++b) {
      const int64_t end = b + 1 < batches ? batches_[b + 1] : count;
      for (int64_t c = batches_[b]; c < end; ++c) {
        const Chunk& chunk = all[c];
        const Tensor& t = tensors_[chunk.tensor];
        if (!t.active) continue;
        update[t.rule]({&t, strides_.data(), &rows_[size_t(t.row) * kRowFloats], &control, groups[t.group].sign,
                        chunk.begin, chunk.count});
      }
    }
  }
  if (control.skip == 0.0f) count_step();
}

}  // namespace precond
