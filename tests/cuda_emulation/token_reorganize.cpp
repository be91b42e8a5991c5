// The CUDA kernels and bindings of token reorganisation, compiled for the CPU: as ops of the namespace xray_emulated.
// The folder of this file comes before csrc on the include path, so its stand-ins for the CUDA runtime are found first.

#include "common/cuda_launch.cuh"
#include "common/cuda_stream.h"

#include "token_reorganize/cuda.cu"
#include "token_reorganize/cuda_backward.cu"

#define xray_kernels xray_emulated
#define CUDA CPU
#include "token_reorganize/cuda_bindings.cpp"
