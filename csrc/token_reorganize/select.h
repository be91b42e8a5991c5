// Top-k selection of one row of scores: descending, the lower index first among equals, NaN above everything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
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

// Writes the indices of the `keep` best of `count` scores, and for every candidate its place among them or -1.
// A float32 key and the complement of its index share one 64-bit word, so that one integer comparison decides all.
inline void select_top(const float* scores, int64_t count, int64_t keep, int64_t* indices, int32_t* place) {
  std::vector<uint64_t> keys(count);
  for (int64_t i = 0; i < count; ++i) keys[i] = uint64_t{ordered_key(scores[i])} << 32 | uint32_t(~i);
  std::nth_element(keys.begin(), keys.begin() + keep, keys.end(), std::greater<>());
  std::sort(keys.begin(), keys.begin() + keep, std::greater<>());
  std::fill(place, place + count, -1);
  for (int64_t k = 0; k < keep; ++k) {
    indices[k] = uint32_t(~keys[k]);
    place[indices[k]] = int32_t(k);
  }
}

inline void select_top(const double* scores, int64_t count, int64_t keep, int64_t* indices, int32_t* place) {
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::partial_sort(order.begin(), order.begin() + keep, order.end(), [&](int64_t a, int64_t b) {
    const uint64_t first = ordered_key(scores[a]), second = ordered_key(scores[b]);
    return first != second ? first > second : a < b;
  });
  std::fill(place, place + count, -1);
  for (int64_t k = 0; k < keep; ++k) {
    indices[k] = order[k];
    place[order[k]] = int32_t(k);
  }
}

}  // namespace xray
