// Stands in for csrc/common/cuda_stream.h: tensors of the CPU, no device, no stream.
#pragma once

#include <cuda_runtime_api.h>

#include "common/tensor.h"

namespace xray {

struct OnDevice {
  explicit OnDevice(const Tensor&) {
  }
  cudaStream_t stream() const {
    return nullptr;
  }
};

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, " did not launch: error ", int(error));
}

}  // namespace xray
