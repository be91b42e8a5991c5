// What the CPU kernels of attention take: one sequence of one head, its rows at any stride. T is the type of elements,
// S what sums are kept in.
#pragma once

#include <cstdint>

namespace xray {

template <class T>
struct HeadIn {
  const T *query, *key, *value;
  int64_t query_row, key_row, value_row;  // strides
  int64_t queries, keys, head_dim;        // keys: those that are seen
  bool is_causal;
  double scale;
};

template <class T, class S>
struct HeadOut {
  T* out;
  int64_t out_row;
  S *top, *log_sum;  // of each query
  S* class_row;      // query 0's probabilities of all keys, nullptr when nobody asks
};

template <class T, class S>
struct HeadGradIn {
  const T *grad, *out;
  int64_t grad_row, out_row;
  const S *top, *log_sum;  // of each query
  const S* grad_class;     // gradient of query 0's probabilities, nullptr when there is none
  S grad_class_sum;        // its sum, weighted by those probabilities
};

template <class T, class S>
struct HeadGradOut {
  T *query, *key, *value;
  int64_t query_row, key_row, value_row;
  int64_t all_keys;          // rows of key and value, also those that are not seen
  S *key_part, *value_part;  // (all_keys, D) for the part of some queries, nullptr where all queries come at once
};

}  // namespace xray
