// Flash attention of one (batch, head), for one instruction set (see common/variants.h).
//
// Everything is computed transposed: a panel of queries lies across the lanes of vectors, keys and channels run down.
// Then the softmax of a row is arithmetic between vectors, with no sum or maximum across lanes, and all seven products
//   S^T = K Q^T   O^T += V^T P^T   dP^T = V dO^T   dQ^T += K^T dS^T   dV += P^T dO   dK += dS^T Q
// are one inner loop: a small tile of the result in registers, a number of the left operand times a vector of the right
// one. Rows of any stride and type are first packed as dense rows of floats, 1% of the work: rows of a projection lie
// a multiple of 1 KiB apart, and a column of them would fall on a few sets of the first-level cache.
//
// Forward: FLOPs 4 Nq Nk D; keys in blocks with an online softmax. Backward: FLOPs 10 Nq Nk D; blocks of keys, whose dK
// and dV stay in the second-level cache while all queries pass; P is computed again. Memory: O(N D) a thread.
// Exponentials are a tenth of the instructions. The class token's row of P is taken from the tile where it arises.

#include "common/product.h"

// ---- one sequence of one head ----

// How many keys a panel of queries [first, last) sees.
template <class T>
XRAY_INLINE int64_t keys_seen(const xray::HeadIn<T>& in, int64_t last) {
  return in.is_causal && last < in.keys ? last : in.keys;
}

// Rows [begin, begin + rows) of logits, transposed, of a panel: where the key comes after the query, `value`.
template <class S>
static void mask_future(S* logits, int64_t width, int64_t begin, int64_t rows, int64_t first_query, S value) {
  for (int64_t j = 0; j < rows; ++j) {
    const int64_t hidden = begin + j - first_query;  // queries before this key
    for (int64_t i = 0; i < hidden && i < width; ++i) logits[j * width + i] = value;
  }
}

static constexpr int64_t kForwardKeys = 256;  // whose logits for a panel of queries stay in the first-level cache

// Numbers of scratch that `attention_head` needs.
template <class S>
static int64_t forward_scratch(int64_t keys, int64_t head_dim) {
  const int64_t channels = whole_vectors<S>(head_dim), width = 3 * lanes<S>;
  return 2 * whole_vectors<S>(keys) * channels + 3 * channels * width + (kForwardKeys + 4) * width;
}

// Queries [begin, end) that see no key.
template <class T, class S>
static void store_empty(const xray::HeadOut<T, S>& out, int64_t begin, int64_t end, int64_t head_dim) {
  for (int64_t i = begin; i < end; ++i) {
    memset(out.out + i * out.out_row, 0, head_dim * sizeof(T));
    out.top[i] = 0;
    out.log_sum[i] = __builtin_inf();
  }
}

