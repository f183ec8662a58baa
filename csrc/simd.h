// SIMD vectors of one instruction set, on the vector extensions of GCC and Clang, for the CPU attention kernel.
//
// The including file selects the set by defining SINKATTN_AMX, SINKATTN_AVX512, SINKATTN_AVX2 or none of them (SSE2 on
// x86-64, NEON on arm64). Everything that depends on it is in namespace SINKATTN_ISA, named after the set, so that one
// library can hold several versions and choose at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtypes.h"

#if defined(SINKATTN_AMX)
#define SINKATTN_AVX512
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// From here on, code is compiled for the set: include standard headers above, or their inline functions would be too.
#if defined(SINKATTN_AVX512)
#define SINKATTN_VECTOR_BYTES 64
#define SINKATTN_VECTOR_REGISTERS 32
#if defined(SINKATTN_AMX)
#define SINKATTN_ISA amx
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512bf16,avx512vnni," \
                          "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target( \
    "amx-tile,amx-bf16,amx-int8,avx512bf16,avx512vnni", "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif
#else
#define SINKATTN_ISA avx512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif
#endif
#elif defined(SINKATTN_AVX2)
#define SINKATTN_ISA avx2
#define SINKATTN_VECTOR_BYTES 32
#define SINKATTN_VECTOR_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#else
#define SINKATTN_ISA baseline
#define SINKATTN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SINKATTN_VECTOR_REGISTERS 32
#else
#define SINKATTN_VECTOR_REGISTERS 16
#endif
#endif

#define SINKATTN_INLINE inline __attribute__((always_inline))

namespace sinkattn {
namespace SINKATTN_ISA {

template <typename T, int Bytes = SINKATTN_VECTOR_BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <typename acc_t>
using Vec = typename VectorOf<acc_t>::type;

template <typename acc_t>
constexpr int kLanes = SINKATTN_VECTOR_BYTES / sizeof(acc_t);

using IntVec = VectorOf<int32_t>::type;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Reinterprets the bytes of a value as another type of the same size.
template <typename To, typename From>
SINKATTN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename acc_t>
SINKATTN_INLINE Vec<acc_t> broadcast(acc_t x) {
  return x - Vec<acc_t>{};
}

// a * b + c, fused (rounded once) where the instruction set has it.
template <typename V>
SINKATTN_INLINE V multiply_add(V a, V b, V c) {
#if defined(SINKATTN_AVX512)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(SINKATTN_AVX2)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (sizeof(a[0]) == 4) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// Loads consecutive elements and converts them to the type of accumulation; stores round to nearest even.
template <typename scalar_t>
struct VectorIO {  // float, double
  static SINKATTN_INLINE Vec<scalar_t> load(const scalar_t* from) {
    Vec<scalar_t> x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static SINKATTN_INLINE void store(scalar_t* to, Vec<scalar_t> x) { std::memcpy(to, &x, sizeof x); }
};

using HalfBits = VectorOf<uint16_t, SINKATTN_VECTOR_BYTES / 2>::type;
using WideBits = VectorOf<uint32_t>::type;

template <>
struct VectorIO<BFloat16> {
  static SINKATTN_INLINE Vec<float> load(const BFloat16* from) {
#if defined(SINKATTN_AVX512)
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bit_cast<Vec<float>>(bit_cast<WideBits>(_mm512_maskz_cvtepu16_epi32(0xffff, x)) << 16);
#elif defined(SINKATTN_AVX2)
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bit_cast<Vec<float>>(bit_cast<WideBits>(_mm256_cvtepu16_epi32(x)) << 16);
#else
    HalfBits x;
    std::memcpy(&x, from, sizeof x);
    return bit_cast<Vec<float>>(__builtin_convertvector(x, WideBits) << 16);
#endif
  }
  static SINKATTN_INLINE void store(BFloat16* to, Vec<float> x) {
    const WideBits in = bit_cast<WideBits>(x), number = bit_cast<WideBits>(x == x);
    const WideBits rounded = (in + 0x7fff + ((in >> 16) & 1)) >> 16;
    const HalfBits bits = __builtin_convertvector((number & rounded) | (~number & 0x7fc0), HalfBits);
    std::memcpy(to, &bits, sizeof bits);
  }
};

template <>
struct VectorIO<Half> {
  static SINKATTN_INLINE Vec<float> load(const Half* from) {
#if defined(SINKATTN_AVX512)
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(SINKATTN_AVX2)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    HalfBits x;
    std::memcpy(&x, from, sizeof x);
    const WideBits wide = __builtin_convertvector(x, WideBits);
    const WideBits magnitude = (wide & 0x7fff) << 13;
    const WideBits finite = bit_cast<WideBits>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
    const WideBits special = bit_cast<WideBits>((wide & 0x7c00) == 0x7c00);
    return bit_cast<Vec<float>>(((wide & 0x8000) << 16) | (special & (magnitude | 0x7f800000)) | (~special & finite));
#endif
  }
  static SINKATTN_INLINE void store(Half* to, Vec<float> x) {
#if defined(SINKATTN_AVX512)
    const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
#elif defined(SINKATTN_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) to[i] = Half(x[i]);
#endif
  }
};

template <>
struct VectorIO<int8_t> {
  static SINKATTN_INLINE Vec<float> load(const int8_t* from) {
#if defined(SINKATTN_AVX512)
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vec<float>)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, x));
#elif defined(SINKATTN_AVX2)
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
#else
    VectorOf<int8_t, kLanes<float>>::type x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Vec<float>);
#endif
  }
};

// Loads return the numbers divided by 256, whose bits in float16 are those of the numbers, shifted. The caller multiplies
// sums of products by kLoadScale.
template <>
struct VectorIO<Float8> {
  static SINKATTN_INLINE Vec<float> load(const Float8* from) {
    // Sign-extended and shifted, the sign is in two bits, of which the lower one is no part of the number.
#if defined(SINKATTN_AVX512)
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7);
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_and_si256(wide, _mm256_set1_epi16(kHalfMask)));
#elif defined(SINKATTN_AVX2)
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(x), 7);
    return (Vec<float>)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(kHalfMask)));
