// The CUDA kernels and bindings of the class token's attention, compiled for the CPU (see token_reorganize.cpp).

#include "common/cuda_launch.cuh"
#include "common/cuda_stream.h"

#include "attention/cuda_class_row.cu"

#define xray_kernels xray_emulated
#define CUDA CPU
#include "attention/cuda_bindings.cpp"
