// Which candidates of one batch row are kept, and in which order, found by one block in shared memory.
//
// A candidate's rank is a 45-bit number, ordered score above index: unique, so that ties need no rule of their own and
// nothing depends on which thread came first. Two questions are asked of it:
// * bucket_all + place_of: the place of each row that this block copies. One MSD radix step over the range of ranks
//   that occur leaves a few candidates in each of 1,024 buckets, and a warp counts those of a bucket before its own.
// * keep_limit: the rank below which candidates are kept, for the block that sums the others. MSD radix select, one
//   level for every 10 bits, ended as soon as a whole bucket is kept: one or two levels for a softmax row.
//
// A block that copies R rows needs the places of R candidates, not the sorted row. Warp instructions / barriers for a
// softmax row of M candidates, 256 threads, R as planned for 64, 64, 8 and 1 batch rows of 768 bfloat16 channels; the
// first two lines give all places, the last two those of the R rows:
//                                   M = 196, R = 22   576, 65      1,568, 24    8,192, 43
//   bitonic sort, 64 bits, in shared      4 k / 36      16 k / 55    34 k / 66    169 k / 91
//   LSD radix sort, 4 digits of 8 bits    4 k / 21       6 k / 21    11 k / 21     47 k / 21
//   count all M for each of the R rows    1 k / 1        7 k / 1      6 k / 1      56 k / 1
//   this                                  2 k / 6        5 k / 6      5 k / 6      16 k / 6
// (derived: 14 instructions a compare-exchange of 32 pairs, 44 a digit of 32 candidates, 5 a count of 32, and here 48
// for 32 candidates, 150 a warp, 45 a row; not measured). An SM issues four a cycle, and moves a row of 1,536 bytes in
// about 170 cycles. Counting wins below 256 candidates, by a few hundred cycles, which is not worth a second way.
// Many equal scores fill few buckets and cost time, never correctness: all equal, the indices alone spread evenly.
#pragma once

#include "common/cuda_vector.cuh"
#include "common/plan.h"

