// The product of matrices in tiles, and packing of its operands. Included inside namespace amx after common/amx.h and
// common/product.h, hence no include guard.
//
// A product of tiles is (16 x 32) times (32 x 16) to 16 x 16 floats. In memory every matrix is stripes of 64 bytes, the
// width of a tile, so a tile is 16 consecutive cache lines, whatever the strides of the inputs: read where they lie, 16
// rows at a multiple of 4 KiB would share the ways of one set. Packing also pads: rows to 16 or 32, channels to 32,
// with zeros, and reads nothing past the inputs.
//
// Registers: 2 x 2 sums, two left and two right operands, all eight; four loads for four products, and four products
// (16 cycles each) cover the latency of one (52).

static constexpr int64_t kSide = 16;  // rows of a tile, and columns of sums
static constexpr int64_t kStep = 32;  // terms that one product adds

XRAY_INLINE int64_t tiles_of(int64_t count) {
  return (count + kSide - 1) / kSide;
}

XRAY_INLINE int64_t steps_of(int64_t count) {
  return (count + kStep - 1) / kStep;
}

XRAY_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// ---- the product ----

// A block of up to 2 x 2 tiles: c [+]= a b. The tile at (row, column) of c is at c + column * c_stripe + row * c_row,
// of a at a + step * a_stripe + row, of b at b + column * b_stripe + step.
template <bool add, int rows, int columns>
XRAY_INLINE void multiply_block(
    Tile* c, int64_t c_stripe, int64_t c_row, const Tile* a, int64_t a_stripe, const Tile* b, int64_t b_stripe,
    int64_t steps) {
  constexpr bool lower = rows == 2, right = columns == 2;
  if constexpr (add) {
    XRAY_TILE_LOAD(0, c);
    if constexpr (right) XRAY_TILE_LOAD(1, c + c_stripe);
    if constexpr (lower) XRAY_TILE_LOAD(2, c + c_row);
    if constexpr (lower && right) XRAY_TILE_LOAD(3, c + c_stripe + c_row);
  } else {
    XRAY_TILE_ZERO(0);
    if constexpr (right) XRAY_TILE_ZERO(1);
    if constexpr (lower) XRAY_TILE_ZERO(2);
    if constexpr (lower && right) XRAY_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    XRAY_TILE_LOAD(4, a + k * a_stripe);
    XRAY_TILE_LOAD(6, b + k);
    XRAY_TILE_MULTIPLY(0, 4, 6);
    if constexpr (right) {
      XRAY_TILE_LOAD(7, b + b_stripe + k);
      XRAY_TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (lower) {
      XRAY_TILE_LOAD(5, a + k * a_stripe + 1);
      XRAY_TILE_MULTIPLY(2, 5, 6);
    }
    if constexpr (lower && right) XRAY_TILE_MULTIPLY(3, 5, 7);
  }
  XRAY_TILE_STORE(0, c);
  if constexpr (right) XRAY_TILE_STORE(1, c + c_stripe);
  if constexpr (lower) XRAY_TILE_STORE(2, c + c_row);
  if constexpr (lower && right) XRAY_TILE_STORE(3, c + c_stripe + c_row);
}

// All `rows` x `columns` tiles of c.
template <bool add>
static void multiply(
    Tile* c, int64_t c_stripe, const Tile* a, int64_t a_stripe, const Tile* b, int64_t b_stripe, int64_t rows,
    int64_t columns, int64_t steps, int64_t c_row = 1) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t q = 0; q < columns; q += 2) {
      Tile* to = c + q * c_stripe + r * c_row;
      const Tile *left = a + r, *right = b + q * b_stripe;
      const bool lower = r + 1 < rows, wide = q + 1 < columns;
      if (lower && wide) multiply_block<add, 2, 2>(to, c_stripe, c_row, left, a_stripe, right, b_stripe, steps);
      if (lower && !wide) multiply_block<add, 2, 1>(to, c_stripe, c_row, left, a_stripe, right, b_stripe, steps);
      if (!lower && wide) multiply_block<add, 1, 2>(to, c_stripe, c_row, left, a_stripe, right, b_stripe, steps);
      if (!lower && !wide) multiply_block<add, 1, 1>(to, c_stripe, c_row, left, a_stripe, right, b_stripe, steps);
    }
}

