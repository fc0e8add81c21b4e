// The plan: every tensor of every group, cut into chunks, with the addresses and scalars of one step. Built once,
// refreshed each step by its owner (tensors.cpp from Python, the C++ tests by hand), run in one parallel region.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "formats/formats.h"
#include "plan/layout.h"
#include "rules/rules.h"

namespace precond {

// Chunks begin at multiples of this many elements, so that a later format's groups never straddle two of them.
constexpr int64_t kChunkAlign = 256;
// Each thread gets about kChunksPerThread chunks, of a size within these bounds. Short chunks restart the hardware
// prefetchers too often: fp32 AdamW on 32M elements, 2 threads, in units of torch's fused step: 1.24 at 8K, 1.05 at
// 32K, 0.99 at 128K, 0.98 at 1M.
constexpr int64_t kChunksPerThread = 8, kMinChunk = 32768, kMaxChunk = 1 << 20;

// One tensor's memory: p, g or a state. `strides` is an index into the plan's list, or kDense; `beside` has remainders
// or scales, which are dense in the visiting order.
constexpr int32_t kDense = -1;
struct Operand {
  char* data = nullptr;
  Format format = Format::fp32;
  int32_t strides = kDense;
  char* beside = nullptr;
};

// Where a tensor's elements are in the unsharded one: from `begin` on, rows of `row` elements, `row_step` apart there.
struct Place {
  int64_t begin = 0, row = 0, row_step = 0;  // row 0: all in one stretch
  PRECOND_INLINE int64_t index(int64_t i) const { return begin + (row == 0 ? i : i / row * row_step + i % row); }
  PRECOND_INLINE int64_t left_in_row(int64_t i) const { return row == 0 ? INT64_MAX : row - i % row; }
};

// One parameter.
struct Tensor {
  Operand p, g, state[kMaxStates];
  int64_t numel = 0;
  float* step = nullptr;  // counter in the parameter's state, advanced by address; null where a rule has none
  bool step_on_device = false;
  int32_t rule = 0;
  int32_t group = 0;
  int32_t row = 0;  // scalars of this step
  int32_t norm_class = 0;
  bool active = false;  // has a gradient in this step
  bool fresh = false;   // its state was made for this step
  bool draws = false;   // rounds stochastically: `key` is its own, `place` where it is in the unsharded tensor
  uint64_t key = 0;
  Place place;
};

// `begin` is the global index of the chunk's first element in its tensor's visiting order.
struct Chunk {
  int32_t tensor;
  int64_t begin, count;
};

// What every chunk reads through a pointer: a gradient coefficient (loss scale, clipping by norm), a flag that skips
// the step, and what a gradient is clamped to.
struct Control {
  float grad_coef = 1.0f;
  float skip = 0.0f;
  float clip_value = HUGE_VALF;
};

// Where a row keeps the seed of a tensor that draws; rules have the floats before.
constexpr int kSeedInRow = kRowFloats - 2;
PRECOND_INLINE Seed seed_in(const float* row) { return {bits_of(row[kSeedInRow]), bits_of(row[kSeedInRow + 1])}; }
PRECOND_INLINE void put_seed(Seed seed, float* row) {
  std::memcpy(row + kSeedInRow, &seed, sizeof seed);  // not as floats: a bit pattern may be a signalling NaN
}

// Hyper-parameters of a group in this step: the doubles of its rule's Hyper, and -1 where the objective is maximised.
struct GroupRow {
  int32_t rule = 0;
  float sign = 1.0f;
  double hyper[kMaxHyper] = {};
};

class Plan {
 public:
  // chunk: elements per chunk, rounded up to a multiple of kChunkAlign; 0 chooses by size and threads.
  explicit Plan(int64_t chunk = 0) : fixed_chunk_(chunk) {}

  int32_t add(const Tensor& tensor);
  int32_t add_strides(const Strides& strides);

  Tensor& tensor(int64_t i) { return tensors_[i]; }
  const Tensor& tensor(int64_t i) const { return tensors_[i]; }
  int64_t size() const { return int64_t(tensors_.size()); }
  const std::vector<Strides>& all_strides() const { return strides_; }
  Strides& strides(int32_t i) { return strides_[i]; }
  const Strides& strides(int32_t i) const { return strides_[i]; }
  // The chunks for a number of threads. Cuts them anew when that, or the list of tensors, has changed.
  const std::vector<Chunk>& chunks(int threads);

  // Advances the step counters of the active tensors and updates them. Changes nothing when control.skip is set.
  void run(const std::vector<GroupRow>& groups, const Control& control, int threads);

  // The halves of run() that another executor needs: the scalars of the coming step, and counting it.
  const std::vector<float>& fill_rows(const std::vector<GroupRow>& groups);
  void count_step();

 private:
  int64_t fixed_chunk_;
  int cut_for_ = 0;  // threads that chunks_ was cut for; 0: not cut yet
  std::vector<Tensor> tensors_;
  std::vector<Strides> strides_;
  std::vector<Chunk> chunks_;
  std::vector<int32_t>
      batches_;              // first chunks of ranges of about one full chunk's work: what a thread takes at a time
  std::vector<float> rows_;  // kRowFloats each, shared by tensors with the same group and step that draw nothing
};

}  // namespace precond
