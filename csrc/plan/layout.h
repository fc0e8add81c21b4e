// Which order a tensor's elements are visited in, and where each operand keeps element i of that order.
#pragma once

#include <cstdint>
#include <cstring>

namespace precond {

// Dimensions that stay after merging those that every operand steps through alike.
constexpr int kMaxDims = 16;

// The visiting order of a tensor: dimensions from the slowest to the fastest, as positions in its shape.
struct Order {
  int ndim = 0;
  int dim[64];
};

// Storage order of p, slowest dimension first, so that a dense p (contiguous, channels_last, transposed) is visited as
// it lies in memory. Dimensions of size 1 are dropped.
Order storage_order(const int64_t* shape, const int64_t* strides, int ndim);

// The order of the indices, which does not depend on how a tensor lies in memory: for formats that depend on an
// element's number.
Order logical_order(const int64_t* shape, int ndim);

// True where visiting in `order` walks memory one element at a time.
bool is_dense(const Order& order, const int64_t* shape, const int64_t* strides);

// Where an operand keeps its elements when it is not dense in the visiting order.
struct Strides {
  int ndim = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

// Merges dimensions that this operand walks without a break. Returns false if more than kMaxDims remain.
bool make_strides(const Order& order, const int64_t* shape, const int64_t* strides, Strides* out);

// Copies n elements, from element `begin` of the visiting order on, between strided memory and a dense buffer.
// kGather reads from `strided`, otherwise it is written.
template <bool kGather, class T>
inline __attribute__((always_inline)) void copy_strided(const Strides& s, T* strided, int64_t begin, int64_t n,
                                                        T* dense) {
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = s.ndim - 1; d >= 0; --d) {
    index[d] = begin % s.size[d];
    begin /= s.size[d];
    offset += index[d] * s.stride[d];
  }
  const int last = s.ndim - 1;
  for (int64_t i = 0; i < n; ++i) {
    if (kGather)
      dense[i] = strided[offset];
    else
      strided[offset] = dense[i];
    int d = last;
    while (d >= 0) {
      offset += s.stride[d];
      if (++index[d] < s.size[d]) break;
      offset -= s.size[d] * s.stride[d];
      index[d--] = 0;
    }
  }
}

}  // namespace precond
