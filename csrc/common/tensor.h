// The stable C++ ABI of PyTorch, and what every CPU and CUDA binding needs of it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/dtypes.h"

namespace xray {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor itself when its rows are dense (last stride 1), else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A new uninitialised CPU tensor for a result, of the dtype of `like` or another. The system hands out large ones page
// by page, and clears each 4 KiB page at its first use, which takes several times as long as writing it; so pages of 2
// MiB are asked for.
inline Tensor new_result(
    const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = std::nullopt) {
  Tensor result = torch::stable::new_empty(like, sizes, type);
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + result.numel() * result.element_size()) / page * page;
  if (end >= begin + 4 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return result;
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

// The element type of `tensor` for a CUDA launcher.
inline Element element(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      STD_TORCH_CHECK(
          false, name,
          " must be float32, float16 or bfloat16 for the CUDA kernel (XRAY_KERNELS=reference takes float64)");
  }
}

}  // namespace xray
