// Pinned memory.
#pragma once

#include <cstddef>

namespace precond {

// Memory of the host that a device copies from and to by itself.
class Pinned {
 public:
  explicit Pinned(size_t bytes);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // True for an address within one of these.
  static bool has(const void* address);

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

}  // namespace precond
