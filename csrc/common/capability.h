// Which compiled variant of the CPU kernels runs. Level 0 is baseline, 1 avx2, 2 avx512, 3 amx (the order of
// variants.h); kernels without a form for AMX run as on level 2.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xray {

#if defined(__x86_64__)
// Whether the processor has bfloat16 tiles and the system lets this process use them. Linux hands out the 8 KiB of
// tiles that a context switch must save only to processes that ask; asking again is harmless. The processor is asked
// directly, since GCC 12 has no names for these features.
inline bool request_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tiles = (d >> 22 & 1) && (d >> 24 & 1);  // amx-bf16, amx-tile
  if (!has_tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool has_conversions = a >> 5 & 1;  // avx512_bf16
  constexpr int request_permission = 0x1023, tile_data = 18;
  return has_conversions && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// The highest level that this machine has.
inline int64_t available_capability() {
#if defined(__x86_64__)
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx512) return 1;
  static const bool has_amx = request_amx();
  return has_amx ? 3 : 2;
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
