// The class token's probabilities of one sequence and head, and their gradient, for one instruction set (see
// common/variants.h): beside an attention that does not give them. Reads the keys once; 2 D FLOPs a key forward, 4
// backward.

// row = softmax of scale * K q, over the keys that are seen; 0 for the others.
template <class T>
static void class_row(
    typename Wide<T>::Scalar* row, const T* query, const T* key, int64_t key_row, int64_t keys, int64_t all_keys,
    int64_t head_dim, double scale) {
  using S = typename Wide<T>::Scalar;
  using V = typename Wide<S>::Vector;
  S top = -__builtin_inf();
  for (int64_t j = 0; j < keys; ++j) {
    const S logit = S(scale) * sum_over<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
                      return load_first(query + c, n) * load_first(key + j * key_row + c, n);
                    });
    row[j] = logit;
    top = top < logit ? logit : top;
  }
  const S moved = top * S(kLog2E);
  const S sum = sum_over<S>(0, keys, [&](int64_t j, int64_t n) XRAY_LAMBDA {
    const V p = only_first<S>(exp2_of(load_first(row + j, n) * S(kLog2E) - moved), n);
    store_first(row + j, p, n);
    return p;
  });
  for (int64_t j = 0; j < keys; ++j) row[j] /= sum;
  for (int64_t j = keys; j < all_keys; ++j) row[j] = 0;
}

// Adds to the gradients of the class token's query and of the keys. `grad` is that of the row.
template <class T>
static void class_row_backward(
    T* grad_query, T* grad_key, int64_t grad_key_row, const typename Wide<T>::Scalar* grad,
    const typename Wide<T>::Scalar* row, const T* query, const T* key, int64_t key_row, int64_t keys, int64_t head_dim,
    double scale, typename Wide<T>::Scalar* sum) {
  using S = typename Wide<T>::Scalar;
  using V = typename Wide<T>::Vector;
  S mean = 0;
  for (int64_t j = 0; j < keys; ++j) mean += row[j] * grad[j];
  memset(sum, 0, head_dim * sizeof *sum);
  for (int64_t j = 0; j < keys; ++j) {
    if (row[j] == 0) continue;  // also a key that is not seen, whatever stands there
    const S weight = S(scale) * row[j] * (grad[j] - mean);
    T* to = grad_key + j * grad_key_row;
    for_each_vector<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
      store_first(sum + c, load_first(sum + c, n) + weight * load_first(key + j * key_row + c, n), n);
      const V more = weight * load_first(query + c, n);
      store_first(to + c, load_first(to + c, n) + more, n);
    });
  }
  for_each_vector<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
    store_first(grad_query + c, load_first(grad_query + c, n) + load_first(sum + c, n), n);
  });
}
