// How kernels split their work: pure arithmetic, shared by the kernels and by _host, where Python can look at it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace xray {

// Pieces of the channels for each batch row of token_reorganize. One piece streams whole rows, which is best for the
// memory; a batch of fewer rows than threads leaves threads idle, so then rows are split, into pieces of at least 256
// bytes and whole cache lines.
inline int64_t plan_channel_pieces(int64_t batch, int64_t channels, int64_t element_size, int64_t threads) {
  if (batch == 0 || batch >= threads) return 1;
  const int64_t wanted = (2 * threads + batch - 1) / batch;
  const int64_t most = std::max<int64_t>(1, channels * element_size / 256);
  return std::min(wanted, most);
}

// First channel of piece `piece` of `pieces`, a multiple of 64 elements.
inline int64_t piece_begin(int64_t piece, int64_t pieces, int64_t channels) {
  const int64_t blocks = (channels + 63) / 64;
  return std::min(channels, blocks * piece / pieces * 64);
}

// Pieces of the rows for each batch row, where rows can not be split: enough for all threads.
inline int64_t plan_row_pieces(int64_t batch, int64_t rows, int64_t threads) {
  if (batch == 0 || batch >= threads) return 1;
  return std::min((2 * threads + batch - 1) / batch, std::max<int64_t>(1, rows / 16));
}

// Slices of each sequence's queries for the CPU kernels of attention: one, which packs keys and values once, or enough
// for two tasks a thread where there are few (sequence, head) pairs; at least 48 queries each.
inline int64_t plan_query_pieces(int64_t pairs, int64_t queries, int64_t threads) {
  if (pairs == 0 || pairs >= 2 * threads) return 1;
  return std::max<int64_t>(1, std::min((2 * threads + pairs - 1) / pairs, queries / 48));
}

// Queries of a slice: a multiple of every variant's panel.
inline int64_t query_piece_size(int64_t queries, int64_t pieces) {
  return (queries + pieces * 48 - 1) / (pieces * 48) * 48;
}

// Whether a CPU kernel writes a result past the caches. With what was read, one of 8 MiB and more fills a last-level
// cache of 32 MiB or a socket's share of one, so it would not be there any more when the next op reads it.
inline bool plan_past_caches(int64_t bytes) {
  return bytes >= 8 << 20;
}

// Threads of every block of token_reorganize's CUDA forward.
constexpr int kReorganizeThreads = 256;

// How one launch of it is split. The first batch * fuse_blocks blocks each sum a slice of
// one fused row, since they read the most; the others copy `rows` rows of one batch row each.
struct ReorganizePlan {
  int64_t rows;          // rows of a copying block
  int64_t copy_blocks;   // for each batch row
  int64_t fuse_vectors;  // vectors of the fused row that one fusing block sums
  int64_t fuse_blocks;   // for each batch row
  int64_t select_bytes;  // shared memory of a block for selection
  int64_t held_bytes;    // and of each warp for the row that it normalises; 0 for a row longer than 4 KiB
};

// `vectors` of `vector_bytes` make a row of `lanes_per_vector` elements each; `processors` is the number of SMs.
//
// Every copying block orders the scores again, in about 0.4 issue cycles of its SM a candidate, and moves its rows at
// the SM's share of the memory, about row_bytes / 9 cycles a row: with at least 8 * candidates / row_bytes rows the
// first is less than half of the second, and the SM's other blocks fill it. Beyond that, four blocks an SM.
//
// LayerNorm needs the whole fused row, so with `norm` one block sums all of it, at about 28 bytes a cycle where all SMs
// together move 15 a cycle each. Where that would outlast the rest, the row is sliced like any other and a second,
// small launch normalises it (fuse_blocks > 1 says so).
inline ReorganizePlan plan_reorganize(
    int64_t batch, int64_t length, int64_t prefix, int64_t keep, int64_t vectors, int64_t vector_bytes,
    int64_t lanes_per_vector, bool fuse, bool norm, int64_t processors) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t candidates = length - prefix, row_bytes = vectors * vector_bytes;
  ReorganizePlan plan{};
  batch = std::max<int64_t>(batch, 1);

  plan.rows = divide_up(length, divide_up(4 * processors, batch));
  plan.rows = std::min(length, std::max(plan.rows, divide_up(8 * candidates, std::max<int64_t>(row_bytes, 1))));
  plan.copy_blocks = divide_up(length, plan.rows);

  if (fuse && vectors > 0) {
    const int64_t fused_bytes = (candidates - keep) * row_bytes * (norm ? 2 : 1);
    const int64_t all_bytes = batch * row_bytes * (length + prefix + keep + 1) * (norm ? 2 : 1);
    const bool whole = norm && fused_bytes <= std::max<int64_t>(384 << 10, all_bytes / processors * 7 / 5);
    if (whole) {
      plan.fuse_vectors = vectors;
    } else {
      // 512 bytes of a row at a time, down to 64 (two sectors) while that leaves half of the SMs without a slice
      plan.fuse_vectors = 512 / vector_bytes;
      plan.fuse_vectors = std::min<int64_t>(plan.fuse_vectors, 32);
      while (plan.fuse_vectors * vector_bytes > 64 &&
             batch * divide_up(vectors, plan.fuse_vectors) < divide_up(processors, 2))
        plan.fuse_vectors /= 2;
    }
    plan.fuse_vectors = std::min(plan.fuse_vectors, vectors);
    plan.fuse_blocks = divide_up(vectors, plan.fuse_vectors);
  }

  // the list of candidates, then keys and bucket counts, or weights and partial sums of the fused row
  const int64_t list = divide_up(2 * candidates, 16) * 16, words = divide_up(4 * candidates, 16) * 16;
  const int64_t partial = plan.fuse_blocks ? 4 * kReorganizeThreads * lanes_per_vector : 0;
  plan.select_bytes = list + words + std::max<int64_t>(16 * kReorganizeThreads, partial);
  plan.held_bytes = norm && row_bytes <= 4096 ? divide_up(row_bytes, 16) * 16 : 0;
  return plan;
}

