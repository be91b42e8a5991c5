// Stand-in for csrc/common/variants.h on a machine with AVX2: namespace avx512 with its 16 lanes, whose vectors the
// compiler splits and whose intrinsics are written out below, and namespace amx on emulated tiles. The baseline is
// there only for what bindings convert by it.

#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/capability.h"
#include "common/dtypes.h"
#include "emulation.h"

#include <immintrin.h>

#define XRAY_LAMBDA __attribute__((always_inline))
#define XRAY_METHOD inline __attribute__((always_inline))
#define XRAY_INLINE static XRAY_METHOD

namespace emulated {

using Words16 = uint16_t __attribute__((vector_size(32)));
using Words32 = uint32_t __attribute__((vector_size(64)));

XRAY_INLINE __m256i narrow(__m512i value) {
  return (__m256i) __builtin_convertvector((Words32)value, Words16);
}

XRAY_INLINE __m512i widen(__m256i value) {
  return (__m512i) __builtin_convertvector((Words16)value, Words32);
}

XRAY_INLINE __m512i shift_left(__m512i value, int count) {
  return (__m512i)((Words32)value << count);
}

XRAY_INLINE __m256i to_half(__m512 value) {
  __m256 half[2];
  memcpy(half, &value, sizeof half);
  const __m128i low = _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(_mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT), low);
}

XRAY_INLINE __m512 from_half(__m256i value) {
  const __m256 half[2] = {
      _mm256_cvtph_ps(_mm256_castsi256_si128(value)), _mm256_cvtph_ps(_mm256_extracti128_si256(value, 1))};
  __m512 wide;
  memcpy(&wide, half, sizeof wide);
  return wide;
}

// as the instruction, which takes a whole line at an address that must be one's
XRAY_INLINE void stream(void* to, __m512i value) {
  if (reinterpret_cast<uintptr_t>(to) % 64 != 0) __builtin_trap();
  memcpy(to, &value, sizeof value);
}

// bfloat16 of one float: denormals to zero, to nearest even, NaN stays one
XRAY_INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) return uint16_t(bits >> 16 & 0x8000);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

using Halves = uint16_t __attribute__((vector_size(64)));

static inline __m512i to_bfloat16(__m512 upper, __m512 lower) {
  Halves result;
  for (int i = 0; i < 16; ++i) {
    result[i] = to_bfloat16(lower[i]);
    result[16 + i] = to_bfloat16(upper[i]);
  }
  return (__m512i)result;
}

static inline __m256i to_bfloat16(__m512 value) {
  Words16 result;
  for (int i = 0; i < 16; ++i) result[i] = to_bfloat16(value[i]);
  return (__m256i)result;
}

static inline __m512i permute(__m512i order, __m512i value) {
  Halves result;
  for (int i = 0; i < 32; ++i) result[i] = ((Halves)value)[((Halves)order)[i] & 31];
  return (__m512i)result;
}

}  // namespace emulated

#define XRAY_LANES 4
namespace baseline {
#include "common/simd.h"
}  // namespace baseline
#undef XRAY_LANES

#define _mm512_cvtepi32_epi16(value) emulated::narrow(value)
#define _mm512_cvtepu16_epi32(value) emulated::widen(value)
#define _mm512_slli_epi32(value, count) emulated::shift_left(value, count)
#define _mm512_cvtps_ph(value, rounding) emulated::to_half(value)
#define _mm512_cvtph_ps(value) emulated::from_half(value)
#define _mm512_stream_si512(to, value) emulated::stream(to, value)
#define _mm512_cvtneps_pbh(value) emulated::to_bfloat16(value)
#define _mm512_cvtne2ps_pbh(upper, lower) emulated::to_bfloat16(upper, lower)
#define _mm512_permutexvar_epi16(order, value) emulated::permute(order, value)

#define XRAY_F16C
#define XRAY_LANES 16
namespace avx512 {
#include "common/simd.h"
#include XRAY_KERNEL_FILE
}  // namespace avx512

#if defined(XRAY_AMX_KERNEL_FILE)
namespace amx {
using namespace avx512;
#include "common/amx.h"
#include XRAY_AMX_KERNEL_FILE
}  // namespace amx
#endif

#define XRAY_CALL_VARIANT(function, ...) avx512::function(__VA_ARGS__)
