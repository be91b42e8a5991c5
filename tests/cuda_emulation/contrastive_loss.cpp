// The CUDA kernels and bindings of the contrastive losses, compiled for the CPU (see token_reorganize.cpp); products by
// PyTorch's CPU kernels.

#include "common/cuda_launch.cuh"
#include "common/cuda_stream.h"
#include "contrastive_loss/cuda_product.h"

#include "contrastive_loss/cuda_gradient.cu"
#include "contrastive_loss/cuda_sigmoid.cu"
#include "contrastive_loss/cuda_statistics.cu"

#define xray_kernels xray_emulated
#define CUDA CPU
#include "contrastive_loss/cuda_bindings.cpp"
