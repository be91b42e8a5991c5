// Stands in for csrc/contrastive_loss/cuda_product.h: PyTorch has no mm with another dtype for its result on the CPU.
#pragma once

#include <array>

#include "common/tensor.h"

namespace xray {

inline void product_out(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  STD_TORCH_CHECK(
      out.scalar_type() == ScalarType::Float && a.scalar_type() == b.scalar_type() && out.size(0) == a.size(0) &&
          out.size(1) == b.size(1) && a.size(1) == b.size(0) && a.scalar_type() != ScalarType::Double,
      "mm.dtype_out would refuse these operands");
  std::array<StableIValue, 3> stack{
      from(torch::stable::to(a, ScalarType::Float)), from(torch::stable::to(b, ScalarType::Float)), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace xray
