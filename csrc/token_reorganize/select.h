// Top-k selection of one row of scores: descending, the lower index first among equals, NaN above everything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

namespace xray {

// A key whose unsigned order is the order of the score: -0 equals 0, NaN of either sign is highest.
inline uint32_t ordered_key(float score) {
  if (score != score) return UINT32_MAX;
  uint32_t bits;
  score += 0.0f;
  memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline uint64_t ordered_key(double score) {
  if (score != score) return UINT64_MAX;
  uint64_t bits;
  score += 0.0;
  memcpy(&bits, &score, sizeof bits);
  return bits & 0x8000000000000000u ? ~bits : bits | 0x8000000000000000u;
}

// Sorts the scores of one row; keeps its scratch memory from row to row.
//
// Float32 keys are spread over 16 bits between the least and the most, which two passes of a radix sort put in order;
// what 16 bits do not tell apart is left to an insertion sort, and, where that is much, to std::sort. A radix sort of
// all 32 bits took twice as long, std::nth_element and std::sort of the kept ones 6 (196 scores) to 12 times (1568).
class Selector {
 public:
  // Writes the indices of the `keep` best of `count` scores, and for every candidate its place among them or -1.
  template <class S>
  void select(const S* scores, int64_t count, int64_t keep, int64_t* indices, int32_t* place) {
    sort(scores, count);
    std::fill(place, place + count, -1);
    for (int64_t k = 0; k < keep; ++k) {
      indices[k] = order_[k];
      place[order_[k]] = int32_t(k);
    }
  }

 private:
  void sort(const float* scores, int64_t count) {
    order_.resize(count);
    words_.resize(2 * count);
    uint64_t *from = words_.data() + count, *to = words_.data();
    uint32_t least = UINT32_MAX, most = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = ~ordered_key(scores[i]);
      least = std::min(least, key);
      most = std::max(most, key);
      to[i] = uint64_t{key} << 32 | uint32_t(i);  // the index makes words of equal scores different
    }
    int shift = 32;
    while (shift < 48 && ((most - least) >> (shift - 16)) != 0) ++shift;
    const uint64_t base = uint64_t{least} << 32;
    uint32_t histogram[2][256] = {};
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t spread = (to[i] - base) >> shift;
      ++histogram[0][spread & 255];
      ++histogram[1][spread >> 8];
    }
    for (int pass = 0; pass < 2; ++pass) {
      uint32_t place = 0;
      for (uint32_t& bucket : histogram[pass]) place += std::exchange(bucket, place);
      std::swap(from, to);
      for (int64_t i = 0; i < count; ++i) to[histogram[pass][(from[i] - base) >> (shift + 8 * pass) & 255]++] = from[i];
    }
    int64_t moves = 8 * count;
    for (int64_t i = 1; i < count; ++i) {
      const uint64_t word = to[i];
      int64_t k = i;
      for (; k > 0 && to[k - 1] > word; --k) to[k] = to[k - 1];
      to[k] = word;
      moves -= i - k;
      if (moves < 0) {
        std::sort(to, to + count);
        break;
      }
    }
    for (int64_t i = 0; i < count; ++i) order_[i] = uint32_t(to[i]);
  }

  void sort(const double* scores, int64_t count) {  // for checking gradients
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), 0u);
    std::stable_sort(order_.begin(), order_.end(), [&](uint32_t a, uint32_t b) {
      return ordered_key(scores[a]) > ordered_key(scores[b]);
    });
  }

  std::vector<uint32_t> order_;
  std::vector<uint64_t> words_;
};

}  // namespace xray
