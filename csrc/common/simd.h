// Vectors of XRAY_LANES floats and conversions of rows of any element type, by the compiler's vector extension.
// Included by variants.h inside one namespace for each instruction set, hence no include guard.

using Float = float __attribute__((vector_size(XRAY_LANES * 4)));
using Int = int32_t __attribute__((vector_size(XRAY_LANES * 4)));
using Bits = uint32_t __attribute__((vector_size(XRAY_LANES * 4)));
using Bits16 = uint16_t __attribute__((vector_size(XRAY_LANES * 2)));
using Double = double __attribute__((vector_size(XRAY_LANES * 4)));

// Packing<T>: XRAY_LANES elements of type T as they lie in memory, to and from floats.
template <class T>
struct Packing;

// ---- float32 as it is; float64, for checking gradients, with half as many lanes ----

template <>
struct Packing<float> {
  using Packed = Float;
  XRAY_INLINE Float pack(Float value) {
    return value;
  }
  XRAY_INLINE Float unpack(Float packed) {
    return packed;
  }
};

template <>
struct Packing<double> {
  using Packed = Double;
  XRAY_INLINE Double pack(Double value) {
    return value;
  }
  XRAY_INLINE Double unpack(Double packed) {
    return packed;
  }
};

// ---- bfloat16: the upper half of a float32, rounded to nearest even ----
// Rounding keeps a NaN one whose lower half is 0, as in all that arithmetic makes of bfloat16 values and of its own
// NaN; what comes as float32 is cleaned of others when it is read. Converting by instruction: GCC widens and narrows by
// __builtin_convertvector in two halves.

template <>
struct Packing<BFloat16> {
  using Packed = Bits16;
  XRAY_INLINE Bits16 pack(Float value) {
    const Bits bits = (Bits)value;
    const Bits half = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(XRAY_F16C) && XRAY_LANES == 16
    return (Bits16)_mm512_cvtepi32_epi16((__m512i)half);
#elif defined(XRAY_F16C)
    const __m256i pairs = _mm256_packus_epi32((__m256i)half, (__m256i)half);
    return (Bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
    return __builtin_convertvector(half, Bits16);
#endif
  }
  XRAY_INLINE Float unpack(Bits16 packed) {
#if defined(XRAY_F16C) && XRAY_LANES == 16
    return (Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)packed), 16);
#elif defined(XRAY_F16C)
    return (Float)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)packed), 16);
#else
    return (Float)(__builtin_convertvector(packed, Bits) << 16);
#endif
  }
};

// ---- float16: by instruction where there is one, by arithmetic on the bits elsewhere ----