namespace xray {

constexpr int kBucketBits = 10, kBuckets = 1 << kBucketBits;
static_assert(kBuckets == 4 * kReorganizeThreads, "each thread owns four buckets");

// Unsigned order = score order: -0 equals 0, NaN of either sign is highest.
__device__ inline uint32_t ordered_key(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// All threads of the block construct it and call its functions together, except place_of, which a warp calls.
class Selection {
 public:
  // `score(i)` is the score of candidate i as float32.
  template <class Score>
  __device__ Selection(unsigned char* shared, int candidates, Score score) : candidates_(candidates) {
    const int list_bytes = (2 * candidates + 15) / 16 * 16;
    list_ = reinterpret_cast<uint16_t*>(shared);
    start_ = reinterpret_cast<uint32_t*>(shared + list_bytes);
    key_ = start_ + kBuckets;
    index_bits_ = kWarp - __clz(candidates - 1);

    uint32_t least = 0xffffffffu, most = 0;
    for (int i = threadIdx.x; i < candidates; i += kReorganizeThreads) {
      const uint32_t key = ordered_key(score(i));
      key_[i] = key;
      least = min(least, key);
      most = max(most, key);
    }
    __shared__ uint32_t least_of[kMostWarps], most_of[kMostWarps];
    least = __reduce_min_sync(kAllLanes, least);
    most = __reduce_max_sync(kAllLanes, most);
    if (lane_id() == 0) {
      least_of[warp_id()] = least;
      most_of[warp_id()] = most;
    }
    __syncthreads();
    for (int warp = 0; warp < warp_count(); ++warp) {
      least = min(least, least_of[warp]);
      most = max(most, most_of[warp]);
    }
    most_ = most;
    const uint64_t last = uint64_t(most - least) << index_bits_ | ((1u << index_bits_) - 1);
    shift_ = max(0, 64 - __clzll(static_cast<long long>(last)) - kBucketBits);
  }

  // Lists the candidates by bucket, best first.
  __device__ void bucket_all() {
    const uint4 count = count_buckets(0, shift_);
    uint4 before;
    before.x = candidates_before(count);
    before.y = before.x + count.x;
    before.z = before.y + count.y;
    before.w = before.z + count.z;
    reinterpret_cast<uint4*>(start_)[threadIdx.x] = before;
    __syncthreads();
    for (int i = threadIdx.x; i < candidates_; i += kReorganizeThreads)
      list_[atomicAdd(start_ + (rank(i) >> shift_), 1u)] = uint16_t(i);
    __syncthreads();  // each start is now the start of the next bucket
  }

  // How many candidates are better than candidate i; `keep` or more is returned as `keep`. One warp calls it.
  __device__ int place_of(int i, int keep) const {
    const uint64_t mine = rank(i);
    const int bucket = int(mine >> shift_);
    const int begin = bucket == 0 ? 0 : int(start_[bucket - 1]), end = int(start_[bucket]);
    if (begin >= keep) return keep;
    unsigned better = 0;
    for (int at = begin + lane_id(); at < end; at += kWarp) better += rank(list_[at]) < mine;
    return min(keep, begin + int(__reduce_add_sync(kAllLanes, better)));
  }

  // Candidates of a rank below the result are kept, and they are `keep`.
  __device__ uint64_t keep_limit(int keep) {
    __shared__ uint32_t found[3];
    uint64_t low = 0;
    uint32_t wanted = uint32_t(keep);
    for (int shift = shift_;; shift = max(0, shift - kBucketBits)) {
      // the last kept candidate has a rank in [low, low + buckets << shift)
      const uint4 count = count_buckets(low, shift);
      uint32_t before = candidates_before(count);
      const uint32_t counts[4] = {count.x, count.y, count.z, count.w};
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (before < wanted && wanted <= before + counts[u]) {
          found[0] = 4 * threadIdx.x + u;
          found[1] = before;
          found[2] = counts[u];
        }
        before += counts[u];
      }
      __syncthreads();
      wanted -= found[1];
      low += uint64_t(found[0]) << shift;
      if (wanted == found[2]) return low + (uint64_t{1} << shift);  // certain at shift 0: ranks are unique
    }
  }

  // Lists the candidates that are not kept, by index. Returns the list.
  __device__ const uint16_t* list_dropped(uint64_t limit) {
    __shared__ int dropped_of[kMostWarps];
    const int share = (candidates_ + kReorganizeThreads - 1) / kReorganizeThreads * kWarp;  // of a warp
    const int begin = warp_id() * share, end = min(candidates_, begin + share);
    int dropped = 0;
    for (int i = begin; i < end; i += kWarp) dropped += __popc(dropped_lanes(i, end, limit));
    if (lane_id() == 0) dropped_of[warp_id()] = dropped;
    __syncthreads();
    int at = 0;
    for (int warp = 0; warp < warp_id(); ++warp) at += dropped_of[warp];
    for (int i = begin; i < end; i += kWarp) {
      const unsigned lanes = dropped_lanes(i, end, limit), mine = 1u << lane_id();
      if (lanes & mine) list_[at + __popc(lanes & (mine - 1))] = uint16_t(i + lane_id());
      at += __popc(lanes);
    }
    __syncthreads();
    return list_;
  }

 private:
  // Lower is better.
  __device__ uint64_t rank(int i) const {
    return uint64_t(most_ - key_[i]) << index_bits_ | uint32_t(i);
  }

  __device__ unsigned dropped_lanes(int first, int end, uint64_t limit) const {
    const int i = first + lane_id();
    return __ballot_sync(kAllLanes, i < end && rank(i) >= limit);
  }

  // How many candidates have a rank in each of this thread's four buckets of [low, low + buckets << shift).
  __device__ uint4 count_buckets(uint64_t low, int shift) {
    uint4* own = reinterpret_cast<uint4*>(start_) + threadIdx.x;
    *own = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int i = threadIdx.x; i < candidates_; i += kReorganizeThreads) {
      const uint64_t bucket = (rank(i) - low) >> shift;  // ranks below low wrap to numbers too high
      if (bucket < kBuckets) atomicAdd(start_ + bucket, 1u);
    }
    __syncthreads();
    return *own;
  }

  // The candidates counted in the buckets of all threads before this one.
  __device__ uint32_t candidates_before(uint4 count) {
    __shared__ uint32_t counted_by[kMostWarps];
    const uint32_t own = count.x + count.y + count.z + count.w;
    uint32_t sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, sum, step);
      if (lane_id() >= step) sum += below;
    }
    if (lane_id() == kWarp - 1) counted_by[warp_id()] = sum;
    __syncthreads();
    for (int warp = 0; warp < warp_id(); ++warp) sum += counted_by[warp];
    return sum - own;
  }

  uint16_t* list_;
  uint32_t* start_;
  uint32_t* key_;
  int candidates_, index_bits_, shift_;
  uint32_t most_;
};

}  // namespace xray
