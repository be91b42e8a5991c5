// Matrix products of packed operands, and packing. Included after simd.h inside one namespace for each instruction set,
// hence no include guard.

// ---- geometry ----

// Rows of a tile of the product: with three vectors a row, sums fill the registers but for one row's operands.
#if XRAY_LANES == 16
static constexpr int kTileRows = 8;
#else
static constexpr int kTileRows = 4;
#endif

// Vectors of the next tile of `left`: three, but never one alone at the end, which would wait for its own sums.
XRAY_INLINE int tile_vectors(int64_t left) {
  return left == 4 || left < 3 ? (left < 2 ? 1 : 2) : 3;
}

template <class S>
static inline int64_t whole_vectors(int64_t count) {
  constexpr int64_t unit = lanes<S> > kTileRows ? lanes<S> : kTileRows;
  return (count + unit - 1) / unit * unit;
}

// ---- the product ----

enum class Start { kZero, kSum, kScaledSum };

// c (kTileRows x vectors) [+]= a (kTileRows x steps) b (steps x vectors); c's rows are first scaled lane by lane. What
// c holds is added last: long sums come in blocks, whose rounding does not grow with what is there already.
template <Start start, int vectors, class S>
XRAY_INLINE void multiply_tile(
    S* c, int64_t c_row, const S* a, int64_t a_row, int64_t a_step, const S* b, int64_t b_row, int64_t steps,
    const S* lane_scale) {
  using V = typename Wide<S>::Vector;
  V sum[kTileRows][vectors] = {};
  for (int64_t k = 0; k < steps; ++k) {
    V right[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) right[v] = load(b + k * b_row + v * lanes<S>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const S left = a[r * a_row + k * a_step];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      S* to = c + r * c_row + v * lanes<S>;
      if (start == Start::kSum) sum[r][v] += load(to);
      if (start == Start::kScaledSum) sum[r][v] += load(to) * load(lane_scale + v * lanes<S>);
      store(to, sum[r][v]);
    }
}

// All `rows` (a multiple of kTileRows, or rounded up to one) by `width` (whole vectors) of c.
template <Start start, class S>
static void multiply(
    S* c, int64_t c_row, const S* a, int64_t a_row, int64_t a_step, const S* b, int64_t b_row, int64_t rows,
    int64_t width, int64_t steps, const S* lane_scale = nullptr) {
  for (int64_t at = 0; at < width;) {
    const int vectors = tile_vectors((width - at) / lanes<S>);
    const S* scale = lane_scale + at;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      S* to = c + r * c_row + at;
      const S* left = a + r * a_row;
      if (vectors == 3) multiply_tile<start, 3>(to, c_row, left, a_row, a_step, b + at, b_row, steps, scale);
      if (vectors == 2) multiply_tile<start, 2>(to, c_row, left, a_row, a_step, b + at, b_row, steps, scale);
      if (vectors == 1) multiply_tile<start, 1>(to, c_row, left, a_row, a_step, b + at, b_row, steps, scale);
    }
    at += vectors * lanes<S>;
  }
}

// Dot products of rows of `a` with columns of b: logits. Without fused multiply-add a long sum of large products rounds
// twice as often, so there it is made in short blocks.
template <class S>
XRAY_INLINE void multiply_rows(
    S* c, int64_t c_row, const S* a, int64_t a_row, const S* b, int64_t rows, int64_t width, int64_t steps) {
#if XRAY_LANES == 4
  constexpr int64_t most = 16;
#else
  constexpr int64_t most = INT64_MAX;
#endif
  multiply<Start::kZero>(c, c_row, a, a_row, 1, b, width, rows, width, steps < most ? steps : most);
  for (int64_t k = most; k < steps; k += most)
    multiply<Start::kSum>(
        c, c_row, a + k, a_row, 1, b + k * width, width, rows, width, steps - k < most ? steps - k : most);
}

// ---- packing ----

// Rows as dense rows of floats times `factor`; zeros up to `to_row` channels and `to_rows` rows.
template <class T>
static void pack_rows(
    typename Wide<T>::Scalar* to, int64_t to_row, int64_t to_rows, const T* from, int64_t from_row, int64_t rows,
    int64_t channels, typename Wide<T>::Scalar factor) {
  for (int64_t i = 0; i < rows; ++i) {
    // rows of a projection lie in pages of their own, where the processor does not look ahead by itself
    for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch(from + (i + 16) * from_row + c);
    for_each_vector<T>(0, channels, [&](int64_t c, int64_t count) XRAY_LAMBDA {
      store(to + i * to_row + c, load_first(from + i * from_row + c, count) * factor);
    });
    for (int64_t c = (channels + lanes<T> - 1) / lanes<T> * lanes<T>; c < to_row; ++c) to[i * to_row + c] = 0;
  }
  memset(to + rows * to_row, 0, (to_rows - rows) * to_row * sizeof *to);
}

// (rows x columns) to (columns x rows), both whole vectors.
template <class S>
static void transpose(S* to, int64_t to_row, const S* from, int64_t from_row, int64_t rows, int64_t columns) {
#if XRAY_LANES >= 8
  if constexpr (sizeof(S) == 4) {
    for (int64_t i = 0; i < rows; i += 8)
      for (int64_t j = 0; j < columns; j += 8) {
        __m256 a[8], b[8];
        for (int k = 0; k < 8; ++k) a[k] = _mm256_loadu_ps(from + (i + k) * from_row + j);
        for (int k = 0; k < 8; k += 2) {
          b[k] = _mm256_unpacklo_ps(a[k], a[k + 1]);
          b[k + 1] = _mm256_unpackhi_ps(a[k], a[k + 1]);
        }
        for (int k = 0; k < 8; k += 4)
          for (int h = 0; h < 2; ++h) {
            a[k + 2 * h] = _mm256_shuffle_ps(b[k + h], b[k + 2 + h], 0x44);
            a[k + 2 * h + 1] = _mm256_shuffle_ps(b[k + h], b[k + 2 + h], 0xee);
          }
        for (int k = 0; k < 4; ++k) {
          _mm256_storeu_ps(to + (j + k) * to_row + i, _mm256_permute2f128_ps(a[k], a[k + 4], 0x20));
          _mm256_storeu_ps(to + (j + k + 4) * to_row + i, _mm256_permute2f128_ps(a[k], a[k + 4], 0x31));
        }
      }
    return;
  }
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
}
