// The element types of kernels. Half types are bits: vectors of simd.h convert them, and rows of them are copied as
// such.
#pragma once

#include <cstdint>

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace xray {

// What a CUDA launcher is told of its tensors.
enum class Element { kFloat, kHalf, kBFloat16 };

inline int64_t element_size(Element type) {
  return type == Element::kFloat ? 4 : 2;
}

}  // namespace xray