// Queries [begin, end), `begin` a multiple of the panel's width.
template <class T>
static void attention_head(
    const xray::HeadIn<T>& in, const xray::HeadOut<T, typename Wide<T>::Scalar>& out, int64_t begin, int64_t end,
    typename Wide<T>::Scalar* scratch) {
  using S = typename Wide<T>::Scalar;
  using V = typename Wide<T>::Vector;
  constexpr int64_t L = lanes<S>;
  const int64_t head_dim = in.head_dim, channels = whole_vectors<S>(head_dim), most = keys_seen(in, end);
  if (most == 0) return store_empty(out, begin, end, head_dim);
  const int64_t key_rows = whole_vectors<S>(most);
  S* key = scratch;
  S* value = key + key_rows * channels;
  S* query = value + key_rows * channels;  // (channels, width)
  S* sum = query + channels * 3 * L;       // (channels, width)
  S* rows = sum + channels * 3 * L;        // (width, channels)
  S* logits = rows + channels * 3 * L;     // (kForwardKeys, width)
  S* shift = logits + kForwardKeys * 3 * L;
  pack_rows(key, channels, key_rows, in.key, in.key_row, most, head_dim, S(1));
  pack_rows(value, channels, key_rows, in.value, in.value_row, most, head_dim, S(1));
  // the larger of two logits is the one of the larger product, with the sign of the scale in the query
  const S sign = in.scale < 0 ? -1 : in.scale > 0 ? 1 : 0;
  const S scale = sign == 0 ? S(1) : S(in.scale * sign), factor = sign == 0 ? S(kLog2E) : S(in.scale * sign * kLog2E);

  for (int64_t first = begin; first < end;) {
    const int64_t width = L * tile_vectors((end - first + L - 1) / L);
    const int64_t count = end - first < width ? end - first : width, seen = keys_seen(in, first + count);
    S* total = shift + width;
    S* rescale = total + width;
    S* top = rescale + width;
    pack_rows(rows, channels, width, in.query + first * in.query_row, in.query_row, count, head_dim, sign);
    transpose(query, width, rows, channels, width, channels);
    for (int64_t at = 0; at < seen; at += kForwardKeys) {
      const int64_t block = seen - at < kForwardKeys ? seen - at : kForwardKeys;
      multiply_rows(logits, width, key + at * channels, channels, query, block, width, head_dim);
      if (in.is_causal && at + block > first) mask_future(logits, width, at, block, first, S(-__builtin_inf()));
      if (out.class_row && first == 0)
        for (int64_t j = 0; j < block; ++j) out.class_row[at + j] = logits[j * width];
      for (int64_t v = 0; v < width; v += L) {
        V best = at == 0 ? load(logits + v) : load(top + v);
        for (int64_t j = 0; j < block; ++j) {
          const V logit = load(logits + j * width + v);
          best = best < logit ? logit : best;
        }
        store(top + v, best);
        const V moved = best * scale * S(kLog2E);
        V part{};
        for (int64_t j = 0; j < block; ++j) {
          const V p = exp2_of(load(logits + j * width + v) * factor - moved);
          store(logits + j * width + v, p);
          part += p;
        }
        const V less = at == 0 ? V{} : exp2_of(load(shift + v) - moved);
        store(rescale + v, less);
        store(shift + v, moved);
        store(total + v, at == 0 ? part : load(total + v) * less + part);
      }
      if (at == 0) {
        multiply<Start::kZero>(sum, width, value, 1, channels, logits, width, channels, width, block);
      } else {
        multiply<Start::kScaledSum>(
            sum, width, value + at * channels, 1, channels, logits, width, channels, width, block, rescale);
      }
    }
    for (int64_t v = 0; v < width; v += L) {
      const V inverse = V{} + S(1) / load(total + v);
      for (int64_t c = 0; c < channels; ++c) store(sum + c * width + v, load(sum + c * width + v) * inverse);
    }
    transpose(rows, channels, sum, width, channels, width);
    for (int64_t i = 0; i < count; ++i) {
      for_each_vector<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
        store_first(out.out + (first + i) * out.out_row + c, load(rows + i * channels + c), n);
      });
      out.top[first + i] = top[i] * scale;
      out.log_sum[first + i] = S(log(double(total[i])));
    }
    if (out.class_row && first == 0) {
      const S moved = shift[0], inverse = 1 / total[0];
      for_each_vector<S>(0, in.keys, [&](int64_t j, int64_t n) XRAY_LAMBDA {
        store_first(out.class_row + j, exp2_of(load_first(out.class_row + j, n) * factor - moved) * inverse, n);
      });
    }
    first += count;
  }
}

// ---- backward ----

static constexpr int64_t kBackwardKeys = 256;   // whose dK and dV stay in the second-level cache
static constexpr int64_t kBackwardRows = 64;    // keys whose tiles of P and dS stay in the first
static constexpr int64_t kBackwardVectors = 6;  // of a panel of queries: dK and dV are loaded and stored once for each

template <class S>
static int64_t backward_scratch(int64_t queries, int64_t head_dim) {
  const int64_t channels = whole_vectors<S>(head_dim), width = kBackwardVectors * lanes<S>;
  const int64_t panels = 6 * channels * width + 2 * kBackwardRows * width + 3 * width;
  return 4 * kBackwardKeys * channels + panels + queries * (channels + 1);
}

// Adds to, or begins, rows of the gradient of queries; the last block of keys writes them in their type.
template <class T>
static void store_rows(
    T* to, int64_t to_row, typename Wide<T>::Scalar* sum, const typename Wide<T>::Scalar* rows, int64_t count,
    int64_t channels, int64_t head_dim, typename Wide<T>::Scalar factor, bool is_first, bool is_last) {
  for (int64_t i = 0; i < count; ++i)
    for_each_vector<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
      auto value = load(rows + i * channels + c);
      if (!is_first) value += load(sum + i * channels + c);
      if (is_last) {
        store_first(to + i * to_row + c, value * factor, n);
      } else {
        store(sum + i * channels + c, value);
      }
    });
}

