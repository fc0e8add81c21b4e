// A step of the host in pieces, as the threads of a link see it. Nothing here calls CUDA.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/update.h"
#include "offload/link.h"
#include "offload/workers.h"

namespace precond {

constexpr int kSlots = 4;  // pieces that are on their way at a time
constexpr size_t kLine = 64;
inline size_t item_bytes(const Operand& operand) { return size_t(item_bits(operand.format)) / 8; }
inline size_t in_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// What a device has said of a step, at the head of the slot of its first piece.
struct alignas(kLine) Verdict {
  double total;
  float grad_scale, found_inf;
};

// A number that streams and threads both read and write, alone in its line.
struct alignas(kLine) Flag {
  uint32_t value;
  bool has_reached(uint32_t at) const { return int32_t(__atomic_load_n(&value, __ATOMIC_ACQUIRE) - at) >= 0; }
  // A full barrier: what was written is there for a device before the flag.
  void set(uint32_t to) { __atomic_exchange_n(&value, to, __ATOMIC_SEQ_CST); }
};

struct Counted {
  Number number;
  double next;
};

class Job : public HostJob {
 public:
  std::vector<Tensor> tensors;
  std::vector<Strides> strides;
  std::vector<float> scalars;
  std::vector<float> signs;  // of each tensor
  std::vector<Counted> counted;
  const UpdateChunk* updates = nullptr;  // by number of the rule
  Control control;
  Clip clip;
  bool reads_scale = false, reads_inf = false, only = false;
  std::vector<int64_t> block_of;  // of each tensor, and a row of `table` for each block: with statistics
  std::vector<double> table;
  std::atomic<int64_t> pieces_left{0};
  std::once_flag begun;
  std::atomic<bool> failed{false};

  // What every piece does first, once: the control, from what the device has said.
  void begin(const Verdict& verdict) {
    std::call_once(begun, [&] {
      if (reads_scale) control.grad_coef = float(1.0 / double(verdict.grad_scale)) * control.grad_coef;
      if (reads_inf && verdict.found_inf != 0.0f) control.skip = 1.0f;
      double total = verdict.total;
      if (clip.total != nullptr) clip.total = &total;
      precond::finish(clip, &control);
    });
  }
  // After the last piece.
  void end() {
    if (!failed && control.skip == 0.0f && !only)
      for (const Counted& c : counted) write_number(c.number.data, c.number.type, c.next);
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    changed_.notify_all();
  }
  // Leaves out what has not run yet. `error`: for whoever waits; null where somebody has been told.
  void fail(std::exception_ptr error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failed) error_ = std::move(error);
    failed = true;
  }
  bool done() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }
  // False where it is not after so long.
  bool is_done_within(std::chrono::milliseconds time) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, time, [&] { return done_; });
  }
  // Of a job that is done, once.
  void rethrow() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::exception_ptr error_;
};

// Elements of one tensor, and where in its slot the first of them has its gradient.
struct Part {
  int32_t tensor;  // of the job
  int64_t begin, count;
  size_t at;
};

struct Download {
  size_t at;  // in the slot
  const char* from;
  size_t bytes;
};
struct Upload {
  char* to;
  const char* from;
  size_t bytes;
};

// What one slot holds at a time.
struct Cut {
  std::vector<Part> parts;
  std::vector<Download> downloads;
  std::vector<Upload> uploads;
  size_t used = 0;
};

class SomeGradients : public Piece {
 public:
  // slot: a Verdict, in a job's first piece, and gradients.
  SomeGradients(std::shared_ptr<Job> job, std::vector<Part> parts, const char* slot, bool is_first, const Flag* arrived,
                Flag* updated, uint32_t ticket)
      : Piece(int64_t(parts.size())),
        job_(std::move(job)),
        parts_(std::move(parts)),
        slot_(slot),
        is_first_(is_first),
        arrived_(arrived),
        updated_(updated),
        ticket_(ticket) {}

  bool is_there() override {
    if (job_->failed) return updated_->has_reached(ticket_ - kSlots);  // who had the slot before may still read it
    if (!arrived_->has_reached(ticket_)) return false;
    if (is_first_) job_->begin(*reinterpret_cast<const Verdict*>(slot_));
    return true;
  }

  void run(int64_t number) override {
    if (job_->failed) return;
    const Part& part = parts_[size_t(number)];
    Tensor tensor = job_->tensors[size_t(part.tensor)];
    // As if all of the gradient were there: kernels ask for elements by their numbers.
    const auto first = reinterpret_cast<uintptr_t>(slot_ + sizeof(Verdict) + part.at);
    tensor.g.data = reinterpret_cast<char*>(first - uintptr_t(part.begin) * item_bytes(tensor.g));
    double* statistics = nullptr;
    if (!job_->table.empty())
      statistics =
          &job_->table[size_t(job_->block_of[size_t(part.tensor)] + part.begin / kNormBlock) * kBlockStatistics];
    job_->updates[tensor.rule]({&tensor, job_->strides.data(), &job_->scalars[size_t(tensor.scalars) * kScalarFloats],
                                &job_->control, job_->signs[size_t(part.tensor)], part.begin, part.count, statistics,
                                job_->only});
  }

  void finish(std::exception_ptr error) override {
    if (error != nullptr) job_->fail(std::move(error));
    updated_->set(ticket_);
    if (job_->pieces_left.fetch_sub(1) == 1) job_->end();
  }

 private:
  const std::shared_ptr<Job> job_;
  const std::vector<Part> parts_;
  const char* const slot_;
  const bool is_first_;
  const Flag* const arrived_;
  Flag* const updated_;
  const uint32_t ticket_;
};

}  // namespace precond
