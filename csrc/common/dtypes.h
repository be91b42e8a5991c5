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
