// Launchers of the CUDA kernels of the class token's attention: class_scores and its backward. Torch-free.
//
// A call is one struct, which is also what the kernels get as their parameter. Strides are in elements.
//
// Attention itself has no CUDA C++ kernel. Nothing has been measured on a GPU, and one for short sequences, with K and
// V of a head in shared memory and products by tensor cores, is worth its code only if its bound beats what the Triton
// kernel measures. Forward, D = 64, bfloat16, on an H100 (3.35 TB/s; 990 TFLOP/s dense; 16 exponentials a cycle of each
// of 132 SMs at 1.83 GHz, 3.9e12/s; 227 KiB of shared memory for a block's use), for each batch row and head:
//
//     N     bytes 4 N D 2   memory   4 N N D FLOP   tensor cores   N N exp   shared 2 N D 2   blocks an SM
//     197         100,864    30 ns        9.9e6           10 ns      10 ns      50,432 bytes              4
//     577         295,424    88 ns       85.2e6           86 ns      86 ns     147,712 bytes              1
//
// At N = 197 memory alone bounds it: 23 us for 64 images of 12 heads, and so it bounds any kernel that reads K and V
// once, Triton's as well, whose two query tiles find K and V in L2. At 577 all three are equal, so a kernel near the
// bound has to overlap them, which one resident block a processor does only with specialised warps and wgmma (sm_90a
// alone: mma.sync reaches about two thirds of the peak, 130 ns): 90 us for 64 images of 16 heads at the very best.
// To be built when Triton's measured time at N = 197 is above 1.5 times 30 ns a head.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtypes.h"

namespace xray {

// A lane holds 8 channels of a key, a warp 256.
constexpr int64_t kMostHeadDim = 256;

// (B, H, N, D), last stride 1
struct HeadsIn {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// (B, H, N, D), added to in place
struct HeadsInOut {
  void* data;
  int64_t batch_stride, head_stride, row_stride, channel_stride;
};

// (count,) int32 or int64; no data where there is no such argument
struct Integers {
  const void* data;
  int64_t stride;
  bool is_long;
};

// A row is a batch row, or a packed sequence: then the batch is 1 and cu_seqlens has rows + 1 numbers.
struct ClassRowShape {
  int64_t rows, batch, heads, length, channels, prefix;
  Integers key_lengths, cu_seqlens;
};

struct ClassScores {
  ClassRowShape shape;
  HeadsIn query, key;
  float scale;
  float *scores, *class_row;  // contiguous
  float* workspace;
};

struct ClassScoresBackward {
  ClassRowShape shape;
  const float* grad_scores;
  int64_t grad_batch_stride, grad_stride;
  HeadsIn query, key;
  float scale;
  const float* class_row;  // contiguous
  HeadsInOut grad_query, grad_key;
  float* workspace;
};

// Floats of workspace that a call needs.
int64_t class_scores_workspace(const ClassRowShape& shape);
int64_t class_scores_backward_workspace(const ClassRowShape& shape);

cudaError_t launch_class_scores(const ClassScores& call, Element type, cudaStream_t stream);
cudaError_t launch_class_scores_backward(const ClassScoresBackward& call, Element type, cudaStream_t stream);

}  // namespace xray
