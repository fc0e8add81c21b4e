// Compiled once per instruction set, with PRECOND_ISA naming it: the sum of a block's squares, see norm.h. No STL
// containers here, so that no symbol is shared between instruction sets.
#include "cpu/norm.h"

namespace precond {
inline namespace PRECOND_ISA {

// One row of a block into the lanes. At 8 KB they stay in L1, and memory is read as it lies.
template <class Format>
PRECOND_INLINE void add_squares(Format, const typename Format::Stored* __restrict g, int64_t n,
                                double* __restrict lanes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double x = double(Format::value(g[i]));
    lanes[i] += x * x;
  }
}

// Magnitudes are ordered as their bits are, NaN above all; a maximum is the same in any order.
template <class Format>
PRECOND_INLINE uint32_t largest(Format, const typename Format::Stored* __restrict g, int64_t n, uint32_t most) {
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of(Format::value(g[i])) & 0x7fffffffu;
    most = u > most ? u : most;
  }
  return most;
}

struct alignas(64) Lanes {
  double value[kNormLanes];
};

static double norm_of_block(const Operand& g, const Strides* strides, int64_t begin, int64_t n, bool inf) {
  Lanes lanes;
  int64_t width = 1;
  while (width < n && width < kNormLanes) width *= 2;
  for (int64_t i = 0; i < width; ++i) lanes.value[i] = 0.0;
  uint32_t most = 0;
  with_plain_format(g.format, [&](auto format) {
    using Stored = typename decltype(format)::Stored;
    Stored* data = reinterpret_cast<Stored*>(g.data);
    for (int64_t row = begin; row < begin + n; row += kNormLanes) {
      const int64_t count = begin + n - row < kNormLanes ? begin + n - row : kNormLanes;
      Stored gathered[kNormLanes];
      const Stored* values = data + row;
      if (g.strides != kDense) {
        copy_strided<true>(strides[g.strides], data, row, count, gathered);
        values = gathered;
      }
      if (inf)
        most = largest(format, values, count, most);
      else
        add_squares(format, values, count, lanes.value);
    }
  });
  if (inf) return larger(double(float_of(most)), 0.0);
  for (int64_t half = width / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) lanes.value[i] += lanes.value[i + half];
  }
  return lanes.value[0];
}

extern const NormOfBlock kNormOfBlock;
const NormOfBlock kNormOfBlock = &norm_of_block;

}  // namespace PRECOND_ISA
}  // namespace precond
