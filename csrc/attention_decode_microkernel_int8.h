// Inner loops of decoding over keys and values of int8, in integers, where the instruction set multiplies pairs of int16
// (x86-64). Included by attention_decode_microkernel.h.
//
// Queries and weights are rounded to int16, as integers times a unit that is the 2^14th part of the largest one: by at
// most its 2^15th part, where keys and values were rounded by the 2^8th part of their largest element.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "attention_decode_microkernel_float.h"
#include "simd_math.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kMaxInt8Dim = 512;  // elements of keys: sums of as many products fit int32

// Bytes of a query in int16, padded with zeros to whole vectors, and of its unit.
inline int64_t int8_query_size(int64_t dim) { return round_up(dim * sizeof(int16_t), SINKATTN_VECTOR_BYTES) + 64; }

#if !defined(__x86_64__)
constexpr bool kHasInt8Loops = false;
#else
constexpr bool kHasInt8Loops = true;

// What integers count, and its inverse.
struct Unit {
  float size, inverse;
};

// The unit of a vector of `count` elements, padded with zeros to whole SIMD vectors. NaN if an element is NaN or
// infinite. Where the inverse is infinite, integers are any, of a unit of nothing.
SINKATTN_INLINE Unit unit_of(const float* x, int64_t count) {
  Vec<float> largest{}, nonfinite{};
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Vec<float> y = load(x + i);
    largest = maximum(largest, y < 0.0f ? -y : y);
    nonfinite += y * 0.0f;
  }
  const float max = reduce_max(largest) + reduce_sum(nonfinite);
  return {max * 0x1p-14f, 0x1p14f / max};
}

// The integers of a vector; NaN gives any.
SINKATTN_INLINE IntVec round_to_int(Vec<float> x) {
  // As in exp (simd_math.h).
  return bit_cast<IntVec>(x + 12582912.0f) - bit_cast<IntVec>(broadcast(12582912.0f));
}

SINKATTN_INLINE void round_to_int16(int16_t* to, const float* from, int64_t count, Unit unit) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const IntVec n = round_to_int(load(from + i) * unit.inverse);
    const auto shorts = __builtin_convertvector(n, VectorOf<int16_t, SINKATTN_VECTOR_BYTES / 2>::type);
    std::memcpy(to + i, &shorts, sizeof shorts);
  }
}

// Packs queries, each followed by zeros up to a whole vector of fp32.
inline void pack_for_int8(char* packed, const float* queries, int64_t stride, int64_t num_queries, int64_t dim) {
  const int64_t size = int8_query_size(dim);
  for (int64_t q = 0; q < num_queries; ++q, packed += size, queries += stride) {
    const Unit unit = unit_of(queries, dim);
    std::memset(packed, 0, size);
    round_to_int16(reinterpret_cast<int16_t*>(packed), queries, dim, unit);
    std::memcpy(packed + size - 64, &unit.size, sizeof unit.size);
  }
}

// Loads `count` elements, fewer than a vector has, padded with zeros.
SINKATTN_INLINE ShortVec load_first_shorts(const int8_t* from, int64_t count) {
  int8_t padded[kLanes<int16_t>] = {};
  std::memcpy(padded, from, count);
  return load_shorts(padded);
}

// scores[q * kDecodeBlock + j]: scaled dot products of kQueries packed queries with keys j < count. Advances `prefetch`
// by up to kPrefetchBytes for every vector of the keys that it takes at a time.
template <int kQueries, int kPrefetchBytes>
SINKATTN_INLINE void int8_scores(
    float* scores, float scale, const char* packed, const int8_t* keys, int64_t dim, int count, Prefetch& prefetch) {
  constexpr int lanes = kLanes<float>, shorts = kLanes<int16_t>, step = kDecodeKeys<kQueries, float>;
  const int64_t size = int8_query_size(dim);
  float units[lanes] = {};
  for (int r = 0; r < kQueries; ++r) {
    float unit;
    std::memcpy(&unit, packed + (r + 1) * size - 64, sizeof unit);
    std::fill_n(units + r * step, step, unit * scale);
  }
  for (int j = 0; j < count; j += step) {
    const int8_t* key[step];
    for (int c = 0; c < step; ++c) key[c] = keys + std::min(j + c, count - 1) * dim;
    IntVec partial[lanes] = {};
    for (int64_t d = 0; d < dim; d += shorts) {
      ShortVec q[kQueries];
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) q[r] = load_shorts(reinterpret_cast<const int16_t*>(packed + r * size) + d);
#pragma GCC unroll 16
      for (int c = 0; c < step; ++c) {
        const ShortVec k = d + shorts <= dim ? load_shorts(key[c] + d) : load_first_shorts(key[c] + d, dim - d);
        prefetch.part<kPrefetchBytes, step>(c);
#pragma GCC unroll 4
        for (int r = 0; r < kQueries; ++r) partial[r * step + c] = add_products(partial[r * step + c], q[r], k);
      }
      prefetch.advance();
    }
    float all[lanes];
    store(all, __builtin_convertvector(horizontal_sums<lanes>(partial), Vec<float>) * load(units));
    for (int r = 0; r < kQueries; ++r) std::memcpy(scores + r * kDecodeBlock + j, all + r * step, step * sizeof(float));
  }
}

