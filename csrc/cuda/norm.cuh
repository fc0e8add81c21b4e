// The norm on CUDA, in the order of norm.h: a block per chunk of the update's list, then blocks over the sums.
#pragma once

#include "cuda/statistics.cuh"
#include "cuda/tensors.cuh"

namespace precond {
inline namespace PRECOND_ISA {

static_assert(kBlockElements == kNormBlock, "a chunk of the update must be a block of the norm");
constexpr int kLanesPerThread = int(kNormLanes) / kThreads;
static_assert(kLanesPerThread == 4, "a thread adds its lanes by halves");

// A phase of a block, by each of its threads, and a barrier behind it. Without nvcc the first thread runs it for all.
template <class Phase>
__device__ __forceinline__ void each_thread(const Phase& phase) {
#if defined(__CUDACC__)
  phase(int(threadIdx.x));
  __syncthreads();
#else
  if (threadIdx.x == 0)
    for (int thread = 0; thread < kThreads; ++thread) phase(thread);
#endif
}

__device__ __forceinline__ double combined(double a, double b, bool inf) { return inf ? larger(a, b) : a + b; }

// What value(i) gives for each i below n, at most kNormBlock, into `out`. Thread t has the lanes t, t + kThreads, ...
// `lanes`: kThreads numbers that the block shares.
template <class Value>
__device__ __forceinline__ void fold_block(int64_t n, bool inf, double* lanes, double* out, const Value& value) {
  each_thread([&](int t) {
    double lane[kLanesPerThread] = {};
    if (n == kNormBlock) {
#pragma unroll
      for (int row = 0; row < int(kNormBlock / kNormLanes); ++row)
#pragma unroll
        for (int k = 0; k < kLanesPerThread; ++k)
          lane[k] = combined(lane[k], value(row * int(kNormLanes) + k * kThreads + t), inf);
    } else {
      for (int64_t row = 0; row < n; row += kNormLanes)
#pragma unroll
        for (int k = 0; k < kLanesPerThread; ++k) {
          const int64_t i = row + k * kThreads + t;
          if (i < n) lane[k] = combined(lane[k], value(i), inf);
        }
    }
    lanes[t] = combined(combined(lane[0], lane[2], inf), combined(lane[1], lane[3], inf), inf);
  });
  for (int half = kThreads / 2; half > 0; half /= 2)
    each_thread([&](int t) {
      if (t < half) lanes[t] = combined(lanes[t], lanes[t + half], inf);
    });
  each_thread([&](int t) {
    if (t == 0) *out = lanes[0];
  });
}

// first: of each tensor, the place of its first block's sum.
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const Strides* strides, const int64_t* first,
                int32_t inf, double* sums) {
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  __shared__ double lanes[kThreads];
  if (first[chunk.tensor] < 0) return;  // no gradient in this step
  const Range range = range_of(chunk, t);
  const Operand g = t.operand[1];
  double* out = sums + first[chunk.tensor] + chunk.begin / kNormBlock;
  with_plain_format(g.format, [&](auto format) {
    const auto term = [&](float x) { return inf ? larger(double(x), 0.0) : double(x) * double(x); };
    if (g.strides == kDense)
      fold_block(range.end - range.begin, inf != 0, lanes, out, [&](int64_t i) {
        return term(decltype(format)::value(element<decltype(format)>(g, range.begin + i)));
      });
    else
      fold_block(range.end - range.begin, inf != 0, lanes, out, [&](int64_t i) {
        return term(decltype(format)::value(element<decltype(format)>(g, offset_of(g, strides, range.begin + i))));
      });
  });
}

// A block for each tensor: its blocks' statistics, in the order of plan/statistics.h. A step that is skipped has none.
__global__ void __launch_bounds__(kThreads)
    fold_statistics_kernel(const StatisticsJob* jobs, const double* table, const Control* control, double* sums) {
  if (control->skip != 0.0f) return;
  __shared__ double lanes[kBlockStatistics][kThreads];
  const StatisticsJob job = jobs[blockIdx.x];
  double* const row = sums + job.number * kStatistics;
  const int64_t blocks = job.first < 0 ? 0 : (job.numel + kNormBlock - 1) / kNormBlock;
  const double* const begin = table + (job.first < 0 ? 0 : job.first) * kBlockStatistics;
  each_thread([&](int t) {
    double lane[kBlockStatistics] = {};
    for (int64_t b = t; b < blocks; b += kThreads)
#pragma unroll
      for (int k = 0; k < kBlockStatistics; ++k)
        lane[k] = combined_statistic(k, lane[k], begin[b * kBlockStatistics + k]);
#pragma unroll
    for (int k = 0; k < kBlockStatistics; ++k) lanes[k][t] = lane[k];
  });
  for (int half = kThreads / 2; half > 0; half /= 2)
    each_thread([&](int t) {
      if (t >= half) return;
#pragma unroll
      for (int k = 0; k < kBlockStatistics; ++k) lanes[k][t] = combined_statistic(k, lanes[k][t], lanes[k][t + half]);
    });
  each_thread([&](int t) {
    if (t < kBlockStatistics) row[t] = lanes[t][0];
    if (t == kElements) row[t] = job.first < 0 ? 0.0 : double(job.numel);
  });
}

// One block per kNormBlock of n sums.
__global__ void __launch_bounds__(kThreads) fold_kernel(const double* sums, int64_t n, int32_t inf, double* out) {
  __shared__ double lanes[kThreads];
  const int64_t begin = int64_t(blockIdx.x) * kNormBlock;
  const int64_t count = n - begin < kNormBlock ? n - begin : kNormBlock;
  fold_block(count, inf != 0, lanes, out + blockIdx.x, [&](int64_t i) { return sums[begin + i]; });
}

}  // namespace PRECOND_ISA
}  // namespace precond
