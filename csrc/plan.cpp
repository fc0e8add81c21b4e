// Chunking, scalars and the one parallel region of a step; see plan.h.
#include "plan.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>

#include "dispatch.h"

namespace precond {
namespace {

// Below this many elements one thread is quicker than waking a second one.
constexpr int64_t kSerialElements = 32768;
// What a chunk costs beyond its elements, in elements: the call and the row.
constexpr int64_t kChunkOverhead = 64;

// IEEE denormals while a worker runs; torch.set_flush_denormal(True) would otherwise change our bits.
class IeeeDenormals {
 public:
#if defined(__SSE2__)
  IeeeDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~IeeeDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~((uint64_t(1) << 24) | (uint64_t(1) << 19))));
  }
  ~IeeeDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace

Plan::Plan(int64_t chunk) : chunk_((std::max<int64_t>(chunk, 1) + kChunkAlign - 1) / kChunkAlign * kChunkAlign) {}

int32_t Plan::add(const Tensor& tensor) {
  const int32_t index = int32_t(tensors_.size());
  tensors_.push_back(tensor);
  for (int64_t begin = 0; begin < tensor.numel; begin += chunk_) {
    const int64_t count = std::min(chunk_, tensor.numel - begin);
    if (batch_cost_ + count > chunk_ && batch_cost_ > 0) {
      batches_.push_back(int32_t(chunks_.size()));
      batch_cost_ = 0;
    }
    chunks_.push_back({index, begin, count});
    batch_cost_ += count + kChunkOverhead;
  }
  return index;
}

int32_t Plan::add_strides(const Strides& strides) {
  strides_.push_back(strides);
  return int32_t(strides_.size()) - 1;
}

// Tensors of one group nearly always share a step, so a row is computed for the first and reused.
void Plan::fill_rows(const std::vector<GroupRow>& groups) {
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
  }
}

void Plan::run(const std::vector<GroupRow>& groups, const Control& control, int threads) {
  fill_rows(groups);

  int64_t elements = 0;
  for (const Tensor& t : tensors_)
    if (t.active) elements += t.numel;
  const int64_t batches = int64_t(batches_.size());
  if (elements < kSerialElements) threads = 1;
  threads = int(std::min<int64_t>(threads, batches));

  const UpdateChunk* update = update_table();
  const int64_t chunks = int64_t(chunks_.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const IeeeDenormals ieee;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t b = 0; b < batches; ++b) {
      const int64_t end = b + 1 < batches ? batches_[b + 1] : chunks;
      for (int64_t c = batches_[b]; c < end; ++c) {
        const Chunk& chunk = chunks_[c];
        const Tensor& t = tensors_[chunk.tensor];
        if (!t.active) continue;
        update[t.rule]({&t, strides_.data(), &rows_[size_t(t.row) * kRowFloats], &control, groups[t.group].sign,
                        chunk.begin, chunk.count});
      }
    }
  }
  if (control.skip != 0.0f) return;
  for (Tensor& t : tensors_) {
    if (!t.active) continue;
    if (t.step != nullptr) *t.step += 1.0f;
    t.fresh = false;
  }
}

}  // namespace precond
