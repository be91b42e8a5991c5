// Token reorganisation of one batch row, for one instruction set (see common/variants.h): alone, on channels
// [begin, end), and between a residual addition and a LayerNorm, on whole rows. Strides are in elements; rows are
// dense.
//
// Forward reads every row of tokens once, in order: prefix and kept rows go to their place, dropped rows are added to
// the fused row in float32 (float64 for float64). Bytes: (N + P + K + 1) rows; FLOPs: 2 C a dropped token.
// Backward reads every row of the gradient once, in order, and the dropped tokens; it writes each row of the result
// once. Both read in order and scatter what they write: gathering instead took up to 1.6 times as long.
// Large results are written past the caches (see simd.h), in up to 1.6 times less time than by plain stores.

// A row of tokens, and one that is a sum of two which is nowhere in memory.
template <class T>
struct Row {
  using Vector = typename Wide<T>::Vector;
  const T* values;
  XRAY_METHOD Vector load(int64_t c, int64_t count) const {
    return load_first(values + c, count);
  }
};

template <class T>
struct SumRow {
  using Vector = typename Wide<T>::Vector;
  const T *residual, *update;
  XRAY_METHOD Vector load(int64_t c, int64_t count) const {
    return load_first(residual + c, count) + load_first(update + c, count);
  }
};

template <class T>
static inline void copy_row(T* to, const T* from, int64_t begin, int64_t end, bool past_caches) {
  if (!past_caches) {
    memcpy(to + begin, from + begin, (end - begin) * sizeof(T));
    return;
  }
  for (int64_t c = begin; c < end; c += lanes<T>) {
    typename Packing<T>::Packed packed;
    memcpy(&packed, from + c, sizeof packed);
    stream(to + c, packed);
  }
}

// Weighted sum of rows, which are added four at a time, so that the sum is loaded and stored a quarter as often.
template <class T, class R>
struct FusedRow {
  using S = typename Wide<T>::Scalar;
  S* sum;  // nullptr when nothing is fused
  int64_t begin, end;
  R rows[4];
  S weights[4];
  int waiting = 0;

  FusedRow(S* sum_, int64_t begin_, int64_t end_) : sum(sum_), begin(begin_), end(end_) {
    if (sum) memset(sum + begin, 0, (end - begin) * sizeof *sum);
  }

  XRAY_METHOD void add(R row, S weight) {
    if (!sum) return;
    rows[waiting] = row;
    weights[waiting] = weight;
    if (++waiting == 4) flush();
  }

  void flush() {
    if (waiting == 4) {
      const R a = rows[0], b = rows[1], c = rows[2], d = rows[3];
      const S u = weights[0], v = weights[1], w = weights[2], x = weights[3];
      for_each_vector<T>(begin, end, [&](int64_t k, int64_t n) XRAY_LAMBDA {
        const auto first = u * a.load(k, n) + v * b.load(k, n), second = w * c.load(k, n) + x * d.load(k, n);
        store_first(sum + k, load_first(sum + k, n) + (first + second), n);
      });
    } else {
      for (int i = 0; i < waiting; ++i) {
        for_each_vector<T>(begin, end, [&](int64_t k, int64_t n) XRAY_LAMBDA {
          store_first(sum + k, load_first(sum + k, n) + weights[i] * rows[i].load(k, n), n);
        });
      }
    }
    waiting = 0;
  }
};

// Gradients of a dropped token and its score: weight * grad_fused, and <grad_fused, row>, which is returned.
template <class T, class R>
static inline typename Wide<T>::Scalar drop_row(
    T* to, const typename Wide<T>::Scalar* grad_fused, R row, typename Wide<T>::Scalar weight, int64_t begin,
    int64_t end, bool past_caches) {
  return sum_over<T>(begin, end, [&](int64_t c, int64_t count) XRAY_LAMBDA {
    const auto g = load_first(grad_fused + c, count);
    store_first(to + c, weight * g, count, past_caches);
    return g * row.load(c, count);
  });
}

