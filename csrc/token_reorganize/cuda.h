// Launchers of the CUDA kernels of token reorganisation. Torch-free: cuda.cu includes this and nothing of PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace xray {

enum class Element { kFloat, kHalf, kBFloat16, kDouble };

// Shapes and element strides of one call; rows of channels are dense.
struct ReorganizeShape {
  int64_t batch, length, channels, prefix, keep;
  int64_t token_batch_stride, token_stride;
  int64_t score_batch_stride, score_stride;
  bool fuse;
};

// The most candidates (N - P) that selection can sort in the shared memory of one block.
constexpr int64_t kMostCandidates = 8192;

// Top-k of each row of scores: kept indices by descending score, and each candidate's place among them or -1.
cudaError_t launch_select(
    const void* scores, Element score_type, int64_t* indices, int32_t* place, const ReorganizeShape& shape,
    cudaStream_t stream);

cudaError_t launch_reorganize(
    const void* tokens, Element type, const void* scores, Element score_type, const int64_t* indices,
    const int32_t* place, void* out, const ReorganizeShape& shape, cudaStream_t stream);

// `grad` is contiguous; `place` is scratch of batch * (N - P).
cudaError_t launch_reorganize_backward(
    const void* grad, const void* tokens, Element type, const void* scores, Element score_type, const int64_t* indices,
    int32_t* place, void* grad_tokens, void* grad_scores, const ReorganizeShape& shape, cudaStream_t stream);

}  // namespace xray
