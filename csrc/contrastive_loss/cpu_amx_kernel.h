// Blocks of logits of the contrastive losses in bfloat16 on AMX tiles, in namespace amx (see common/variants.h).
// Never run on hardware: proved by an emulation of the tiles (tests/cpu_emulation), not measured.
//
// The products of cpu_kernel.h; between them its own arithmetic on float32 logits. A product's left operand holds rows
// as they are, its right one two rows in pairs (common/amx_product.h), so which way each operand must be turned decides
// the design:
//   S = I T^T         left: rows of I.    right: rows of T read as 32-bit numbers, transposed
//   dI += dS T        left: rows of dS.   right: two rows of T in pairs
//   dT^T += I^T dS    left: I^T.          right: two rows of dS in pairs
// dS leaves the arithmetic as rows of images, which serve both, so no N^2 data is ever turned. Features are turned once
// a panel; the sums dT^T once at the end, 16 texts at a time in place. dT = dS^T I instead would turn dS, 240 x 240
// numbers for each block, to spare turning 240 x D once. Operands of products are bfloat16, so dS is rounded to it,
// with float32's range; what is summed and all between the products is float32. Fewer than 16 images, which do not fill
// a tile, are left to vectors in float32.
//
// A block is computed in bands of 32 images: their logits, tiles of 30 KiB, are scaled on the way to dense rows, where
// they stay in the first-level cache while the arithmetic goes over them. Both forms of dS (240 KiB) wait for the whole
// block, so that a sum of gradients is loaded and stored once for up to 8 products. S takes channels 256 at a time, for
// which a band's images (16 KiB), two stripes of texts and four sums stay in the first-level cache: of the four loads
// for four products two come from there and two from the second level, 32 bytes a cycle.
//
// Counts for 16 x 16 logits at D = 512. Products of 16 cycles: S 16, each gradient 16 (240 terms are padded to 256:
// 17.1), so 256 cycles forward and 802 backward, 546 with kept logits. Tiles loaded or stored for each product: one of
// operands, 1/5 of sums for S and 1/4 for a gradient. Arithmetic, 16 vectors: forward 44 instructions each (3 to scale
// logits, 36 for two exponentials, the rest maxima and sums), backward 49 (3, 41 for both softmaxes, 5 for both forms
// of dS); at two a cycle 350 and 390 cycles.
//
// Expected rate: a bare loop of loads and products makes 840-950 GFLOP/s on two cores of a Sapphire Rapids, torch's
// bf16 products 600-690. By that loop 16 x 16 logits of S take 0.29 microseconds of two threads, and their arithmetic
// 0.07 at 2.5 GHz, 0.14 where both share a core: together 610-730 GFLOP/s forward, and 3.13 products' worth beside
// 0.08-0.16 of arithmetic 730-800 backward. So either should come out near torch's product alone, and above 60% of it
// even if operands from the second level make the products take half as long again.
//
// Not built: both forms of dS from the registers that compute it, without rows in between, would spare 2 of 49
// instructions of the backward pass, and make its arithmetic a second copy of that of cpu_kernel.h.

#include "common/amx_product.h"

static constexpr int64_t kPart = 8;  // steps of S at a time
static constexpr int64_t kBandTiles = xray::kBand / kSide;
static_assert(xray::kBand == kStep, "a band is a step of the products with dS^T");

// ---- packing ----

static int64_t whole_steps(int64_t features) {
  return kStep * steps_of(features);
}

// Floats of scratch that packing needs.
static int64_t packing_scratch(int64_t channels) {
  return steps_of(channels) * 4 * int64_t(sizeof(Tile) / sizeof(float));
}

// Left operands: stripes of channels, and where asked for I^T, in stripes of 32 images.
static void pack_images(
    float* rows, float* turned, int64_t block, const BFloat16* from, int64_t from_row, int64_t count, int64_t features,
    float* scratch) {
  pack_left((Tile*)rows, tiles_of(block), from, from_row, count, features);
  if (turned)
    pack_transposed((Tile*)turned, whole_steps(features) / kSide, from, from_row, count, features, (Tile*)scratch);
}

// Right operands: stripes of 16 texts, and where asked for, pairs of texts in stripes of 16 channels.
static void pack_texts(
    float* columns, float* pairs, int64_t block, const BFloat16* from, int64_t from_row, int64_t count,
    int64_t features, float* scratch) {
  const int64_t steps = steps_of(features), channels = kStep * steps;
  BFloat16* dense = (BFloat16*)scratch;
  for (int64_t i = 0; i < count; i += kStep) {
    pack_dense(dense, channels, kStep, from + i * from_row, from_row, least(kStep, count - i), features, 1);
    for (int64_t j = 0; j < kStep && i + j < count; j += kSide)
      pack_channels((Tile*)columns + (i + j) / kSide * steps, dense + j * channels, channels);
    if (pairs) pack_pairs((Tile*)pairs + i / kStep, steps_of(block), dense, kStep, channels);
  }
}

