// Matrix products by PyTorch, through the stable ABI.
#pragma once

#include <array>

#include "common/tensor.h"

namespace xray {

// out = a b in float32, with sums in float32: a and b have one dtype, float32 or a half precision, and any strides.
inline void product_out(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const auto call = [](const char* overload, StableIValue* stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference to `out` that is returned
  };
  if (a.scalar_type() == ScalarType::Float) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    return call("out", stack.data());
  }
  std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(out)};
  call("dtype_out", stack.data());
}

}  // namespace xray
