// Launchers of the CUDA kernels of token reorganisation. Torch-free: the .cu files include this and nothing of PyTorch.
//
// A call is one struct, which is also what the kernels get as their parameter. Strides are in elements; rows of
// channels are dense, and results are contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtypes.h"

namespace xray {

// The most candidates (N - P) that a block can order in shared memory: their index is 13 bits of a rank.
constexpr int64_t kMostCandidates = 8192;

// (B, rows, C)
struct RowsIn {
  const void* data;
  int64_t batch_stride, row_stride;
};

// (B, N - P), float32 or the dtype of the tokens
struct ScoresIn {
  const void* data;
  int64_t batch_stride, stride;
  bool is_float;
};

struct ReorganizeShape {
  int64_t batch, length, channels, prefix, keep;
  bool fuse;
};

// reorganize_tokens, and add_reorganize_norm when there is an update.
struct ReorganizeForward {
  ReorganizeShape shape;
  RowsIn tokens;  // the residual of add_reorganize_norm
  RowsIn update;
  ScoresIn scores;
  const void *weight, *bias;
  float eps;
  void *out, *normed;
  int64_t* indices;
};

// Their gradients. `workspace` is for add_reorganize_norm only.
struct ReorganizeBackward {
  ReorganizeShape shape;
  RowsIn grad;  // of the result, or of the stream
  RowsIn grad_normed, stream;
  RowsIn tokens, update;
  ScoresIn scores;
  const int64_t* indices;
  const void* weight;
  float eps;
  void *grad_tokens, *grad_scores, *grad_weight, *grad_bias;
  float* workspace;
};

cudaError_t launch_reorganize(const ReorganizeForward& call, Element type, cudaStream_t stream);
cudaError_t launch_reorganize_backward(const ReorganizeBackward& call, Element type, cudaStream_t stream);

cudaError_t launch_add_reorganize_norm(const ReorganizeForward& call, Element type, cudaStream_t stream);
int64_t add_reorganize_norm_workspace(const ReorganizeBackward& call, Element type);
cudaError_t launch_add_reorganize_norm_backward(const ReorganizeBackward& call, Element type, cudaStream_t stream);

}  // namespace xray