// The same for any number of queries. Prefetches `count` rows of `next`.
inline void int8_scores(
    float* scores, float scale, const char* packed, int64_t num_queries, const int8_t* keys, int64_t dim, int count,
    const int8_t* next, int64_t next_dim) {
  constexpr int most = kDecodeQueries<float>, shorts = kLanes<int16_t>;
  const int64_t turns = (num_queries + most - 1) / most, vectors = (dim + shorts - 1) / shorts;
  Prefetch prefetch{reinterpret_cast<const char*>(next), 0};
  for (int64_t q = 0; q < num_queries; q += most) {
    with_queries<float>(num_queries - q, [&](auto n) {
      constexpr int keys_at_once = kDecodeKeys<n, float>;
      prefetch.step = keys_at_once * next_dim / (vectors * turns);
      int8_scores<n, keys_at_once * shorts>(
          scores + q * kDecodeBlock, scale, packed + q * int8_query_size(dim), keys, dim, count, prefetch);
    });
  }
}

// acc = factor * acc + unit * weights x values, for kQueries queries and kVectors times kLanes<int16_t> value elements,
// of which `rest` exist. Weights are those of consecutive keys, [query][kDecodeBlock], followed by a zero. Advances
// `prefetch` by up to kPrefetchBytes for every two values.
template <int kQueries, int kVectors, int kPrefetchBytes>
SINKATTN_INLINE void int8_add_values_tile(
    float* acc, int64_t acc_stride, const float* factor, const Unit* unit, const int16_t* weights, const int8_t* values,
    int64_t stride, int count, int64_t rest, Prefetch& prefetch) {
  constexpr int lanes = kLanes<float>, shorts = kLanes<int16_t>;
  IntVec x[kQueries][2 * kVectors] = {};
  for (int j = 0; j < count; j += 2) {
    prefetch.part<kPrefetchBytes, 1>(0);
    prefetch.advance();
    const int8_t* a = values + j * stride;
    const int8_t* b = values + std::min(j + 1, count - 1) * stride;
    ShortPairs pairs[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      pairs[c] = rest >= kVectors * shorts
                     ? interleave(load_shorts(a + c * shorts), load_shorts(b + c * shorts))
                     : interleave(load_first_shorts(a, rest), load_first_shorts(b, rest));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
      int32_t both;
      std::memcpy(&both, weights + r * kDecodeBlock + j, sizeof both);
      const ShortVec w = bit_cast<ShortVec>(broadcast(both));
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        x[r][2 * c] = add_products(x[r][2 * c], w, pairs[c].low);
        x[r][2 * c + 1] = add_products(x[r][2 * c + 1], w, pairs[c].high);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const VectorPair<IntVec> sums = in_order(x[r][2 * c], x[r][2 * c + 1], LaneNumbers<IntVec>{});
      float* to = acc + r * acc_stride + c * shorts;
      for (int i = 0; i < 2 && c * shorts + i * lanes < rest; ++i) {
        const Vec<float> sum = __builtin_convertvector(i ? sums.high : sums.low, Vec<float>) * unit[r].size;
        store(to + i * lanes, multiply_add(load(to + i * lanes), broadcast(factor[r]), sum));
      }
    }
  }
}

// The same for any number of queries and all `dim` elements of the values, with weights in fp32, followed by zeros up to
// a whole vector. Prefetches `count` rows of `next`.
inline void int8_add_values(
    float* acc, int64_t acc_stride, const float* factor, const float* weights, int64_t num_queries,
    const int8_t* values, int64_t dim, int count, const int8_t* next, int64_t next_dim) {
  constexpr int most = kDecodeQueries<float>, shorts = kLanes<int16_t>;
  const int64_t turns = (num_queries + most - 1) / most;
  Prefetch prefetch{reinterpret_cast<const char*>(next), 0};
  for (int64_t q = 0; q < num_queries; q += most, weights += most * kDecodeBlock) {
    with_queries<float>(num_queries - q, [&](auto n) {
      constexpr int fitting = SINKATTN_VECTOR_REGISTERS / 4 / (n == 3 ? 4 : n), vectors = fitting > 4 ? 4 : fitting;
      alignas(64) int16_t rounded[n * kDecodeBlock];
      Unit unit[n];
      for (int r = 0; r < n; ++r) {
        unit[r] = unit_of(weights + r * kDecodeBlock, count);
        round_to_int16(rounded + r * kDecodeBlock, weights + r * kDecodeBlock, count, unit[r]);
      }
      const auto add = [&](auto width, int64_t d) {
        constexpr int bytes = 2 * width * shorts;
        prefetch.step = std::min<int64_t>(bytes, 2 * (dim - d)) * next_dim / (dim * turns);
        int8_add_values_tile<n, width, bytes>(
            acc + q * acc_stride + d, acc_stride, factor + q, unit, rounded, values + d, dim, count, dim - d, prefetch);
      };
      int64_t d = 0;
      for (; d + vectors * shorts <= dim; d += vectors * shorts) add(std::integral_constant<int, vectors>(), d);
      for (; d < dim; d += shorts) add(std::integral_constant<int, 1>(), d);
    });
  }
}
#endif

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
