// Compiles XRAY_KERNEL_FILE once for each instruction set, in a namespace of its own: baseline, avx2, avx512.
//
// The kernel file is written in the vectors of simd.h, whose width is XRAY_LANES floats; nothing in it may instantiate
// a template of the standard library, whose code the linker could then share with the baseline. The one binary runs on
// every machine: capability.h chooses at run time. No -march=native anywhere.
//
// Usage:   #define XRAY_KERNEL_FILE "token_reorganize/cpu_kernel.h"
//          #include "common/variants.h"

#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/capability.h"
#include "common/dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define XRAY_LAMBDA __attribute__((always_inline))
#define XRAY_METHOD inline __attribute__((always_inline))
#define XRAY_INLINE static XRAY_METHOD

#define XRAY_LANES 4
namespace baseline {
#include "common/simd.h"
#include XRAY_KERNEL_FILE
}  // namespace baseline
#undef XRAY_LANES

#if defined(__x86_64__)
#define XRAY_F16C
#define XRAY_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "common/simd.h"
#include XRAY_KERNEL_FILE
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef XRAY_LANES

#define XRAY_LANES 16
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace avx512 {
#include "common/simd.h"
#include XRAY_KERNEL_FILE
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef XRAY_LANES
#undef XRAY_F16C
#endif
#undef XRAY_INLINE
#undef XRAY_METHOD
#undef XRAY_LAMBDA

// Calls the variant of `function` for the instruction set in use.
#if defined(__x86_64__)
#define XRAY_CALL_VARIANT(function, ...)                     \
  (xray::capability() == 2   ? avx512::function(__VA_ARGS__) \
   : xray::capability() == 1 ? avx2::function(__VA_ARGS__)   \
                             : baseline::function(__VA_ARGS__))
#else
#define XRAY_CALL_VARIANT(function, ...) baseline::function(__VA_ARGS__)
#endif
