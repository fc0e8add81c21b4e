// The statistics of plan/statistics.h on CUDA. A thread updates runs of elements, but has one lane: what it finds goes
// through memory that the block shares, which costs a kernel nothing where no statistics are asked for.
#pragma once

#include "cuda/formats.cuh"
#include "plan/statistics.h"

namespace precond {

// What a kernel of mixed.cuh reads of a step's statistics; a null pointer to it: there are none. Tables are compared as
// bytes.
struct Noting {
  const int64_t* first;  // of each tensor, its first block among all; -1: none
  double* table;         // kBlockStatistics of each block; null: none are taken
  int64_t only;          // nothing is updated
};
// Of a tensor, for what folds the table.
struct StatisticsJob {
  int64_t first, numel, number;
};

inline namespace PRECOND_ISA {

static_assert(kStatisticLanes == kThreads && kBlockElements == kNormBlock, "a thread has a lane, a block a chunk");

// Elements that the threads of a block update in one go.
constexpr int kStretch = kThreads * kRun;
enum Seen { kSeenGrad, kSeenBefore, kSeenTaken, kSeenAfter, kSeen };
struct alignas(16) SharedStatistics {
  float seen[kSeen][kStretch];
  double sum[kStatisticSums][kThreads];
  uint32_t nonfinite[kThreads], lost[kThreads], largest[kThreads];
};
static_assert(sizeof(SharedStatistics) <= 48 << 10, "more must be asked for");

// Memory of the size that its launch asks for, which is none where there are no statistics.
__device__ __forceinline__ SharedStatistics* shared_statistics() {
#if defined(__CUDACC__)
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<SharedStatistics*>(shared_memory);
#else
  __shared__ SharedStatistics shared;
  return &shared;
#endif
}

__device__ __forceinline__ void clear(SharedStatistics* shared) {
  const int t = int(threadIdx.x);
#pragma unroll
  for (int k = 0; k < kStatisticSums; ++k) shared->sum[k][t] = 0.0;
  shared->nonfinite[t] = shared->lost[t] = shared->largest[t] = 0;
}

// What a thread has seen of its run. Elements behind the last are 0, which changes no sum.
__device__ __forceinline__ void note(SharedStatistics* shared, Seen which, const float* x, int count) {
  float* const to = shared->seen[which] + int(threadIdx.x) * kRun;
#pragma unroll
  for (int k = 0; k < kRun; ++k) to[k] = k < count ? x[k] : 0.0f;
}

// Into the lanes, when all threads have noted their runs.
PRECOND_APART void add_noted(SharedStatistics* shared) {
  const int t = int(threadIdx.x);
  __syncthreads();
  double sum[kStatisticSums];
#pragma unroll
  for (int k = 0; k < kStatisticSums; ++k) sum[k] = shared->sum[k][t];
  uint32_t nonfinite = 0, lost = 0, largest = shared->largest[t];
#pragma unroll
  for (int i = t; i < kStretch; i += kThreads) {
    const float g = shared->seen[kSeenGrad][i], u = shared->seen[kSeenTaken][i];
    const float before = shared->seen[kSeenBefore][i], after = shared->seen[kSeenAfter][i];
    sum[kGradSquares] += double(g) * double(g);
    sum[kParamSquares] += double(before) * double(before);
    sum[kUpdateSquares] += double(u) * double(u);
    sum[kUpdateGrad] += double(u) * double(g);
    sum[kUpdateArrived] += double(u) * double(before - after);
    nonfinite += is_finite(g) ? 0u : 1u;
    lost += after == before && u != 0.0f ? 1u : 0u;
    const uint32_t size = bits_of(u) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
#pragma unroll
  for (int k = 0; k < kStatisticSums; ++k) shared->sum[k][t] = sum[k];
  shared->nonfinite[t] += nonfinite;
  shared->lost[t] += lost;
  shared->largest[t] = largest;
  __syncthreads();
}

// A row of the table, from the lanes of all threads.
PRECOND_APART void fold(SharedStatistics* shared, double* row) {
  const int t = int(threadIdx.x);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t >= half) continue;
#pragma unroll
    for (int k = 0; k < kStatisticSums; ++k) shared->sum[k][t] += shared->sum[k][t + half];
    shared->nonfinite[t] += shared->nonfinite[t + half];
    shared->lost[t] += shared->lost[t + half];
    const uint32_t other = shared->largest[t + half];
    shared->largest[t] = other > shared->largest[t] ? other : shared->largest[t];
  }
  if (t != 0) return;
#pragma unroll
  for (int k = 0; k < kStatisticSums; ++k) row[k] = shared->sum[k][0];
  row[kNonfinite] = double(shared->nonfinite[0]);
  row[kLost] = double(shared->lost[0]);
  row[kLargestUpdate] = magnitude_of_bits(shared->largest[0]);
}

}  // namespace PRECOND_ISA
}  // namespace precond
