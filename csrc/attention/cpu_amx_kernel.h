// Flash attention of one (batch, head) in bfloat16 on AMX tiles, in namespace amx (see common/variants.h).
// Never run on hardware: proved by an emulation of the tiles (tests/cpu_emulation), not measured.
//
// The algorithm is that of cpu_kernel.h: all is transposed, queries across lanes, so the softmax is arithmetic between
// vectors. A product's left operand holds rows as they are, its right one two rows in pairs (common/amx_product.h), so
// which way each operand must be turned decides the design:
//   S^T = K Q^T, dP^T = V dO^T   left: rows of K, V.   right: rows of Q, dO read as 32-bit numbers, transposed
//   O^T += V^T P^T               left: V^T.            right: two rows of P^T in pairs
//   dQ^T += K^T dS^T             left: K^T.            right: two rows of dS^T in pairs
//   dV += P^T dO, dK += dS^T Q   left: P^T, dS^T.      right: two rows of dO, Q in pairs
// P and dS leave the softmax as rows, so no N^2 data is ever turned; V^T and K^T are turned once a head, by pairing two
// rows and transposing 32-bit numbers. Computing O = P V instead would spare that, but put the softmax's sums across
// lanes and turn both dV and dK where now only dQ is turned.
//
// Forward: FLOPs 4 Nq Nk D, keys in blocks of up to 256. Backward: FLOPs 10 Nq Nk D; for each block of keys and each
// panel of 128 queries, first P and dS of the whole block, in bfloat16 (192 KiB, in the second-level cache), 32 keys at
// a time, whose logits (32 KiB) stay in the first; then dV, dK and dQ, whose sums are thus loaded and stored once for
// four products or more.
//
// Bytes: 2 N D of each operand and result; O(N D) scratch a thread. Expected bound at D = 64: of 16 x 16 logits a
// forward pass has 4 products, 64 cycles by specification, about twice that with loads from the caches (a bare loop of
// loads and products made 840-950 GFLOP/s on two cores of a Sapphire Rapids, torch's bf16 products 600-690), and 16
// vectors of softmax of about 20 instructions at two a cycle, 160 cycles. So the exponentials, not the products, are
// most of the forward pass, and wider blocks of tiles would not help; a backward pass has 10 products and 16 vectors of
// about 30 instructions: both alike.
//
// Not built: AVX-512 BF16 alone, for processors without AMX (AMD since Zen 4). vdpbf16ps does twice the FLOPs of a
// float32 FMA, and products are 128 of about 147 instructions for 16 logits forward at D = 64, 320 of 345 backward: at
// best 1.8 times, if it issues as often as an FMA, which nobody here could measure; it would be a level of its own,
// with its own tests. There bfloat16 runs as float32 on AVX-512.

#include "common/amx_product.h"

// ---- forward ----

static constexpr int64_t kForwardSteps = 8;  // of 32 keys a block, whose logits for a panel are 32 KiB
static constexpr int64_t kPanel = 2;         // tiles of queries

XRAY_INLINE int64_t floats_of(int64_t tiles) {
  return tiles * int64_t(sizeof(Tile) / sizeof(float));
}

// Floats of scratch that `attention_head` needs.
static int64_t forward_scratch(int64_t keys, int64_t head_dim) {
  const int64_t steps = steps_of(head_dim), key_steps = steps_of(keys);
  return floats_of(4 * steps * key_steps + 10 * steps + 2 * kPanel * kForwardSteps) + 3 * kPanel * kSide;
}

// Logits of 16 queries become P^T, right operand, in place: two rows of the one are a row of the other.
XRAY_INLINE Float exponentials(float* logits, int64_t rows, int64_t padded, float factor, Float moved) {
  Float sum{};
  for (int64_t j = 0; j < rows; j += 2) {
    const bool is_pair = j + 1 < rows;
    const Float first = exp2_of(load(logits + j * kSide) * factor - moved);
    const Float second = is_pair ? exp2_of(load(logits + (j + 1) * kSide) * factor - moved) : Float{};
    const Bits pairs = to_bfloat16_pairs(first, second);
    memcpy(logits + j / 2 * kSide, &pairs, sizeof pairs);
    sum += first + second;
  }
  const int64_t used = (rows + 1) / 2;
  memset(logits + used * kSide, 0, (padded / 2 - used) * sizeof(Float));
  return sum;
}