template <>
struct Packing<Half> {
  using Packed = Bits16;
  XRAY_INLINE Bits16 pack(Float value) {
#if defined(XRAY_F16C) && XRAY_LANES == 16
    return (Bits16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(XRAY_F16C)
    return (Bits16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
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
    return __builtin_convertvector(sign | (is_large & special) | (~is_large & finite), Bits16);
#endif
  }
  XRAY_INLINE Float unpack(Bits16 packed) {
#if defined(XRAY_F16C) && XRAY_LANES == 16
    return (Float)_mm512_cvtph_ps((__m256i)packed);
#elif defined(XRAY_F16C)
    return (Float)_mm256_cvtph_ps((__m128i)packed);
#else
    const Bits wide = __builtin_convertvector(packed, Bits);
    const Bits is_special = (Bits)((wide & 0x7c00) == 0x7c00);
    // exponent and fraction in place, then times 2^112, which rebiases the exponent and normalises subnormals
    const Float scale = (Float)(Bits{} + 0x77800000u);
    const Bits magnitude = (Bits)((Float)((wide & 0x7fff) << 13) * scale);
    return (Float)(magnitude | (is_special & 0x7f800000u) | ((wide & 0x8000) << 16));
#endif
  }
};

template <class T>
XRAY_INLINE auto load(const T* from) {
  typename Packing<T>::Packed packed;
  memcpy(&packed, from, sizeof packed);
  return Packing<T>::unpack(packed);
}

// ---- stores ----

template <class T, class V>
static inline void store(T* to, V value) {
  const auto packed = Packing<T>::pack(value);
  memcpy(to, &packed, sizeof packed);
}

// Stores past the caches, for results so large that they would not stay there: a line is then written without being
// read first. `to` must be aligned to what is stored, and end_streaming() must come before other threads read it.
template <class P>
XRAY_INLINE void stream(void* to, P packed) {
#if defined(__x86_64__)
  if constexpr (sizeof packed == 8) _mm_stream_si64((long long*)to, (long long)packed);
  if constexpr (sizeof packed == 16) _mm_stream_si128((__m128i*)to, (__m128i)packed);
#if XRAY_LANES >= 8
  if constexpr (sizeof packed == 32) _mm256_stream_si256((__m256i*)to, (__m256i)packed);
#endif
#if XRAY_LANES == 16
  if constexpr (sizeof packed == 64) _mm512_stream_si512((__m512i*)to, (__m512i)packed);
#endif
#else
  memcpy(to, &packed, sizeof packed);
#endif
}

static inline void end_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
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

// Sum over lanes in a fixed order.
template <class S, class V>
static inline S sum_lanes(V value) {
  S buffer[sizeof(V) / sizeof(S)];
  memcpy(buffer, &value, sizeof value);
  S sum = 0;
  for (S part : buffer) sum += part;
  return sum;
}

// The first `count` lanes; the others become 0.
template <class T, class V>
XRAY_INLINE V only_first(V value, int64_t count) {
  if (count == lanes<T>) return value;
  typename Wide<T>::Scalar buffer[lanes<T>];
  store(buffer, value);
  return load_some(buffer, count);
}

// ---- loops over a row: whole vectors, then what is left ----

// The first `count` <= lanes elements; constant in all but the last call of the loops below.
template <class T>
XRAY_INLINE typename Wide<T>::Vector load_first(const T* from, int64_t count) {
  return count == lanes<T> ? load(from) : load_some(from, count);
}

// Stores them, past the caches or not.
template <class T, class P>
XRAY_INLINE void store_packed(T* to, P packed, int64_t count, bool past_caches) {
  if (count != lanes<T>) {
    memcpy(to, &packed, count * sizeof(T));
  } else if (past_caches) {
    stream(to, packed);
  } else {
    memcpy(to, &packed, sizeof packed);
  }
}

template <class T, class V>
XRAY_INLINE void store_first(T* to, V value, int64_t count, bool past_caches = false) {
  store_packed(to, Packing<T>::pack(value), count, past_caches);
}

// f(c, count) for each vector of channels [begin, end).
template <class T, class F>
XRAY_INLINE void for_each_vector(int64_t begin, int64_t end, F&& f) {
  int64_t c = begin;
  for (; c + lanes<T> <= end; c += lanes<T>) f(c, lanes<T>);
  if (c < end) f(c, end - c);
}

// Two sums over one loop.
template <class V>
struct Pair {
  V first, second;
  XRAY_METHOD Pair& operator+=(Pair other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

template <class S, class V>
static inline Pair<S> sum_lanes(Pair<V> value) {
  return {sum_lanes<S>(value.first), sum_lanes<S>(value.second)};
}

// Sum of the vectors f(c, count), or pairs of them, whose lanes from `count` on must be 0. Blocks of 64 channels have a
// sum of their own: rounding grows with the number of blocks, not of channels, and additions of one block overlap those
// of the next.
template <class T, class F>
XRAY_INLINE auto sum_over(int64_t begin, int64_t end, F&& f) {
  using V = decltype(f(begin, end));
  V total{};
  int64_t c = begin;
  for (; c + 64 <= end; c += 64) {
    V part{};
    for (int64_t k = c; k < c + 64; k += lanes<T>) part += f(k, lanes<T>);
    total += part;
  }
  for (; c + lanes<T> <= end; c += lanes<T>) total += f(c, lanes<T>);
  if (c < end) total += f(c, end - c);
  return sum_lanes<typename Wide<T>::Scalar>(total);
}

// ---- exponentials ----

// 2^x for x up to 127, within 0.7 units in the last place: 2^n times a minimax polynomial of the rest in [-1/2, 1/2]. 0
// below 2^-126, NaN for NaN.
XRAY_INLINE Float exp2_of(Float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Float shifted = x + magic;
  const Float r = x - (shifted - magic);
  Float p = 0.00015353361959569156f * r + 0.0013398875016719103f;
  p = p * r + 0.00961843691766262f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  const Bits power = ((Bits)shifted << 23) + 0x3f800000u;
  const Bits underflow = (Bits)(x < -126.0f);
  return (Float)((Bits)(p * (Float)power) & ~underflow);
}

// float64 is for checking gradients: exactness matters, time does not.
XRAY_INLINE Double exp2_of(Double x) {
  double at[lanes<double>];
  store(at, x);
  for (double& value : at) value = exp2(value);
  return load(at);
}

static constexpr double kLog2E = 1.4426950408889634;