// ---- bands ----

// What a thread needs to itself.
struct BlockScratch {
  Tile* sums;        // of a band, stripes of 16 texts
  Tile* grad;        // dS of the block, left operand: stripes of 32 texts
  Tile* grad_pairs;  // dS of the block, right operand: stripes of 16 texts
  float *rows, *positives, *tops;
};

static BlockScratch cut(float* scratch, int64_t block) {
  const int64_t tiles = tiles_of(block), band = least(xray::kBand, block);
  BlockScratch to;
  to.sums = (Tile*)scratch;
  to.grad = to.sums + kBandTiles * tiles;
  to.grad_pairs = to.grad + tiles * steps_of(block);
  to.rows = (float*)(to.grad_pairs + tiles * steps_of(block));
  to.positives = to.rows + band * xray::kBlockStride;
  to.tops = to.positives + band * xray::kBlockStride;
  return to;
}

template <class T>
XRAY_INLINE T* moved(T* pointer, int64_t by) {
  return pointer ? pointer + by : nullptr;
}

// Images [first, first + kBand) of a block.
static xray::LogitBlock<float> band_of(const xray::LogitBlock<float>& b, int64_t first) {
  xray::LogitBlock<float> band = b;
  band.rows = least(xray::kBand, b.rows - first);
  band.image = (const float*)((const Tile*)b.image + first / kSide);
  band.image_labels += first;
  band.kept = moved(b.kept, first * b.kept_row);
  band.kept_count = b.kept_count < first ? 0 : least(b.kept_count - first, band.rows);
  return band;
}

static xray::RankCount<float> ranks_of(const xray::RankCount<float>& to, int64_t first) {
  return {moved(to.image_pairs, first), to.text_pairs, moved(to.image_ranks, first), to.text_ranks};
}

// A band's logits, dense rows of xray::kBlockStride.
static void compute_logits(const xray::LogitBlock<float>& b, Tile* sums, float* rows) {
  const Tile *image = (const Tile*)b.image, *text = (const Tile*)b.text;
  const int64_t steps = b.channels / kStep, stripe = tiles_of(b.panel_rows);
  const int64_t tall = tiles_of(b.rows), wide = tiles_of(b.columns);
  multiply<false>(sums, kBandTiles, image, stripe, text, steps, tall, wide, least(kPart, steps));
  for (int64_t k = kPart; k < steps; k += kPart)
    multiply<true>(sums, kBandTiles, image + k * stripe, stripe, text + k, steps, tall, wide, least(kPart, steps - k));
  for (int64_t i = 0; i < b.rows; ++i)
    for (int64_t q = 0; q < wide; ++q)
      store(rows + i * xray::kBlockStride + q * kSide, load(row_of<float>(sums + q * kBandTiles, i)) * b.scale);
}

// Logits of up to 16 images and the texts of the same numbers. The block has room for them packed.
static void compute_pairs(
    const xray::LogitBlock<float>& b, float* to, const BFloat16* image, int64_t image_row, const BFloat16* text,
    int64_t text_row, int64_t features, float* packing, float* scratch) {
  const BlockScratch s = cut(scratch, b.panel_rows);
  pack_images((float*)b.image, nullptr, b.panel_rows, image, image_row, b.rows, features, packing);
  pack_texts((float*)b.text, nullptr, b.panel_rows, text, text_row, b.rows, features, packing);
  compute_logits(b, s.sums, s.rows);
  for (int64_t i = 0; i < b.rows; ++i) to[i] = s.rows[i * (xray::kBlockStride + 1)];
}

// ---- gradients ----

