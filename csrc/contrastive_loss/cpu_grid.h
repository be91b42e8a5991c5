// The grid of blocks that the logits are cut into: their size, what is packed for them, who computes them and when.
// Included after common/variants.h.
#pragma once

#include <atomic>
#include <limits>
#include <thread>
#include <vector>

#include "common/cpu_threads.h"
#include "contrastive_loss/cpu_blocks.h"

namespace xray {

// Runs work(row, column) for each pair of `rows` x `columns`, so that pairs of one row, and of one column, come one
// after another in an order that depends on nothing else: sums over either need no copy for each thread and no atomic
// addition, and are the same however many threads there are. Pairs are taken along diagonals, where neighbours have
// neither row nor column in common; one that is taken too early waits for those before it, which others have already.
template <class F>
void for_each_pair(int64_t rows, int64_t columns, int64_t most_threads, F&& make_work) {
  const int64_t side = std::max(rows, columns);
  std::vector<std::atomic<int64_t>> row_done(side), column_done(side);  // how many turns
  const auto wait_for = [](const std::atomic<int64_t>& done, int64_t turn) {
    for (int64_t tries = 0; done.load(std::memory_order_acquire) != turn; ++tries)
      if (tries > 1000) std::this_thread::yield();
  };
  const auto make_ordered = [&] {
    return [&, work = make_work()](int64_t number) {
      const int64_t turn = number / side, row = number % side, column = (row + turn) % side;
      wait_for(row_done[row], turn);
      wait_for(column_done[column], turn);
      if (row < rows && column < columns) work(row, column);
      row_done[row].store(turn + 1, std::memory_order_release);
      column_done[column].store(turn + 1, std::memory_order_release);
    };
  };
  for_each_task(side * side, make_ordered, most_threads);
}

// How logits are cut for a workspace of so many bytes.
struct Grid {
  int64_t rows, columns, features, channels;  // channels: features, padded to whole vectors or tiles
  int64_t block;                              // rows and columns of a block
  int64_t packed;                             // numbers of a packed block
  int64_t panel;                              // rows, and columns, that are packed at a time: whole blocks
  int64_t threads;                            // at most
  bool by_tiles;
};

// `copies` packed forms of features are needed, images' and texts' together; they take three quarters of the workspace.
// Only the number of threads depends on how many there are: results do not.
template <class S>
Grid make_grid(
    int64_t rows, int64_t columns, int64_t features, int64_t channels, bool by_tiles, int64_t copies,
    int64_t workspace_bytes) {
  const int64_t longest = std::max(rows, columns), quarter = workspace_bytes / int64_t(4 * sizeof(S));
  Grid grid{rows, columns, features, channels, 0, 0, 0, 0, by_tiles};
  for (const int64_t block : {kMostBlock, int64_t(96), int64_t(48), int64_t(16)}) {
    if (block > 48 && longest < (block > 96 ? 16 : 3) * block) continue;  // blocks for each of a few threads
    const int64_t scratch = block_scratch(block, by_tiles);
    grid.block = block;
    grid.packed = packed_block(block, channels, by_tiles);
    grid.panel = std::clamp(3 * quarter / (copies * grid.packed) * block, block, round_up(longest, block));
    grid.threads = std::max<int64_t>(1, quarter / scratch);
    if (copies * grid.packed <= 3 * quarter && scratch <= quarter) break;
  }
  return grid;
}

// The least and the greatest label of each block.
class LabelRanges {
 public:
  LabelRanges(const int32_t* labels, int64_t count, int64_t block) : block_(block) {
    for (int64_t i = 0; i < count; i += block) {
      const auto [least, greatest] = std::minmax_element(labels + i, labels + std::min(count, i + block));
      ranges_.push_back({*least, *greatest});
    }
  }
  bool meets(int64_t i, const LabelRanges& other, int64_t j) const {
    const Range &a = ranges_[i / block_], &b = other.ranges_[j / block_];
    return a.least <= b.greatest && b.least <= a.greatest;
  }

 private:
  struct Range {
    int32_t least, greatest;
  };
  int64_t block_;
  std::vector<Range> ranges_;
};

// A number for each row or column, and as many more as fill a vector.
template <class S>
std::vector<S> numbers(int64_t count, S value = 0) {
  return std::vector<S>(round_up(count, 16), value);
}

}  // namespace xray
