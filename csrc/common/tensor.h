// The stable C++ ABI of PyTorch, and what every CPU and CUDA binding needs of it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/dtypes.h"

namespace xray {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor itself when its rows are dense (last stride 1), else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Calls f with a value of the element type of `tensor`.
template <class F>
void for_element_type(const Tensor& tensor, const char* name, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace xray
