// Compiles XRAY_KERNEL_FILE once for each instruction set, in a namespace of its own: baseline, avx2, avx512.
//
// The kernel file is written in the vectors of simd.h, whose width is XRAY_LANES floats; nothing in it may instantiate
// a template of the standard library, whose code the linker could then share with the baseline. The one binary runs on
// every machine: capability.h chooses at run time. No -march=native anywhere.
//
// Usage:   #define XRAY_KERNEL_FILE "token_reorganize/cpu_kernel.h"
//          #include "common/variants.h"
//
// Where AMX has a kernel of its own, XRAY_AMX_KERNEL_FILE names it: namespace amx, which sees all of avx512. Its
// lambdas can not be inlined into functions of avx512, so it hands them none.

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

#if defined(__clang__)
#define XRAY_BEGIN_TARGET(features) \
  XRAY_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define XRAY_END_TARGET XRAY_PRAGMA(clang attribute pop)
#else
#define XRAY_BEGIN_TARGET(features) XRAY_PRAGMA(GCC push_options) XRAY_PRAGMA(GCC target(features))
#define XRAY_END_TARGET XRAY_PRAGMA(GCC pop_options)
#endif
#define XRAY_PRAGMA(text) _Pragma(#text)

#if defined(__x86_64__)
#define XRAY_F16C
#define XRAY_LANES 8
XRAY_BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
#include "common/simd.h"
#include XRAY_KERNEL_FILE
}  // namespace avx2
XRAY_END_TARGET
#undef XRAY_LANES

#define XRAY_LANES 16
XRAY_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "common/simd.h"
#include XRAY_KERNEL_FILE
}  // namespace avx512
XRAY_END_TARGET

#if defined(XRAY_AMX_KERNEL_FILE)
XRAY_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")
namespace amx {
using namespace avx512;
#include "common/amx.h"
#include XRAY_AMX_KERNEL_FILE
}  // namespace amx
XRAY_END_TARGET
#endif
#undef XRAY_LANES
#undef XRAY_F16C
#endif
#undef XRAY_PRAGMA
#undef XRAY_END_TARGET
#undef XRAY_BEGIN_TARGET
#undef XRAY_INLINE
#undef XRAY_METHOD
#undef XRAY_LAMBDA

// Calls the variant of `function` for the instruction set in use; AMX has AVX-512 as well.
#if defined(__x86_64__)
#define XRAY_CALL_VARIANT(function, ...)                     \
  (xray::capability() >= 2   ? avx512::function(__VA_ARGS__) \
   : xray::capability() == 1 ? avx2::function(__VA_ARGS__)   \
                             : baseline::function(__VA_ARGS__))
#else
#define XRAY_CALL_VARIANT(function, ...) baseline::function(__VA_ARGS__)
#endif