// dS of a band, from image `first` of the block on, as both operands; zeros up to whole steps of texts and of images.
static void pack_gradient(const xray::LogitBlock<float>& b, int64_t first, int64_t block, const BlockScratch& s) {
  const int64_t tall = kSide * tiles_of(b.rows);
  for (int64_t j = 0; j < b.columns; j += kStep)
    for (int64_t i = 0; i < kStep; i += 2) {
      Float at[2][2] = {};
      for (int64_t k = 0; k < 2 && i + k < b.rows; ++k)
        for (int64_t h = 0; h < 2 && j + h * kSide < b.columns; ++h)
          at[k][h] = load_first(
              s.rows + (i + k) * xray::kBlockStride + j + h * kSide, least(kSide, b.columns - j - h * kSide));
      for (int64_t k = 0; k < 2 && i < tall; ++k) {
        char* line = row_of<char>(s.grad + j / kStep * tiles_of(block), first + i + k);
        for (int64_t h = 0; h < 2; ++h) {
          const Bits16 part = to_bfloat16(at[k][h]);
          memcpy(line + h * 32, &part, sizeof part);
        }
      }
      for (int64_t h = 0; h < 2 && j + h * kSide < b.columns; ++h) {
        const Bits pairs = to_bfloat16_pairs(at[0][h], at[1][h]);
        Tile* stripe = s.grad_pairs + (j / kSide + h) * steps_of(block);
        memcpy(row_of<char>(stripe, (first + i) / 2), &pairs, sizeof pairs);
      }
    }
}

// dI += dS T and dT^T += I^T dS, as far as asked for. Sums of 16 rows of features lie together.
static void add_gradients(
    const xray::LogitBlock<float>& b, const xray::FeatureGradients<float>& to, const BlockScratch& s) {
  const int64_t across = b.channels / kSide, steps = steps_of(b.panel_rows);
  if (to.image)
    multiply<true>(
        (Tile*)to.image, 1, s.grad, tiles_of(b.panel_rows), (const Tile*)b.text_panels, steps, tiles_of(b.rows), across,
        steps_of(b.columns), across);
  if (to.text)
    multiply<true>(
        (Tile*)to.text, across, (const Tile*)b.image_panels, across, s.grad_pairs, steps, across, tiles_of(b.columns),
        steps_of(b.rows));
}

// `count` rows of sums of gradients, from tiles to rows, in place; `scratch` has 16 rows.
static void sums_to_rows(float* sums, int64_t count, int64_t channels, bool is_turned, float* scratch) {
  for (int64_t first = 0; first < count; first += kSide, sums += kSide * channels) {
    memcpy(scratch, sums, kSide * channels * sizeof(float));
    if (is_turned) {
      avx512::transpose(sums, channels, scratch, kSide, channels, kSide);
    } else {
      for (int64_t i = 0; i < kSide; ++i)
        for (int64_t c = 0; c < channels; c += kSide)
          store(sums + i * channels + c, load(scratch + c * kSide + i * kSide));
    }
  }
}

// ---- the losses ----

static void forward_block(const xray::LogitBlock<float>& b, const xray::Statistics<float>& to, float* scratch) {
  const BlockScratch s = cut(scratch, b.panel_rows);
  for (int64_t first = 0; first < b.rows; first += xray::kBand) {
    const xray::LogitBlock<float> band = band_of(b, first);
    compute_logits(band, s.sums, s.rows);
    const xray::Statistics<float> at{to.row_top + first, to.row_sum + first,  to.column_top,
                                     to.column_sum,      to.positive + first, ranks_of(to.ranks, first)};
    avx512::add_statistics(band, at, s.rows, s.tops);
  }
}

static void backward_block(
    const xray::LogitBlock<float>& b, const xray::SoftmaxGradient<float>& in, const xray::FeatureGradients<float>& to,
    float* scratch) {
  const BlockScratch s = cut(scratch, b.panel_rows);
  for (int64_t first = 0; first < b.rows; first += xray::kBand) {
    const xray::LogitBlock<float> band = band_of(b, first);
    if (b.kept) {
      avx512::copy_kept(band, s.rows);
    } else {
      compute_logits(band, s.sums, s.rows);
    }
    const xray::SoftmaxSide<float> row{in.row.high + first, in.row.low + first, in.row.weight + first};
    const xray::SoftmaxGradient<float> at{row, in.column, in.positive + first};
    avx512::softmax_gradient(band, at, s.rows);
    pack_gradient(band, first, b.panel_rows, s);
  }
  add_gradients(b, to, s);
}

static void sigmoid_block(
    const xray::LogitBlock<float>& b, const xray::Sigmoid<float>& in, const xray::FeatureGradients<float>& to,
    float* scratch) {
  const BlockScratch s = cut(scratch, b.panel_rows);
  for (int64_t first = 0; first < b.rows; first += xray::kBand) {
    const xray::LogitBlock<float> band = band_of(b, first);
    compute_logits(band, s.sums, s.rows);
    const xray::Sigmoid<float> at{in.bias, in.total, in.grad_bias, ranks_of(in.ranks, first)};
    avx512::sigmoid_gradient(band, at, s.rows, s.positives);
    if (to.image || to.text) pack_gradient(band, first, b.panel_rows, s);
  }
  add_gradients(b, to, s);
}
