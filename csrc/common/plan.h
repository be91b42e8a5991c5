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

}  // namespace xray