// Queries [begin, end).
static void attention_head(
    const xray::HeadIn<BFloat16>& in, const xray::HeadOut<BFloat16, float>& out, int64_t begin, int64_t end,
    float* scratch) {
  const int64_t head_dim = in.head_dim, most = avx512::keys_seen(in, end);
  if (most == 0) return avx512::store_empty(out, begin, end, head_dim);
  constexpr int64_t logit_tiles = 2 * kForwardSteps;
  const int64_t steps = steps_of(head_dim), channels = kStep * steps, key_steps = steps_of(most);
  const int64_t blocks = (key_steps + kForwardSteps - 1) / kForwardSteps,
                block_steps = (key_steps + blocks - 1) / blocks;
  Tile* key = (Tile*)scratch;                   // left: stripes of channels
  Tile* value = key + 2 * steps * key_steps;    // left: V^T, stripes of keys
  Tile* query = value + 2 * steps * key_steps;  // right: stripes of queries
  Tile* logits = query + kPanel * steps;        // sums, then P^T: stripes of queries
  Tile* sum = logits + kPanel * logit_tiles;    // O^T: stripes of queries
  Tile* dense = sum + kPanel * 2 * steps;       // 32 rows of channels, or 16 of floats; while packing twice that
  float* shift = (float*)(dense + 4 * steps);
  float* total = shift + kPanel * kSide;
  float* top = total + kPanel * kSide;
  pack_left(key, 2 * key_steps, in.key, in.key_row, most, head_dim);
  pack_transposed(value, 2 * steps, in.value, in.value_row, most, head_dim, dense);
  // the larger of two logits is the one of the larger product, with the sign of the scale in the query
  const float sign = in.scale < 0 ? -1 : in.scale > 0 ? 1 : 0;
  const float scale = sign == 0 ? 1 : float(in.scale * sign),
              factor = float(sign == 0 ? kLog2E : in.scale * sign * kLog2E);

  for (int64_t first = begin; first < end; first += kPanel * kSide) {
    const int64_t count = least(kPanel * kSide, end - first), tiles = tiles_of(count);
    const int64_t seen = avx512::keys_seen(in, first + count);
    BFloat16* rows = (BFloat16*)dense;
    pack_dense(rows, channels, tiles * kSide, in.query + first * in.query_row, in.query_row, count, head_dim, sign);
    for (int64_t v = 0; v < tiles; ++v) pack_channels(query + v * steps, rows + v * kSide * channels, channels);

    for (int64_t step = 0; step * kStep < seen; step += block_steps) {
      const int64_t at = step * kStep, block = least(block_steps * kStep, seen - at);
      multiply<false>(logits, logit_tiles, key + 2 * step, 2 * key_steps, query, steps, tiles_of(block), tiles, steps);
      for (int64_t v = 0; v < tiles; ++v) {
        float* l = (float*)(logits + v * logit_tiles);
        if (in.is_causal) avx512::mask_future(l, kSide, at, block, first + v * kSide, -__builtin_inff());
        if (out.class_row && first == 0 && v == 0)
          for (int64_t j = 0; j < block; ++j) out.class_row[at + j] = l[j * kSide];
        Float best = step == 0 ? load(l) : load(top + v * kSide);
        for (int64_t j = 0; j < block; ++j) {
          const Float logit = load(l + j * kSide);
          best = best < logit ? logit : best;
        }
        store(top + v * kSide, best);
        const Float moved = best * scale * float(kLog2E);
        const Float part = exponentials(l, block, kStep * steps_of(block), factor, moved);
        if (step == 0) {
          store(total + v * kSide, part);
        } else {
          const Float less = exp2_of(load(shift + v * kSide) - moved);
          store(total + v * kSide, load(total + v * kSide) * less + part);
          float* o = (float*)(sum + v * 2 * steps);
          for (int64_t c = 0; c < channels; ++c) store(o + c * kSide, load(o + c * kSide) * less);
        }
        store(shift + v * kSide, moved);
      }
      const Tile* v_block = value + step * 2 * steps;
      if (step == 0) {
        multiply<false>(sum, 2 * steps, v_block, 2 * steps, logits, logit_tiles, 2 * steps, tiles, steps_of(block));
      } else {
        multiply<true>(sum, 2 * steps, v_block, 2 * steps, logits, logit_tiles, 2 * steps, tiles, steps_of(block));
      }
    }

    for (int64_t v = 0; v < tiles; ++v) {
      float *o = (float*)(sum + v * 2 * steps), *wide = (float*)dense;
      const Float inverse = 1.0f / load(total + v * kSide);
      for (int64_t c = 0; c < channels; ++c) store(o + c * kSide, load(o + c * kSide) * inverse);
      avx512::transpose(wide, channels, o, kSide, channels, kSide);
      for (int64_t i = v * kSide; i < least(count, (v + 1) * kSide); ++i) {
        BFloat16* to = out.out + (first + i) * out.out_row;
        const float* from = wide + (i - v * kSide) * channels;
        for (int64_t c = 0; c < head_dim; c += kSide) store_first(to + c, load(from + c), least(kSide, head_dim - c));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      out.top[first + i] = top[i] * scale;
      out.log_sum[first + i] = float(log(double(total[i])));
    }
    if (out.class_row && first == 0) {
      const float moved = shift[0], inverse = 1 / total[0];
      for (int64_t j = 0; j < in.keys; j += kSide) {
        const int64_t n = least(kSide, in.keys - j);
        float* to = out.class_row + j;
        store_first(to, exp2_of(load_first(to, n) * factor - moved) * inverse, n);
      }
    }
  }
}

// ---- backward ----

static constexpr int64_t kBackwardSteps = 8;  // of 32 keys a block
static constexpr int64_t kQuerySteps = 4;     // of 32 queries a panel

// Floats of scratch that `attention_head_backward` needs.
static int64_t backward_scratch(int64_t queries, int64_t head_dim) {
  constexpr int64_t keys = 2 * kBackwardSteps, panel = 2 * kQuerySteps;
  const int64_t steps = steps_of(head_dim), operands = 3 * keys * steps, sums = 4 * keys * steps;
  const int64_t panels = 8 * kQuerySteps * steps + 4 * kQuerySteps * steps + 2 * panel * steps + 4 * steps;
  const int64_t tiles = operands + sums + panels + 4 * panel + 3 * kQuerySteps * keys;
  return floats_of(tiles) + 3 * panel * kSide + queries * (kStep * steps + 1);
}

// sum over channels of a row times another
static float dot(const BFloat16* a, const BFloat16* b, int64_t head_dim) {
  Float sum{};
  for (int64_t c = 0; c < head_dim; c += kSide) {
    const int64_t n = least(kSide, head_dim - c);
    sum += load_first(a + c, n) * load_first(b + c, n);
  }
  return sum_lanes<float>(sum);
}

// What the backward pass keeps of 32 keys and 16 queries: P^T and dS^T as left operands, whose rows of 32 queries two
// calls fill by halves, and dS^T as right operand.
struct Probabilities {
  char *p, *ds;    // rows of keys
  char* ds_pairs;  // rows of two keys
};

// From logits and dP^T of `rows` keys from `key` on. Queries before a key, which comes after them, get none of it.
XRAY_INLINE void probabilities(
    Probabilities to, const float* logits, const float* grads, int64_t rows, float factor, Float moved, Float less,
    Float mean, bool is_causal, int64_t key, int64_t query) {
  Bits lane;
  for (int i = 0; i < kSide; ++i) lane[i] = i;
  for (int64_t j = 0; j < kStep; j += 2) {
    Float ds[2] = {};
    for (int64_t k = 0; k < 2; ++k) {
      Float p{};
      if (j + k < rows) {
        p = exp2_of((load(logits + (j + k) * kSide) * factor - moved) - less);
        ds[k] = p * (load(grads + (j + k) * kSide) - mean);
        const int64_t hidden = key + j + k - query;
        if (is_causal && hidden > 0) {
          const Bits visible = (Bits)(lane >= uint32_t(least(hidden, kSide)));
          p = (Float)((Bits)p & visible);
          ds[k] = (Float)((Bits)ds[k] & visible);
        }
      }
      const Bits16 p_row = to_bfloat16(p), ds_row = to_bfloat16(ds[k]);
      memcpy(to.p + (j + k) * 64, &p_row, sizeof p_row);
      memcpy(to.ds + (j + k) * 64, &ds_row, sizeof ds_row);
    }
    const Bits pairs = to_bfloat16_pairs(ds[0], ds[1]);
    memcpy(to.ds_pairs + j / 2 * 64, &pairs, sizeof pairs);
  }
}

// Queries [begin, end), and all keys.
static void attention_head_backward(
    const xray::HeadIn<BFloat16>& in, const xray::HeadGradIn<BFloat16, float>& grads,
    const xray::HeadGradOut<BFloat16, float>& to, int64_t begin, int64_t end, float* scratch) {
  constexpr int64_t stripe = 2 * kBackwardSteps;                              // tiles of a block's keys
  constexpr int64_t most_tiles = 2 * kQuerySteps, most = most_tiles * kSide;  // of a panel's queries
  const int64_t head_dim = in.head_dim, steps = steps_of(head_dim), channels = kStep * steps;
  Tile* key = (Tile*)scratch;                                // left: stripes of channels
  Tile* value = key + stripe * steps;                        // left: stripes of channels
  Tile* turned_key = value + stripe * steps;                 // left: K^T, stripes of keys
  Tile* grad_key = turned_key + stripe * steps;              // sums: stripes of channels
  Tile* grad_value = grad_key + 2 * stripe * steps;          // sums: stripes of channels
  Tile* dense_query = grad_value + 2 * stripe * steps;       // rows
  Tile* dense_grad = dense_query + most_tiles * steps;       // rows
  Tile* query = dense_grad + most_tiles * steps;             // right: stripes of queries
  Tile* grad = query + most_tiles * steps;                   // right: stripes of queries
  Tile* query_pairs = grad + most_tiles * steps;             // right: stripes of channels
  Tile* grad_pairs = query_pairs + 2 * kQuerySteps * steps;  // right: stripes of channels
  Tile* grad_query = grad_pairs + 2 * kQuerySteps * steps;   // sums: dQ^T, stripes of queries
  Tile* dense = grad_query + 2 * most_tiles * steps;         // while turning
  Tile* logits = dense + 4 * steps;                          // sums of 32 keys: stripes of queries
  Tile* grad_p = logits + 2 * most_tiles;                    // sums of 32 keys: stripes of queries
  Tile* p = grad_p + 2 * most_tiles;                         // left: P^T, stripes of 32 queries
  Tile* ds = p + kQuerySteps * stripe;                       // left: dS^T, stripes of 32 queries
  Tile* ds_pairs = ds + kQuerySteps * stripe;                // right: stripes of 16 queries
  float* shift = (float*)(ds_pairs + most_tiles * kBackwardSteps);
  float* log_sum = shift + most;
  float* delta = log_sum + most;
  float* deltas = delta + most;                // of all queries
  float* query_sums = deltas + (end - begin);  // (queries, channels)
  const float factor = float(in.scale * kLog2E), scale = float(in.scale);

  // blocks of equal size; keys that nobody sees get zeros
  const int64_t all_steps = steps_of(in.keys);
  const int64_t blocks = all_steps > kBackwardSteps ? (all_steps + kBackwardSteps - 1) / kBackwardSteps : 1;
  const int64_t block_keys = (all_steps + blocks - 1) / blocks * kStep;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = block * block_keys, keys = least(block_keys, in.keys - from);
    const BFloat16 *from_key = in.key + from * in.key_row, *from_value = in.value + from * in.value_row;
    pack_left(key, stripe, from_key, in.key_row, keys, head_dim);
    pack_left(value, stripe, from_value, in.value_row, keys, head_dim);
    pack_transposed(turned_key, 2 * steps, from_key, in.key_row, keys, head_dim, dense);
    memset(grad_key, 0, 4 * stripe * steps * sizeof(Tile));  // and grad_value

    for (int64_t first = begin; first < end; first += most) {
      const int64_t count = least(most, end - first), tiles = tiles_of(count), query_steps = steps_of(count);
      BFloat16 *query_rows = (BFloat16*)dense_query, *grad_rows = (BFloat16*)dense_grad;
      const BFloat16* from_grad = grads.grad + first * grads.grad_row;
      if (block == 0) {  // sum over channels of dO * O, and of the scores' gradient
        for (int64_t i = 0; i < count; ++i)
          deltas[first - begin + i] =
              dot(from_grad + i * grads.grad_row, grads.out + (first + i) * grads.out_row, head_dim);
        if (grads.grad_class && first == 0) deltas[0] += grads.grad_class_sum;
      }
      const bool sees = keys > 0 && (!in.is_causal || first + count > from);
      if (sees) {
        const int64_t seen = in.is_causal ? least(keys, first + count - from) : keys, seen_steps = steps_of(seen);
        const BFloat16* from_query = in.query + first * in.query_row;
        pack_dense(query_rows, channels, kStep * query_steps, from_query, in.query_row, count, head_dim, 1);
        pack_dense(grad_rows, channels, kStep * query_steps, from_grad, grads.grad_row, count, head_dim, 1);
        for (int64_t v = 0; v < tiles; ++v) {
          pack_channels(query + v * steps, query_rows + v * kSide * channels, channels);
          pack_channels(grad + v * steps, grad_rows + v * kSide * channels, channels);
        }
        pack_pairs(query_pairs, kQuerySteps, query_rows, kStep * query_steps, channels);
        pack_pairs(grad_pairs, kQuerySteps, grad_rows, kStep * query_steps, channels);
        for (int64_t i = 0; i < tiles * kSide; ++i) {
          const bool real = i < count;
          shift[i] = real ? grads.top[first + i] * float(kLog2E) : 0;
          log_sum[i] = real ? grads.log_sum[first + i] * float(kLog2E) : __builtin_inff();
          delta[i] = real ? deltas[first - begin + i] : 0;
        }

        for (int64_t step = 0; step < seen_steps; ++step) {
          const int64_t at = step * kStep, n = least(kStep, seen - at);
          multiply<false>(logits, 2, key + 2 * step, stripe, query, steps, tiles_of(n), tiles, steps);
          multiply<false>(grad_p, 2, value + 2 * step, stripe, grad, steps, tiles_of(n), tiles, steps);
          if (grads.grad_class && first == 0)
            for (int64_t j = 0; j < n; ++j) *row_of<float>(grad_p, j) += grads.grad_class[from + at + j];
          for (int64_t v = 0; v < tiles; ++v) {
            const int64_t half = v % 2 * 32;
            const Probabilities made{
                row_of<char>(p + v / 2 * stripe, at) + half, row_of<char>(ds + v / 2 * stripe, at) + half,
                row_of<char>(ds_pairs + v * kBackwardSteps + step, 0)};
            probabilities(
                made, (const float*)(logits + 2 * v), (const float*)(grad_p + 2 * v), n, factor,
                load(shift + v * kSide), load(log_sum + v * kSide), load(delta + v * kSide), in.is_causal, from + at,
                first + v * kSide);
          }
        }
        if (tiles % 2 == 1)  // the other halves of the last stripe
          for (int64_t j = 0; j < seen_steps * kStep; ++j) {
            memset(row_of<char>(p + tiles / 2 * stripe, j) + 32, 0, 32);
            memset(row_of<char>(ds + tiles / 2 * stripe, j) + 32, 0, 32);
          }
        multiply<true>(grad_value, stripe, p, stripe, grad_pairs, kQuerySteps, 2 * seen_steps, 2 * steps, query_steps);
        multiply<true>(grad_key, stripe, ds, stripe, query_pairs, kQuerySteps, 2 * seen_steps, 2 * steps, query_steps);
        multiply<false>(
            grad_query, 2 * steps, turned_key, 2 * steps, ds_pairs, kBackwardSteps, 2 * steps, tiles, seen_steps);
      }
      for (int64_t v = 0; v < tiles; ++v) {
        float* rows = (float*)dense;  // (16, channels)
        if (sees) {
          avx512::transpose(rows, channels, (const float*)(grad_query + v * 2 * steps), kSide, channels, kSide);
        } else {
          memset(rows, 0, kSide * channels * sizeof(float));
        }
        const int64_t query_at = first + v * kSide;
        avx512::store_rows(
            to.query + query_at * to.query_row, to.query_row, query_sums + (query_at - begin) * channels, rows,
            least(kSide, end - query_at), channels, head_dim, scale, block == 0, block == blocks - 1);
      }
    }

    for (int64_t c = 0; c < head_dim; c += kSide) {
      const int64_t n = least(kSide, head_dim - c);
      Tile *key_sums = grad_key + c / kSide * stripe, *value_sums = grad_value + c / kSide * stripe;
      for (int64_t j = 0; j < keys; ++j) {
        const Float dk = load(row_of<float>(key_sums, j)) * scale, dv = load(row_of<float>(value_sums, j));
        avx512::store_key_gradient(to, from + j, head_dim, c, n, dk, dv);
      }
    }
  }
  avx512::clear_unseen(to, in.keys, head_dim);
}
