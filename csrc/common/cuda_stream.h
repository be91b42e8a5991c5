// Device guard and stream of the current call, by the stable ABI.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/tensor.h"

namespace xray {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " did not launch: ", cudaGetErrorString(error));
}

}  // namespace xray