// ---- packing ----

// Row `i` of a stripe.
template <class T>
XRAY_INLINE T* row_of(Tile* stripe, int64_t i) {
  return (T*)((char*)stripe + i * 64);
}

// Left operand: rows as they are, in stripes of 32 channels, with zeros up to there. Rows up to a whole tile are left
// out: they only make rows of the product that nobody reads.
static void pack_left(
    Tile* to, int64_t stripe, const BFloat16* from, int64_t from_row, int64_t rows, int64_t features) {
  for (int64_t c = 0; c < features; c += kStep, to += stripe) {
    const int64_t bytes = 2 * least(kStep, features - c);
    for (int64_t i = 0; i < rows; ++i) {
      char* line = row_of<char>(to, i);
      if (bytes == 64) {
        memcpy(line, from + i * from_row + c, 64);
      } else {
        memcpy(line, from + i * from_row + c, bytes);
        memset(line + bytes, 0, 64 - bytes);
      }
    }
  }
}

// Dense rows of `channels`, times `factor`; zeros up to there and to `padded` rows.
static void pack_dense(
    BFloat16* to, int64_t channels, int64_t padded, const BFloat16* from, int64_t from_row, int64_t rows,
    int64_t features, float factor) {
  for (int64_t i = 0; i < rows; ++i) {
    BFloat16* line = to + i * channels;
    memcpy(line, from + i * from_row, 2 * features);
    memset(line + features, 0, 2 * (channels - features));
    if (factor != 1)
      for (int64_t c = 0; c < channels; c += kSide) store(line + c, load(line + c) * factor);
  }
  memset(to + rows * channels, 0, (padded - rows) * channels * 2);
}

// Two dense rows of 16 channels, in pairs.
XRAY_INLINE Bits pairs_of(const BFloat16* first, const BFloat16* second) {
  return (Bits)load(second) | (Bits)load(first) >> 16;
}

// Right operand, whose steps are the channels: one stripe of 16 dense rows.
static void pack_channels(Tile* to, const BFloat16* rows, int64_t channels) {
  avx512::transpose((float*)to, kSide, (const float*)rows, channels / 2, kSide, channels / 2);
}

// Right operand, whose steps are the rows: stripes of 16 channels, `rows` (a multiple of 32) dense rows.
static void pack_pairs(Tile* to, int64_t stripe, const BFloat16* rows, int64_t count, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kSide, to += stripe)
    for (int64_t i = 0; i < count; i += 2) {
      const Bits pairs = pairs_of(rows + i * channels + c, rows + (i + 1) * channels + c);
      memcpy(row_of<char>(to, i / 2), &pairs, sizeof pairs);
    }
}

// Left operand, transposed: channels down, in stripes of 32 rows; `scratch` has 4 tiles for each 32 channels.
static void pack_transposed(
    Tile* to, int64_t stripe, const BFloat16* from, int64_t from_row, int64_t rows, int64_t features, Tile* scratch) {
  const int64_t channels = kStep * steps_of(features);
  BFloat16* dense = (BFloat16*)scratch;                     // (32, channels)
  float* pairs = (float*)(scratch + 2 * channels / kStep);  // (16, channels) of two rows each
  for (int64_t i = 0; i < rows; i += kStep, to += stripe) {
    pack_dense(dense, channels, kStep, from + i * from_row, from_row, least(kStep, rows - i), features, 1);
    for (int64_t p = 0; p < kSide; ++p)
      for (int64_t c = 0; c < channels; c += kSide) {
        const Bits two = pairs_of(dense + 2 * p * channels + c, dense + (2 * p + 1) * channels + c);
        memcpy(pairs + p * channels + c, &two, sizeof two);
      }
    avx512::transpose((float*)to, kSide, pairs, channels, kSide, channels);
  }
}