template <class T>
static void reorganize_row(
    T* out,           // (P + K + fused, C)
    const T* tokens,  // (N, C)
    int64_t token_stride,
    const typename Wide<T>::Scalar* scores,  // (N - P)
    const int32_t* place,                    // (N - P): place among the kept, or -1
    typename Wide<T>::Scalar* sum,           // (C) scratch, nullptr when nothing is fused
    int64_t length, int64_t prefix, int64_t keep, int64_t channels, int64_t begin, int64_t end, bool past_caches) {
  for (int64_t i = 0; i < prefix; ++i) copy_row(out + i * channels, tokens + i * token_stride, begin, end, past_caches);
  FusedRow<T, Row<T>> fused(sum, begin, end);
  for (int64_t i = 0; i < length - prefix; ++i) {
    const T* row = tokens + (prefix + i) * token_stride;
    if (place[i] >= 0) {
      copy_row(out + (prefix + place[i]) * channels, row, begin, end, past_caches);
    } else {
      fused.add({row}, scores[i]);
    }
  }
  if (sum) {
    fused.flush();
    T* to = out + (prefix + keep) * channels;
    for_each_vector<T>(begin, end, [&](int64_t c, int64_t count) XRAY_LAMBDA {
      store_first(to + c, load_first(sum + c, count), count);
    });
  }
  if (past_caches) end_streaming();
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
    const int64_t* indices,                  // (K)
    const int32_t* place,                    // (N - P): 0 or more for what is kept, or -1
    typename Wide<T>::Scalar* grad_fused,    // (C) scratch, nullptr when nothing was fused
    int64_t length, int64_t prefix, int64_t keep, int64_t channels, int64_t begin, int64_t end, bool past_caches) {
  for (int64_t i = 0; i < prefix + keep; ++i) {
    const int64_t to = i < prefix ? i : prefix + indices[i - prefix];
    copy_row(grad_tokens + to * channels, grad + i * grad_stride, begin, end, past_caches);
  }
  if (grad_fused) {
    const T* last = grad + (prefix + keep) * grad_stride;
    for_each_vector<T>(begin, end, [&](int64_t c, int64_t count) XRAY_LAMBDA {
      store_first(grad_fused + c, load_first(last + c, count), count);
    });
  }
  for (int64_t i = 0; i < length - prefix; ++i) {
    T* to = grad_tokens + (prefix + i) * channels;
    grad_scores[i] = 0;
    if (place[i] >= 0) continue;
    if (grad_fused) {
      const Row<T> row{tokens + (prefix + i) * token_stride};
      grad_scores[i] = drop_row<T>(to, grad_fused, row, scores[i], begin, end, past_caches);
    } else {
      memset(to + begin, 0, (end - begin) * sizeof(T));
    }
  }
  if (past_caches) end_streaming();
}

// ---- between a residual addition and a LayerNorm ----

// Mean and 1 / standard deviation of a row.
template <class S>
struct Moments {
  S mean, inverse;
};

// From the row, which is in the first-level cache, and its sum.
template <class T>
static inline Moments<typename Wide<T>::Scalar> moments_of(
    const typename Wide<T>::Scalar* row, typename Wide<T>::Scalar sum, int64_t channels, double eps) {
  using S = typename Wide<T>::Scalar;
  const S mean = sum / S(channels);
  const S squares = sum_over<T>(0, channels, [&](int64_t c, int64_t count) XRAY_LAMBDA {
    const auto apart = only_first<T>(load_first(row + c, count) - mean, count);
    return apart * apart;
  });
  return {mean, S(1 / __builtin_sqrt(double(squares) / double(channels) + eps))};
}

template <class T>
static inline void norm_row(
    T* normed, const typename Wide<T>::Scalar* row, typename Wide<T>::Scalar sum,
    const typename Wide<T>::Scalar* weight, const typename Wide<T>::Scalar* bias, double eps, int64_t channels,
    bool past_caches) {
  const auto moments = moments_of<T>(row, sum, channels, eps);
  for_each_vector<T>(0, channels, [&](int64_t c, int64_t count) XRAY_LAMBDA {
    const auto unit = (load_first(row + c, count) - moments.mean) * moments.inverse;
    store_first(normed + c, unit * load_first(weight + c, count) + load_first(bias + c, count), count, past_caches);
  });
}