// Rows of one batch row that a block of the CUDA backward handles, and the threads of that block.
struct ReorganizeBackwardPlan {
  int64_t threads;
  int64_t rows;
  int64_t blocks;  // for each batch row
};

// Every block reads all kept indices of its batch row (8 bytes each, from L2) to find those of its rows, so it has at
// least as many bytes of rows. Without `norm` a warp takes a row: six blocks an SM, of up to four warps. With it all
// threads of a block share a row, a vector each, and every block leaves a partial sum of the weight's and the bias'
// gradient: at least two rows a block, and blocks for 640 threads an SM.
inline ReorganizeBackwardPlan plan_reorganize_backward(
    int64_t batch, int64_t length, int64_t keep, int64_t vectors, int64_t vector_bytes, bool norm, int64_t processors) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t row_bytes = std::max<int64_t>(vectors * vector_bytes, 1);
  ReorganizeBackwardPlan plan{};
  batch = std::max<int64_t>(batch, 1);
  const int64_t norm_threads = std::min<int64_t>(512, std::max<int64_t>(1, divide_up(vectors, 32)) * 32);
  const int64_t wanted = norm ? std::max<int64_t>(2, 640 / norm_threads) * processors : 6 * processors;
  plan.rows = std::max(divide_up(length, divide_up(wanted, batch)), divide_up(8 * keep, row_bytes));
  plan.rows = std::min({std::max<int64_t>(plan.rows, norm ? 2 : 1), length, int64_t{4096}});
  plan.blocks = divide_up(length, plan.rows);
  plan.threads = norm ? norm_threads : 32 * std::min<int64_t>(4, plan.rows);
  return plan;
}

// Keys of a warp of class_scores, one a lane; of a block of its second launch, one a thread; and of a block of the
// backward, 32 a warp. Sums are kept for each of these pieces and joined in their order, so results have the same bits
// on any number of processors.
constexpr int kTileKeys = 32, kChunkKeys = 128, kSliceKeys = 256;

// Pieces of one batch row for each head: a warp (tile) or a block each, and a place in the workspace.
struct ClassRowPlan {
  int64_t tiles, chunks, slices;
};

// A batch row has `length` keys, of `sequences` sequences where it is packed. The pieces of packed sequence i, which
// starts at key k, begin at number k / size + i: past those of sequence i - 1, and all together only one a sequence
// more than the keys need, whatever the lengths, which the host does not know. A warp finds the sequence of its piece.
//
// Forward, a key is row_bytes = D * 2 or 4 of memory and next to no arithmetic. An SM's share of an H100's memory is 14
// bytes a cycle with about 800 cycles of latency: 11 KiB have to be on their way. A tile is 32 row_bytes (4 KiB for D =
// 64 in bfloat16), requested at once by its warp, so three warps an SM would do, and 20 fit. So tiles are as small as a
// warp has lanes: one image of 12 heads and 197 tokens has 84, for 132 SMs; 64 such images have 5,376, 41 an SM. What a
// tile costs beside its keys: its query, row_bytes (3%), and 8 bytes of statistics (0.2%), in L2.
//
// The second launch reads and writes 4 bytes a key and head, and reads the statistics: 6% of the keys' bytes, in L2. A
// thread takes a key and all heads, which it adds up in their order.
//
// Backward, a key is 3 row_bytes (its gradient in and out). Every block needs t, a sum over the row (8 bytes a key,
// from L2): with 256 keys a block that is 2% of its bytes for 197 tokens, and 15% for 1,569, in L2. Rows of up to 256
// keys are one block a head, which adds to the query's gradient itself, so there is no second launch. A smaller slice
// would give one image of 12 heads more than 12 blocks, but its 0.9 MB pass 12 SMs in less time than a second launch
// takes.
inline ClassRowPlan plan_class_row(int64_t length, int64_t sequences, bool packed) {
  const auto pieces = [&](int64_t size) { return packed ? length / size + sequences : (length + size - 1) / size; };
  return {pieces(kTileKeys), pieces(kChunkKeys), pieces(kSliceKeys)};
}

}  // namespace xray