#else
    VectorOf<int8_t, kLanes<float>>::type x;
    std::memcpy(&x, from, sizeof x);
    const WideBits wide = bit_cast<WideBits>(__builtin_convertvector(x, IntVec));
    const WideBits magnitude = (wide & 0x7f) << 20;
    return bit_cast<Vec<float>>((wide & 0x80000000) | bit_cast<WideBits>(bit_cast<Vec<float>>(magnitude) * 0x1p112f));
#endif
  }

 private:
  static constexpr int16_t kHalfMask = static_cast<int16_t>(0xbf80);
};

#if defined(__x86_64__)
// Vectors of int16, whose pairs of elements x86-64 multiplies and adds.
using ShortVec = VectorOf<int16_t>::type;

SINKATTN_INLINE ShortVec load_shorts(const int16_t* from) {
  ShortVec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
SINKATTN_INLINE ShortVec load_shorts(const int8_t* from) {
#if defined(SINKATTN_AVX512)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bit_cast<ShortVec>(_mm512_maskz_cvtepi8_epi16(~0u, x));
#elif defined(SINKATTN_AVX2)
  return bit_cast<ShortVec>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return bit_cast<ShortVec>(_mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8));
#endif
}

// Lane i of the result is that of `sum`, plus the products of elements 2i and 2i + 1 of `a` and `b`.
SINKATTN_INLINE IntVec add_products(IntVec sum, ShortVec a, ShortVec b) {
#if defined(SINKATTN_AMX)
  return bit_cast<IntVec>(_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b));
#elif defined(SINKATTN_AVX512)
  return sum + bit_cast<IntVec>(_mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif defined(SINKATTN_AVX2)
  return sum + bit_cast<IntVec>(_mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
  return sum + bit_cast<IntVec>(_mm_madd_epi16((__m128i)a, (__m128i)b));
#endif
}

// The elements of two vectors side by side, in quarters of vectors: `low` has the first four pairs of each 16 bytes,
// `high` the other four.
struct ShortPairs {
  ShortVec low, high;
};
SINKATTN_INLINE ShortPairs interleave(ShortVec a, ShortVec b) {
#if defined(SINKATTN_AVX512)
  return {
      (ShortVec)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b), (ShortVec)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b)};
#elif defined(SINKATTN_AVX2)
  return {
      (ShortVec)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b), (ShortVec)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b)};
