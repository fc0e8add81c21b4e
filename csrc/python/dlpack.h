// The part of DLPack's stable C ABI (version 1.x, dmlc/dlpack) that reads a tensor's address, dtype and strides without
// the headers of the library that owns it.
#pragma once

#include <cstdint>

namespace precond::dlpack {

enum Device : int32_t { kCpu = 1, kCuda = 2 };
enum Code : uint8_t { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kComplex = 5 };

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// The table behind the capsule `torch.Tensor.__dlpack_c_exchange_api__`.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  // Fills a view that lives as long as the object does. Returns 0, or -1 with a Python error set.
  int (*view_from_object)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace precond::dlpack
