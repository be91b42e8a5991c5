// Vectors of XRAY_LANES floats and conversions of rows of any element type, by the compiler's vector extension.
// Included by variants.h inside one namespace for each instruction set, hence no include guard.

using Float = float __attribute__((vector_size(XRAY_LANES * 4)));
using Int = int32_t __attribute__((vector_size(XRAY_LANES * 4)));
using Bits = uint32_t __attribute__((vector_size(XRAY_LANES * 4)));
using Bits16 = uint16_t __attribute__((vector_size(XRAY_LANES * 2)));
using Double = double __attribute__((vector_size(XRAY_LANES * 4)));

// ---- float32: as it is ----

static inline Float load(const float* from) {
  Float value;
  memcpy(&value, from, sizeof value);
  return value;
}

static inline void store(float* to, Float value) {
  memcpy(to, &value, sizeof value);
}

// ---- float64, for checking gradients: half as many lanes ----

static inline Double load(const double* from) {
  Double value;
  memcpy(&value, from, sizeof value);
  return value;
}

static inline void store(double* to, Double value) {
  memcpy(to, &value, sizeof value);
}

// ---- bfloat16: the upper half of a float32, rounded to nearest even ----

static inline Float load(const BFloat16* from) {
  Bits16 half;
  memcpy(&half, from, sizeof half);
  return (Float)(__builtin_convertvector(half, Bits) << 16);
}

static inline void store(BFloat16* to, Float value) {
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits is_nan = (Bits)(value != value);
  const Bits16 half = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), Bits16);
  memcpy(to, &half, sizeof half);
}

// ---- float16: by instruction where there is one, by arithmetic on the bits elsewhere ----

static inline Float load(const Half* from) {
#if defined(XRAY_F16C) && XRAY_LANES == 16
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(XRAY_F16C)
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  Bits16 half;
  memcpy(&half, from, sizeof half);
  const Bits wide = __builtin_convertvector(half, Bits);
  const Bits is_special = (Bits)((wide & 0x7c00) == 0x7c00);
  // exponent and fraction in place, then times 2^112, which rebiases the exponent and normalises subnormals
  const Float scale = (Float)(Bits{} + 0x77800000u);
  const Bits magnitude = (Bits)((Float)((wide & 0x7fff) << 13) * scale);
  return (Float)(magnitude | (is_special & 0x7f800000u) | ((wide & 0x8000) << 16));
#endif
}

static inline void store(Half* to, Float value) {
#if defined(XRAY_F16C) && XRAY_LANES == 16
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(XRAY_F16C)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits bits = (Bits)value & 0x7fffffff;
  const Bits sign = ((Bits)value >> 16) & 0x8000;
  const Bits is_large = (Bits)(bits >= 0x47800000u);  // 2^16 and more, infinities, NaN
  const Bits is_nan = (Bits)(bits > 0x7f800000u);
  const Bits is_small = (Bits)(bits < 0x38800000u);  // below 2^-14: subnormal in float16
  const Bits normal = (bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13;
  // adding 0.5 leaves the fraction of a subnormal in the low bits, rounded by the addition
  const Float half_one = (Float)(Bits{} + 0x3f000000u);
  const Bits subnormal = (Bits)((Float)bits + half_one) - 0x3f000000u;
  const Bits finite = (is_small & subnormal) | (~is_small & normal);
  const Bits special = 0x7c00 | (is_nan & 0x0200);
  const Bits16 half = __builtin_convertvector(sign | (is_large & special) | (~is_large & finite), Bits16);
  memcpy(to, &half, sizeof half);
#endif
}

// ---- rows ----

// What sums of elements of type T are kept in.
template <class T>
struct Wide {
  using Scalar = float;
  using Vector = Float;
};

template <>
struct Wide<double> {
  using Scalar = double;
  using Vector = Double;
};

template <class T>
inline constexpr int64_t lanes = sizeof(typename Wide<T>::Vector) / sizeof(typename Wide<T>::Scalar);

// The first `count` < lanes elements; the others are 0.
template <class T>
static inline typename Wide<T>::Vector load_some(const T* from, int64_t count) {
  T buffer[lanes<T>];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <class T, class V>
static inline void store_some(T* to, V value, int64_t count) {
  T buffer[lanes<T>];
  store(buffer, value);
  memcpy(to, buffer, count * sizeof(T));
}

// Sum over lanes in a fixed order.
template <class S, class V>
static inline S sum_lanes(V value) {
  S buffer[sizeof(V) / sizeof(S)];
  memcpy(buffer, &value, sizeof value);
  S sum = 0;
  for (S part : buffer) sum += part;
  return sum;
}