// `count` channels from `channel` of one key's gradient and its value's, to the result or to a part of it.
template <class T, class S, class V>
XRAY_INLINE void store_key_gradient(
    const xray::HeadGradOut<T, S>& to, int64_t key, int64_t head_dim, int64_t channel, int64_t count, V dk, V dv) {
  if (to.key_part) {
    store_first(to.key_part + key * head_dim + channel, dk, count);
    store_first(to.value_part + key * head_dim + channel, dv, count);
  } else {
    store_first(to.key + key * to.key_row + channel, dk, count);
    store_first(to.value + key * to.value_row + channel, dv, count);
  }
}

// Zeros for the keys from `keys` on, which no query sees.
template <class T, class S>
static void clear_unseen(const xray::HeadGradOut<T, S>& to, int64_t keys, int64_t head_dim) {
  for (int64_t j = keys; j < to.all_keys; ++j) {
    if (to.key_part) {
      memset(to.key_part + j * head_dim, 0, head_dim * sizeof(S));
      memset(to.value_part + j * head_dim, 0, head_dim * sizeof(S));
    } else {
      memset(to.key + j * to.key_row, 0, head_dim * sizeof(T));
      memset(to.value + j * to.value_row, 0, head_dim * sizeof(T));
    }
  }
}

// Queries [begin, end), `begin` a multiple of the panel's width, and all keys.
template <class T>
static void attention_head_backward(
    const xray::HeadIn<T>& in, const xray::HeadGradIn<T, typename Wide<T>::Scalar>& grads,
    const xray::HeadGradOut<T, typename Wide<T>::Scalar>& to, int64_t begin, int64_t end,
    typename Wide<T>::Scalar* scratch) {
  using S = typename Wide<T>::Scalar;
  using V = typename Wide<T>::Vector;
  constexpr int64_t L = lanes<S>, most_width = kBackwardVectors * L;
  const int64_t head_dim = in.head_dim, channels = whole_vectors<S>(head_dim);
  S* key = scratch;
  S* value = key + kBackwardKeys * channels;
  S* grad_key = value + kBackwardKeys * channels;
  S* grad_value = grad_key + kBackwardKeys * channels;
  S* query_rows = grad_value + kBackwardKeys * channels;  // (width, channels)
  S* grad_rows = query_rows + channels * most_width;      // (width, channels)
  S* query = grad_rows + channels * most_width;           // (channels, width)
  S* grad = query + channels * most_width;                // (channels, width)
  S* grad_query = grad + channels * most_width;           // (channels, width)
  S* rows = grad_query + channels * most_width;           // (width, channels)
  S* p = rows + channels * most_width;                    // (kBackwardRows, width)
  S* ds = p + kBackwardRows * most_width;                 // (kBackwardRows, width)
  S* shift = ds + kBackwardRows * most_width;
  S* log_sum = shift + most_width;
  S* delta = log_sum + most_width;
  S* deltas = delta + most_width;          // of all queries
  S* query_sums = deltas + (end - begin);  // (queries, channels)
  const S factor = S(in.scale * kLog2E), scale = S(in.scale);

  // blocks of equal size; keys that nobody sees get zeros
  const int64_t blocks = in.keys > kBackwardKeys ? (in.keys + kBackwardKeys - 1) / kBackwardKeys : 1;
  const int64_t block_keys = ((in.keys + blocks - 1) / blocks + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = block * block_keys, left = in.keys - from, keys = left < block_keys ? left : block_keys;
    const int64_t key_rows = (keys + kTileRows - 1) / kTileRows * kTileRows;
    pack_rows(key, channels, key_rows, in.key + from * in.key_row, in.key_row, keys, head_dim, S(1));
    pack_rows(value, channels, key_rows, in.value + from * in.value_row, in.value_row, keys, head_dim, S(1));
    memset(grad_key, 0, key_rows * channels * sizeof(S));
    memset(grad_value, 0, key_rows * channels * sizeof(S));

    for (int64_t first = begin, count; first < end; first += count) {
      const int64_t vectors = (end - first + L - 1) / L,
                    width = L * (vectors < kBackwardVectors ? vectors : kBackwardVectors);
      count = end - first < width ? end - first : width;
      const T* from_grad = grads.grad + first * grads.grad_row;
      pack_rows(grad_rows, channels, width, from_grad, grads.grad_row, count, head_dim, S(1));
      if (block == 0) {  // sum over channels of dO * O, and of the scores' gradient
        for (int64_t i = 0; i < count; ++i) {
          const T* out = grads.out + (first + i) * grads.out_row;
          deltas[first - begin + i] = sum_over<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
            return load(grad_rows + i * channels + c) * load_first(out + c, n);
          });
        }
        if (grads.grad_class && first == 0) deltas[0] += grads.grad_class_sum;
      }
      const bool sees = keys > 0 && (!in.is_causal || first + count > from);
      if (sees) {
        const int64_t seen = in.is_causal && first + count - from < keys ? first + count - from : keys;
        pack_rows(query_rows, channels, width, in.query + first * in.query_row, in.query_row, count, head_dim, S(1));
        transpose(query, width, query_rows, channels, width, channels);
        transpose(grad, width, grad_rows, channels, width, channels);
        for (int64_t i = 0; i < width; ++i) {
          const bool real = i < count;
          shift[i] = real ? grads.top[first + i] : S(0);
          log_sum[i] = real ? grads.log_sum[first + i] * S(kLog2E) : S(__builtin_inf());
          delta[i] = real ? deltas[first - begin + i] : S(0);
        }
        for (int64_t v = 0; v < width; v += L) store(shift + v, load(shift + v) * S(kLog2E));
        for (int64_t at = 0; at < seen; at += kBackwardRows) {
          const int64_t n = seen - at < kBackwardRows ? seen - at : kBackwardRows;
          const S *k = key + at * channels, *v0 = value + at * channels;
          multiply_rows(p, width, k, channels, query, n, width, head_dim);
          multiply_rows(ds, width, v0, channels, grad, n, width, head_dim);
          if (grads.grad_class && first == 0)
            for (int64_t j = 0; j < n; ++j) ds[j * width] += grads.grad_class[from + at + j];
          for (int64_t v = 0; v < width; v += L) {
            const V moved = load(shift + v), less = load(log_sum + v), mean = load(delta + v);
            for (int64_t j = 0; j < n; ++j) {
              S *pj = p + j * width + v, *dj = ds + j * width + v;
              const V probability = exp2_of((load(pj) * factor - moved) - less);
              store(pj, probability);
              store(dj, probability * (load(dj) - mean));
            }
          }
          if (in.is_causal && from + at + n > first) {
            mask_future(p, width, from + at, n, first, S(0));
            mask_future(ds, width, from + at, n, first, S(0));
          }
          // rows up to a whole tile, of keys that are not there, must not add anything
          for (int64_t j = n; j % kTileRows != 0; ++j) {
            memset(p + j * width, 0, width * sizeof(S));
            memset(ds + j * width, 0, width * sizeof(S));
          }
          multiply<Start::kSum>(
              grad_value + at * channels, channels, p, width, 1, grad_rows, channels, n, channels, width);
          multiply<Start::kSum>(
              grad_key + at * channels, channels, ds, width, 1, query_rows, channels, n, channels, width);
          if (at == 0) {
            multiply<Start::kZero>(grad_query, width, k, 1, channels, ds, width, channels, width, n);
          } else {
            multiply<Start::kSum>(grad_query, width, k, 1, channels, ds, width, channels, width, n);
          }
        }
        transpose(rows, channels, grad_query, width, channels, width);
      } else {
        memset(rows, 0, channels * width * sizeof(S));
      }
      store_rows(
          to.query + first * to.query_row, to.query_row, query_sums + (first - begin) * channels, rows, count, channels,
          head_dim, scale, block == 0, block == blocks - 1);
    }
    for (int64_t j = 0; j < keys; ++j) {
      for_each_vector<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
        const V dk = load(grad_key + j * channels + c) * scale, dv = load(grad_value + j * channels + c);
        store_key_gradient(to, from + j, head_dim, c, n, dk, dv);
      });
    }
  }
  clear_unseen(to, in.keys, head_dim);
}

// Rows [begin, end) of the sum of `parts` results, each (keys, D), one after another.
template <class T>
static void add_parts(
    T* to, int64_t to_row, const typename Wide<T>::Scalar* part, int64_t part_size, int64_t parts, int64_t head_dim,
    int64_t keys) {
  for (int64_t j = 0; j < keys; ++j)
    for_each_vector<T>(0, head_dim, [&](int64_t c, int64_t n) XRAY_LAMBDA {
      auto sum = load_first(part + j * head_dim + c, n);
      for (int64_t i = 1; i < parts; ++i) sum += load_first(part + i * part_size + j * head_dim + c, n);
      store_first(to + j * to_row + c, sum, n);
    });
}
