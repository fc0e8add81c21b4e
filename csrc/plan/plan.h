// The plan: every tensor of every group, cut into chunks, with the addresses and scalars of one step. Built once,
// refreshed each step by its owner (csrc/python, or the C++ tests by hand), run by an executor (csrc/cpu, csrc/cuda).
#pragma once

#include <cmath>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "base/limits.h"
#include "formats/formats.h"
#include "plan/layout.h"
#include "plan/number.h"

namespace precond {

// Chunks begin at multiples of this many elements, so that no group straddles two of them.
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
  Number step;                  // counter in the parameter's state, advanced by address; null where none is kept
  Number scalar;                // the rule's scalar state, advanced with it; null where the rule has none
  bool step_on_device = false;  // both of them
  double next_step = 0.0, next_scalar = 0.0;  // after the coming step; where the host advances them
  int32_t rule = 0;
  int32_t group = 0;
  int32_t number = 0;   // among the parameters of the step: its row of statistics and its factor
  int32_t scalars = 0;  // of this step: their place in Plan::fill_scalars
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

// The seed of a tensor that draws lies behind its rule's scalars.
constexpr int kSeedAt = kScalarFloats - 2;
PRECOND_INLINE Seed seed_in(const float* scalars) { return {bits_of(scalars[kSeedAt]), bits_of(scalars[kSeedAt + 1])}; }
PRECOND_INLINE void put_seed(Seed seed, float* scalars) {
  std::memcpy(scalars + kSeedAt, &seed, sizeof seed);  // not as floats: a bit pattern may be a signalling NaN
}

// What a group asks for in this step: a rule, the doubles of its Hyper, and -1 where the objective is maximised. A
// hyper-parameter that lies in a tensor on the device is NaN here.
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
  // In the place of one that has no numbers yet.
  void put(int32_t i, const Tensor& tensor);
  int32_t add_strides(const Strides& strides);

  Tensor& tensor(int64_t i) { return tensors_[i]; }
  const Tensor& tensor(int64_t i) const { return tensors_[i]; }
  int64_t size() const { return int64_t(tensors_.size()); }
  const std::vector<Strides>& all_strides() const { return strides_; }
  Strides& strides(int32_t i) { return strides_[i]; }
  const Strides& strides(int32_t i) const { return strides_[i]; }
  // The chunks of the active tensors for a number of threads, which begin at multiples of `align` elements. Cuts them
  // anew when one of these has changed.
  const std::vector<Chunk>& chunks(int threads, int64_t align = kChunkAlign);

  // The first chunk of each batch: about one full chunk's work, which a thread takes at a time. Cut with the chunks.
  const std::vector<int32_t>& batches() const { return batches_; }

  // What an executor needs of every step: the counters and scalar states that the host advances, one after the other
  // where tensors share one; all scalars, kScalarFloats each; and, after a step that was not skipped, counting it. A
  // plan's tensors then have their state no longer fresh.
  void advance(const std::vector<GroupRow>& groups);
  // factors: of each parameter, what its updates are multiplied with where its rule has parts; null: 1.
  const std::vector<float>& fill_scalars(const std::vector<GroupRow>& groups, const float* factors = nullptr);
  void count_step();

 private:
  int64_t fixed_chunk_;
  int cut_for_ = 0;             // threads that chunks_ was cut for; 0: not cut yet
  int64_t cut_at_ = 0;          // their `align`
  std::vector<bool> cut_from_;  // of each tensor, whether it was active then
  std::vector<Tensor> tensors_;
  std::vector<Strides> strides_;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> batches_;
  std::unordered_set<const void*> numbers_;  // counters and scalar states
  bool shares_numbers_ = false;              // between tensors
  std::vector<float> scalars_;               // shared by tensors with the same group and step, unless one has its own
};

}  // namespace precond