// Stores the row in the stream, and as it is there, rounded to T, in `kept`; returns the sum of that.
template <class T, class R>
static inline typename Wide<T>::Scalar store_stream_row(
    T* stream, typename Wide<T>::Scalar* kept, R row, int64_t begin, int64_t end, bool past_caches) {
  return sum_over<T>(begin, end, [&](int64_t c, int64_t count) XRAY_LAMBDA {
    const auto packed = Packing<T>::pack(row.load(c, count));
    const auto value = Packing<T>::unpack(packed);
    store_packed(stream + c, packed, count, past_caches);
    store_first(kept + c, value, count);
    return value;
  });
}

// A row of T, widened; returns its sum.
template <class T>
static inline typename Wide<T>::Scalar widen_row(typename Wide<T>::Scalar* to, const T* row, int64_t channels) {
  return sum_over<T>(0, channels, [&](int64_t c, int64_t count) XRAY_LAMBDA {
    const auto value = load_first(row + c, count);
    store_first(to + c, value, count);
    return value;
  });
}

template <class T>
static void add_reorganize_norm_row(
    T* stream,          // (P + K + fused, C)
    T* normed,          // (P + K + fused, C), or nullptr to leave it out, as it needs whole rows
    const T* residual,  // (N, C)
    int64_t residual_stride,
    const T* update,  // (N, C)
    int64_t update_stride,
    const typename Wide<T>::Scalar* scores,  // (N - P)
    const int32_t* place,                    // (N - P): place among the kept, or -1
    const typename Wide<T>::Scalar* weight, const typename Wide<T>::Scalar* bias, double eps,
    typename Wide<T>::Scalar* kept,  // (C) scratch
    typename Wide<T>::Scalar* sum,   // (C) scratch, nullptr when nothing is fused
    int64_t length, int64_t prefix, int64_t keep, int64_t channels, int64_t begin, int64_t end, bool past_caches) {
  FusedRow<T, SumRow<T>> fused(sum, begin, end);
  for (int64_t i = 0; i < length; ++i) {
    const SumRow<T> row{residual + i * residual_stride, update + i * update_stride};
    const int64_t at = i < prefix ? i : place[i - prefix] < 0 ? -1 : prefix + place[i - prefix];
    if (at < 0) {
      fused.add(row, scores[i - prefix]);
      continue;
    }
    const auto total = store_stream_row(stream + at * channels, kept, row, begin, end, past_caches);
    if (normed) norm_row(normed + at * channels, kept, total, weight, bias, eps, channels, past_caches);
  }
  if (sum) {
    fused.flush();
    const int64_t at = (prefix + keep) * channels;
    const Row<typename Wide<T>::Scalar> row{sum};
    const auto total = store_stream_row(stream + at, kept, row, begin, end, past_caches);
    if (normed) norm_row(normed + at, kept, total, weight, bias, eps, channels, past_caches);
  }
  if (past_caches) end_streaming();
}

// Rows [first, last) of (rows, C).
template <class T>
static void norm_rows(
    T* normed, const T* stream, const typename Wide<T>::Scalar* weight, const typename Wide<T>::Scalar* bias,
    double eps, typename Wide<T>::Scalar* kept, int64_t channels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const auto sum = widen_row(kept, stream + i * channels, channels);
    norm_row(normed + i * channels, kept, sum, weight, bias, eps, channels, false);
  }
}