#else
  return {(ShortVec)_mm_unpacklo_epi16((__m128i)a, (__m128i)b), (ShortVec)_mm_unpackhi_epi16((__m128i)a, (__m128i)b)};
#endif
}
#endif

// What `load` returns times this is the number.
template <typename stored_t>
constexpr float kLoadScale = 1;
template <>
constexpr float kLoadScale<Float8> = 256;

template <typename scalar_t>
SINKATTN_INLINE auto load(const scalar_t* from) {
  return VectorIO<scalar_t>::load(from);
}

// Loads `count` elements, fewer than a vector has, padded with zeros.
template <typename scalar_t>
SINKATTN_INLINE auto load_first(const scalar_t* from, int64_t count) {
  using V = decltype(load(from));
  scalar_t padded[sizeof(V) / sizeof(V{}[0])] = {};
  std::memcpy(padded, from, count * sizeof(scalar_t));
  return load(padded);
}

template <typename scalar_t, typename V>
SINKATTN_INLINE void store(scalar_t* to, V x) {
  VectorIO<scalar_t>::store(to, x);
}

// Lane i of the result is lane Index[i] of the concatenation of `a` and `b`.
template <typename V, int... Index>
SINKATTN_INLINE V shuffle(V a, V b, std::integer_sequence<int, Index...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Index...);
#else
  using Int = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, typename VectorOf<Int>::type{Index...});
#endif
}

template <typename V>
using LaneNumbers = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>;

template <int Step, typename V, int... I>
SINKATTN_INLINE V swap_lanes(V x, std::integer_sequence<int, I...>) {
  return shuffle(x, x, std::integer_sequence<int, (I ^ Step)...>{});
}

// Lane i of the result is lane i ^ Step.
template <int Step, typename V>
SINKATTN_INLINE V swap_lanes(V x) {
  return swap_lanes<Step>(x, LaneNumbers<V>{});
}

template <typename V>
struct VectorPair {
  V low, high;
};

// The lanes of two vectors in the order of the elements that interleave() brings together: two quarters of 16 bytes of
// each in turn.
template <typename V, int... I>
SINKATTN_INLINE VectorPair<V> in_order(V low, V high, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  return {
      shuffle(low, high, std::integer_sequence<int, (I / 4 % 2 * lanes + I / 8 * 4 + I % 4)...>{}),
      shuffle(
          low, high, std::integer_sequence<int, ((lanes + I) / 4 % 2 * lanes + (lanes + I) / 8 * 4 + I % 4)...>{})};
}

template <int Step, typename V, int... I>
SINKATTN_INLINE VectorPair<V> exchange(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  return {
      shuffle(a, b, std::integer_sequence<int, (I & Step ? lanes + I - Step : I)...>{}),
      shuffle(a, b, std::integer_sequence<int, (I & Step ? lanes + I : I + Step)...>{})};
}

// One step of a transpose or reduction. Where bit `Step` of lane number i is clear, `low` takes lane i of `a` and
// `high` takes lane i + Step of `a`; else `low` takes lane i - Step of `b` and `high` takes lane i of `b`.
template <int Step, typename V>
SINKATTN_INLINE VectorPair<V> exchange(V a, V b) {
  return exchange<Step>(a, b, LaneNumbers<V>{});
}

// Sums each of `Count` vectors, as many as a vector has lanes: lane i of the result is the sum of the lanes of x[i].
// Overwrites x.
template <int Count, typename V>
SINKATTN_INLINE V horizontal_sums(V* x) {
  if constexpr (Count > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; ++i) {
      const VectorPair<V> both = exchange<Count / 2>(x[i], x[i + Count / 2]);
      x[i] = both.low + both.high;
    }
    return horizontal_sums<Count / 2>(x);
  } else {
    return x[0];
  }
}

// Transposes a square of lanes: lane i of x[j] becomes lane j of x[i].
template <int Step = 1, typename V>
SINKATTN_INLINE void transpose(V* x) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if constexpr (Step < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & Step) continue;
      const VectorPair<V> both = exchange<Step>(x[i], x[i + Step]);
      x[i] = both.low;
      x[i + Step] = both.high;
    }
    transpose<2 * Step>(x);
  }
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
