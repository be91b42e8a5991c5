// Which compiled variant of the CPU kernels runs. Level 0 is baseline, 1 avx2, 2 avx512 (the order of variants.h).
#pragma once

#include <cstdint>

namespace xray {

// The highest level that this machine's processor has.
inline int64_t available_capability() {
#if defined(__x86_64__)
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? 2 : 1;
#else
  return 0;
#endif
}

// The level in use: the available one unless a test or bench asked for less.
inline int64_t& capability() {
  static int64_t level = available_capability();
  return level;
}

}  // namespace xray