// The gradient that arrives at one row of the stream: its own, and LayerNorm's. Adds to those of weight and bias.
template <class T, class G>
static inline void norm_row_backward(
    G* grad, const T* grad_stream, const T* grad_normed, const T* stream, const typename Wide<T>::Scalar* weight,
    double eps, typename Wide<T>::Scalar* kept, typename Wide<T>::Scalar* grad_weight,
    typename Wide<T>::Scalar* grad_bias, int64_t channels, bool past_caches) {
  using S = typename Wide<T>::Scalar;
  using Vector = typename Wide<T>::Vector;
  const S sum = widen_row(kept, stream, channels);
  const auto moments = moments_of<T>(kept, sum, channels, eps);
  const Pair<S> along = sum_over<T>(0, channels, [&](int64_t c, int64_t count) XRAY_LAMBDA {
    const auto g = load_first(grad_normed + c, count);
    const auto unit = (load_first(kept + c, count) - moments.mean) * moments.inverse;
    store_first(kept + c, unit, count);
    store_first(grad_weight + c, load_first(grad_weight + c, count) + g * unit, count);
    store_first(grad_bias + c, load_first(grad_bias + c, count) + g, count);
    const auto through = g * load_first(weight + c, count);
    return Pair<Vector>{through, through * unit};
  });
  const S ones = along.first / S(channels), units = along.second / S(channels);
  for_each_vector<T>(0, channels, [&](int64_t c, int64_t count) XRAY_LAMBDA {
    const auto g = load_first(grad_normed + c, count) * load_first(weight + c, count);
    const auto through_norm = moments.inverse * (g - ones - load_first(kept + c, count) * units);
    store_first(grad + c, load_first(grad_stream + c, count) + through_norm, count, past_caches);
  });
}

// The same for the fused row, whose gradient stays wide.
template <class T>
static void fused_row_backward(
    typename Wide<T>::Scalar* grad, const T* grad_stream, const T* grad_normed, const T* stream,
    const typename Wide<T>::Scalar* weight, double eps, typename Wide<T>::Scalar* kept,
    typename Wide<T>::Scalar* grad_weight, typename Wide<T>::Scalar* grad_bias, int64_t channels) {
  norm_row_backward(grad, grad_stream, grad_normed, stream, weight, eps, kept, grad_weight, grad_bias, channels, false);
}

// Rows [begin, end) of the stream, fused row left out, back to the tokens they came from.
template <class T>
static void add_reorganize_norm_kept_backward(
    T* grad_tokens,        // (N, C)
    const T* grad_stream,  // (P + K + fused, C)
    int64_t grad_stream_stride,
    const T* grad_normed,  // (P + K + fused, C)
    int64_t grad_normed_stride,
    const T* stream,         // (P + K + fused, C)
    const int64_t* indices,  // (K)
    const typename Wide<T>::Scalar* weight, double eps,
    typename Wide<T>::Scalar* kept,         // (C) scratch
    typename Wide<T>::Scalar* grad_weight,  // (C), added to
    typename Wide<T>::Scalar* grad_bias,    // (C), added to
    int64_t prefix, int64_t channels, int64_t begin, int64_t end, bool past_caches) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t to = i < prefix ? i : prefix + indices[i - prefix];
    norm_row_backward(
        grad_tokens + to * channels, grad_stream + i * grad_stream_stride, grad_normed + i * grad_normed_stride,
        stream + i * channels, weight, eps, kept, grad_weight, grad_bias, channels, past_caches);
  }
  if (past_caches) end_streaming();
}

// Dropped tokens among candidates [begin, end), from the gradient of the fused row (nullptr when nothing was fused).
template <class T>
static void add_reorganize_norm_dropped_backward(
    T* grad_tokens,                              // (N, C)
    typename Wide<T>::Scalar* grad_scores,       // (N - P)
    const typename Wide<T>::Scalar* grad_fused,  // (C)
    const T* residual,                           // (N, C)
    int64_t residual_stride,
    const T* update,  // (N, C)
    int64_t update_stride,
    const typename Wide<T>::Scalar* scores,  // (N - P)
    const int32_t* place,                    // (N - P): 0 or more for what is kept, or -1
    int64_t prefix, int64_t channels, int64_t begin, int64_t end, bool past_caches) {
  for (int64_t i = begin; i < end; ++i) {
    grad_scores[i] = 0;
    if (place[i] >= 0) continue;
    T* to = grad_tokens + (prefix + i) * channels;
    if (grad_fused) {
      const SumRow<T> row{residual + (prefix + i) * residual_stride, update + (prefix + i) * update_stride};
      grad_scores[i] = drop_row<T>(to, grad_fused, row, scores[i], 0, channels, past_caches);
    } else {
      memset(to, 0, channels * sizeof(T));
    }
  }
  if (past_caches) end_streaming();
}
