// Visiting orders and strides; see layout.h.
#include "plan/layout.h"

#include <algorithm>

namespace precond {

Order storage_order(const int64_t* shape, const int64_t* strides, int ndim) {
  Order order;
  for (int d = 0; d < ndim; ++d)
    if (shape[d] != 1) order.dim[order.ndim++] = d;
  std::stable_sort(order.dim, order.dim + order.ndim, [&](int a, int b) { return strides[a] > strides[b]; });
  return order;
}

Order logical_order(const int64_t* shape, int ndim) {
  Order order;
  for (int d = 0; d < ndim; ++d)
    if (shape[d] != 1) order.dim[order.ndim++] = d;
  return order;
}

bool is_dense(const Order& order, const int64_t* shape, const int64_t* strides) {
  int64_t expected = 1;
  for (int k = order.ndim - 1; k >= 0; --k) {
    if (strides[order.dim[k]] != expected) return false;
    expected *= shape[order.dim[k]];
  }
  return true;
}

bool make_strides(const Order& order, const int64_t* shape, const int64_t* strides, Strides* out) {
  out->ndim = 0;
  for (int k = 0; k < order.ndim; ++k) {
    const int64_t size = shape[order.dim[k]], stride = strides[order.dim[k]];
    const int last = out->ndim - 1;
    if (last >= 0 && out->stride[last] == size * stride) {
      out->size[last] *= size;
      out->stride[last] = stride;
      continue;
    }
    if (out->ndim == kMaxDims) return false;
    out->size[out->ndim] = size;
    out->stride[out->ndim++] = stride;
  }
  return true;
}

}  // namespace precond
