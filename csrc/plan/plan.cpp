// Chunks, scalars and counting; see plan.h.
#include "plan/plan.h"

#include <algorithm>
#include <unordered_map>

#include "base/denormals.h"
#include "rules/registry.h"

namespace precond {
namespace {

// What a chunk costs beyond its elements, in elements: the call and the row.
constexpr int64_t kChunkOverhead = 64;

}  // namespace

int32_t Plan::add(const Tensor& tensor) {
  tensors_.emplace_back();
  put(int32_t(tensors_.size()) - 1, tensor);
  return int32_t(tensors_.size()) - 1;
}

void Plan::put(int32_t i, const Tensor& tensor) {
  tensors_[size_t(i)] = tensor;
  for (const Number& number : {tensor.step, tensor.scalar})
    if (number && !numbers_.insert(number.data).second) shares_numbers_ = true;
}

const std::vector<Chunk>& Plan::chunks(int threads, int64_t align) {
  bool same = cut_for_ == threads && cut_at_ == align && cut_from_.size() == tensors_.size();
  for (size_t i = 0; same && i < tensors_.size(); ++i) same = cut_from_[i] == tensors_[i].active;
  if (same) return chunks_;
  cut_for_ = threads;
  cut_at_ = align;
  cut_from_.clear();
  for (const Tensor& t : tensors_) cut_from_.push_back(t.active);
  int64_t size = fixed_chunk_;
  if (size == 0) {
    int64_t total = 0;
    for (const Tensor& t : tensors_)
      if (t.active) total += t.numel;
    size = std::clamp(total / (kChunksPerThread * threads), kMinChunk, kMaxChunk);
  }
  size = (size + align - 1) / align * align;
  chunks_.clear();
  batches_.assign(1, 0);
  int64_t cost = 0;
  for (int32_t i = 0; i < int32_t(tensors_.size()); ++i) {
    for (int64_t begin = 0; tensors_[i].active && begin < tensors_[i].numel; begin += size) {
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

void Plan::advance(const std::vector<GroupRow>& groups) {
  const IeeeDenormals ieee;
  // Of numbers that tensors share: what the tensors so far leave there.
  std::unordered_map<const void*, double> left;
  const auto read = [&](const Number& number) {
    if (shares_numbers_)
      if (const auto found = left.find(number.data); found != left.end()) return found->second;
    return read_number(number.data, number.type);
  };
  for (Tensor& t : tensors_) {
    if (!t.active || !t.step || t.step_on_device) continue;
    t.next_step = next_step(t.step.type, read(t.step));
    if (t.scalar)
      t.next_scalar =
          rounded_number(t.scalar.type, rules()[t.rule].advanced(groups[t.group].hyper, t.next_step, read(t.scalar)));
    if (!shares_numbers_) continue;
    left[t.step.data] = t.next_step;
    if (t.scalar) left[t.scalar.data] = t.next_scalar;
  }
}

// Tensors of one group nearly always share a step, so scalars are computed for the first and shared, or copied beside
// what a tensor has of its own.
const std::vector<float>& Plan::fill_scalars(const std::vector<GroupRow>& groups, const float* factors) {
  const IeeeDenormals ieee;
  advance(groups);
  struct Known {
    double step = -1.0, scalar = 0.0;
    bool fresh = false;
    int32_t at = -1;
  };
  std::vector<Known> last(groups.size());
  scalars_.clear();
  const auto append = [&] {
    scalars_.resize(scalars_.size() + kScalarFloats);
    return int32_t(scalars_.size() / kScalarFloats) - 1;
  };
  const auto at = [&](int32_t index) { return &scalars_[size_t(index) * kScalarFloats]; };
  for (Tensor& t : tensors_) {
    if (!t.active) continue;
    const double step = t.next_step;
    Known& known = last[t.group];
    if (known.at < 0 || known.step != step || known.scalar != t.next_scalar || known.fresh != t.fresh) {
      known = {step, t.next_scalar, t.fresh, append()};
      rules()[t.rule].fill(groups[t.group].hyper, step, t.fresh, t.next_scalar, at(known.at));
    }
    t.scalars = known.at;
    const RuleInfo& rule = rules()[size_t(t.rule)];
    const bool scaled = factors != nullptr && rule.has_parts;
    if (!t.draws && !scaled) continue;
    t.scalars = append();
    std::copy_n(at(known.at), kSeedAt, at(t.scalars));
    if (scaled) at(t.scalars)[rule.scalars - 1] = factors[t.number];
    if (t.draws) put_seed(seed_of(t.key, uint64_t(countable(step))), at(t.scalars));
  }
  return scalars_;
}

void Plan::count_step() {
  for (Tensor& t : tensors_) {
    if (!t.active) continue;
    t.fresh = false;
    if (!t.step || t.step_on_device) continue;
    write_number(t.step.data, t.step.type, t.next_step);
    if (t.scalar) write_number(t.scalar.data, t.scalar.type, t.next_scalar);
  }
}

}  // namespace precond
