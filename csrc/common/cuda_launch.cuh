// Everything that kernels and launchers ask of the CUDA runtime and of nvcc's own syntax, so that a test can put its
// own version of this one file in the way and run the kernels on the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace xray {

// The shared memory of the block whose size the launch gives.
extern __shared__ uint4 dynamic_shared_memory[];

__device__ inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(dynamic_shared_memory);
}

// Launches `blocks` one-dimensional blocks; no blocks, no launch. Only attributes of the kernel are set beside it, so a
// stream capture (CUDA graph) takes it.
template <class... P, class... A>
cudaError_t launch(
    void (*kernel)(P...), int64_t blocks, int64_t threads, int64_t shared_bytes, cudaStream_t stream,
    const A&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {  // beyond this a kernel must opt in
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(blocks), unsigned(threads), size_t(shared_bytes), stream>>>(arguments...);
  return cudaGetLastError();
}

// Multiprocessors of the current device; 1 where the runtime cannot tell, and then the launch reports why.
inline int processor_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
}

}  // namespace xray
