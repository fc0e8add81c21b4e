// The stretches of memory that a step writes: finds those that may meet. Which of these do share memory, element by
// element, is for precond/_core/memory.py to say.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "python/reader.h"

namespace precond {

class Spans {
 public:
  explicit Spans(const Reader& reader) : reader_(reader) {}
  // Adds tensors. Returns the places, in this list, of those whose stretch meets another one of this list or of an
  // earlier one, and of those whose own elements may meet.
  std::vector<int64_t> add(const py::list& tensors);

 private:
  const Reader& reader_;
  std::vector<std::pair<uintptr_t, uintptr_t>> known_;  // begin and end, in order; none meets another
};

}  // namespace precond
