// Token reorganisation of one batch row, channels [begin, end), for one instruction set (see common/variants.h).
//
// Forward reads every row of tokens once, in order: prefix and kept rows are copied to their place, dropped rows are
// added to the fused row in float32 (float64 for float64). Bytes: (N + P + K + 1) rows; FLOPs: 2 C a dropped token.
// Backward writes every row of the gradient once and reads the dropped tokens once for the scores' gradient.
// Strides are in elements; rows are dense.

template <class T>
static inline void copy_row(T* to, const T* from, int64_t begin, int64_t end) {
  memcpy(to + begin, from + begin, (end - begin) * sizeof(T));
}

// sum += weight * row
template <class T>
static inline void add_row(
    typename Wide<T>::Scalar* sum, const T* row, typename Wide<T>::Scalar weight, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + lanes<T> <= end; c += lanes<T>) store(sum + c, load(sum + c) + weight * load(row + c));
  if (c < end) store_some(sum + c, load_some(sum + c, end - c) + weight * load_some(row + c, end - c), end - c);
}

template <class T>
static void reorganize_row(
    T* out,           // (P + K + fused, C)
    const T* tokens,  // (N, C)
    int64_t token_stride,
    const typename Wide<T>::Scalar* scores,  // (N - P)
    const int32_t* place,                    // (N - P): place among the kept, or -1
    typename Wide<T>::Scalar* sum,           // (C) scratch, nullptr when nothing is fused
    int64_t length, int64_t prefix, int64_t keep, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < prefix; ++i) copy_row(out + i * channels, tokens + i * token_stride, begin, end);
  if (sum) memset(sum + begin, 0, (end - begin) * sizeof *sum);
  for (int64_t i = 0; i < length - prefix; ++i) {
    const T* row = tokens + (prefix + i) * token_stride;
    if (place[i] >= 0) {
      copy_row(out + (prefix + place[i]) * channels, row, begin, end);
    } else if (sum) {
      add_row(sum, row, scores[i], begin, end);
    }
  }
  if (!sum) return;
  T* fused = out + (prefix + keep) * channels;
  int64_t c = begin;
  for (; c + lanes<T> <= end; c += lanes<T>) store(fused + c, load(sum + c));
  if (c < end) store_some(fused + c, load_some(sum + c, end - c), end - c);
}

template <class T>
static void reorganize_row_backward(
    T* grad_tokens,                         // (N, C)
    typename Wide<T>::Scalar* grad_scores,  // (N - P), the part of these channels
    const T* grad,                          // (P + K + fused, C)
    int64_t grad_stride,
    const T* tokens,  // (N, C)
    int64_t token_stride,
    const typename Wide<T>::Scalar* scores,  // (N - P)
    const int32_t* place,                    // (N - P)
    int64_t length, int64_t prefix, int64_t keep, int64_t channels, bool fuse, int64_t begin, int64_t end) {
  using S = typename Wide<T>::Scalar;
  for (int64_t i = 0; i < prefix; ++i) copy_row(grad_tokens + i * channels, grad + i * grad_stride, begin, end);
  const T* grad_fused = grad + (prefix + keep) * grad_stride;
  for (int64_t i = 0; i < length - prefix; ++i) {
    T* to = grad_tokens + (prefix + i) * channels;
    grad_scores[i] = 0;
    if (place[i] >= 0) {
      copy_row(to, grad + (prefix + place[i]) * grad_stride, begin, end);
    } else if (!fuse) {
      memset(to + begin, 0, (end - begin) * sizeof(T));
    } else {
      const T* row = tokens + (prefix + i) * token_stride;
      // blocks of 64 channels have a sum of their own: rounding grows with their number, not with the channels'
      typename Wide<T>::Vector dot{};
      int64_t c = begin;
      for (; c + 64 <= end; c += 64) {
        typename Wide<T>::Vector part{};
        for (int64_t k = c; k < c + 64; k += lanes<T>) {
          const auto g = load(grad_fused + k);
          store(to + k, scores[i] * g);
          part += g * load(row + k);
        }
        dot += part;
      }
      for (; c + lanes<T> <= end; c += lanes<T>) {
        const auto g = load(grad_fused + c);
        store(to + c, scores[i] * g);
        dot += g * load(row + c);
      }
      if (c < end) {
        const auto g = load_some(grad_fused + c, end - c);
        store_some(to + c, scores[i] * g, end - c);
        dot += g * load_some(row + c, end - c);
      }
      grad_scores[i] = sum_lanes<S>(dot);
    }
  }
}
