// Inner loops of decoding in floating point: a few queries with keys and values as they lie in the cache, software-
// prefetched. Included by attention_decode_microkernel.h.
//
// Up to kDecodeQueries queries load keys and values straight from the cache, converting them in registers. More queries
// take turns over so few keys, or parts of values, that these are in the L1 cache then; 16-bit ones are converted once
// for all turns (staged).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kDecodeBlock = 64;  // most keys of a block; their values are prefetched while scores are computed

// Most queries that share one load of a key or value into a register.
template <typename acc_t>
constexpr int kDecodeQueries = kLanes<acc_t> < 4 ? kLanes<acc_t> : 4;

// Keys at a time: their scores with so many queries fill one vector.
template <int kQueries, typename acc_t>
constexpr int kDecodeKeys = kLanes<acc_t> / (kQueries == 3 ? 4 : kQueries);

// Most queries that use a block before the next block is read: a whole number of times as many.
constexpr int kDecodeShared = 32;

constexpr int kStagedKeys = 16;                                // keys that more queries take turns over
constexpr int kStagedVectors = SINKATTN_VECTOR_REGISTERS / 8;  // vectors of each value, likewise

// Bytes of memory that staging needs.
template <typename acc_t>
int64_t decode_staging_size(int64_t query_stride) {
  return std::max<int64_t>(kStagedKeys * query_stride, kDecodeBlock * kStagedVectors * kLanes<acc_t>) * sizeof(acc_t);
}

// Memory that is read next. It is prefetched in address order, as hardware prefetchers expect, and little by little,
// since prefetches that wait for memory hold up loads.
struct Prefetch {
  const char* next;
  int64_t step;  // bytes per advance()

  // Part `i` of kParts of what comes before advance(). kBytes: the most that `step` is.
  template <int kBytes, int kParts>
  SINKATTN_INLINE void part(int i) const {
    if constexpr (kBytes > 0) {
#pragma GCC unroll 16
      for (int byte = 0; byte < kBytes; byte += 64) {
        if (byte * kParts / kBytes == i && (byte == 0 || byte < step)) __builtin_prefetch(next + byte, 0, 2);
      }
    }
  }
  SINKATTN_INLINE void advance() { next += step; }
};

// Calls body(std::integral_constant<int, n>()) with n = min(count, kDecodeQueries).
template <typename acc_t, typename Body>
SINKATTN_INLINE void with_queries(int64_t count, const Body& body) {
  constexpr int most = kDecodeQueries<acc_t>;
  switch (std::min<int64_t>(count, most)) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, std::min(most, 3)>());
    case 4: return body(std::integral_constant<int, most>());
  }
}

// Copies `rows` rows of `columns` elements, converted and padded with zeros to whole vectors.
template <typename scalar_t, typename acc_t>
SINKATTN_INLINE void stage(
    acc_t* to, int64_t to_stride, const scalar_t* from, int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr int lanes = kLanes<acc_t>;
  for (int64_t j = 0; j < rows; ++j, to += to_stride, from += from_stride) {
    int64_t d = 0;
    for (; d + lanes <= columns; d += lanes) store(to + d, load(from + d));
    if (d < columns) store(to + d, load_first(from + d, columns - d));
  }
}

// scores[q * kDecodeBlock + j]: scaled dot products of kQueries queries with keys j < count <= kDecodeBlock. Advances
// `prefetch` by up to kPrefetchBytes for every vector of the keys that it takes at a time.
template <int kQueries, int kPrefetchBytes, typename scalar_t, typename acc_t>
SINKATTN_INLINE void decode_scores(
    acc_t* scores, acc_t scale, const acc_t* query, int64_t query_stride, const scalar_t* keys, int64_t dim, int count,
    Prefetch& prefetch) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  constexpr int step = kDecodeKeys<kQueries, acc_t>;
  const int64_t full_dim = dim / lanes * lanes;
  for (int j = 0; j < count; j += step) {
    const scalar_t* key[step];
    for (int c = 0; c < step; ++c) key[c] = keys + std::min(j + c, count - 1) * dim;
    // All loops over it are unrolled, for it to be in registers.
    V partial[lanes] = {};
    for (int64_t d = 0; d < full_dim; d += lanes) {
      V q[kQueries];
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) q[r] = load(query + r * query_stride + d);
#pragma GCC unroll 16
      for (int c = 0; c < step; ++c) {
        const V k = load(key[c] + d);
        prefetch.part<kPrefetchBytes, step>(c);
#pragma GCC unroll 4
        for (int r = 0; r < kQueries; ++r) partial[r * step + c] = multiply_add(q[r], k, partial[r * step + c]);
      }
      prefetch.advance();
    }
    if (full_dim < dim) {
#pragma GCC unroll 16
      for (int c = 0; c < step; ++c) {
        const V k = load_first(key[c] + full_dim, dim - full_dim);
#pragma GCC unroll 4
        for (int r = 0; r < kQueries; ++r) {
          partial[r * step + c] = multiply_add(load(query + r * query_stride + full_dim), k, partial[r * step + c]);
        }
      }
    }
    acc_t all[lanes];
    store(all, horizontal_sums<lanes>(partial) * scale);
    for (int r = 0; r < kQueries; ++r) std::memcpy(scores + r * kDecodeBlock + j, all + r * step, step * sizeof(acc_t));
  }
}

// The same for any number of queries. Prefetches `count` rows of `prefetch`.
template <typename scalar_t, typename acc_t>
SINKATTN_INLINE void decode_scores(
    acc_t* scores, acc_t scale, const acc_t* query, int64_t query_stride, int64_t num_queries, const scalar_t* keys,
    int64_t dim, int count, acc_t* staging, const scalar_t* prefetch, int64_t prefetch_stride) {
  constexpr int most = kDecodeQueries<acc_t>, lanes = kLanes<acc_t>;
  // Bytes of the rows to prefetch, for each key and vector.
  const int64_t bytes = prefetch_stride * int64_t{sizeof(scalar_t)} / std::max<int64_t>(1, dim / lanes);
  if (num_queries <= most) {
    with_queries<acc_t>(num_queries, [&](auto n) {
      constexpr int keys_at_once = kDecodeKeys<n, acc_t>;
      Prefetch next{reinterpret_cast<const char*>(prefetch), keys_at_once * bytes};
      decode_scores<n, keys_at_once * lanes * int{sizeof(scalar_t)}>(
          scores, scale, query, query_stride, keys, dim, count, next);
    });
    return;
  }
  Prefetch next{reinterpret_cast<const char*>(prefetch), lanes * bytes / num_queries};
  for (int j = 0; j < count; j += kStagedKeys) {
    const int some = std::min(kStagedKeys, count - j);
    const auto take_turns = [&](const auto* from, int64_t from_dim) {
      for (int64_t q = 0; q < num_queries; q += most) {
        with_queries<acc_t>(num_queries - q, [&](auto n) {
          decode_scores<n, kDecodeKeys<most, acc_t> * lanes * int{sizeof(scalar_t)}>(
              scores + q * kDecodeBlock + j, scale, query + q * query_stride, query_stride, from, from_dim, some, next);
        });
      }
    };
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      take_turns(keys + j * dim, dim);
    } else {
      stage(staging, query_stride, keys + j * dim, dim, some, dim);
      take_turns(staging, query_stride);
    }
  }
}

// acc = factor * acc + weights x values, for kQueries queries and kVectors vectors of value elements. If partial_lanes
// is not 0, kVectors is 1 and only that many elements of the vector are read. Advances `prefetch` by up to kPrefetchBytes
// for every value.
template <int kQueries, int kVectors, int kPrefetchBytes, typename scalar_t, typename acc_t>
SINKATTN_INLINE void decode_add_values_tile(
    acc_t* acc, int64_t acc_stride, const acc_t* factor, const acc_t* weights, const scalar_t* values, int64_t stride,
    int count, Prefetch& prefetch, int64_t partial_lanes = 0) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  V x[kQueries][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) x[r][c] = load(acc + r * acc_stride + c * lanes) * factor[r];
  }
  for (int j = 0; j < count; ++j) {
    prefetch.part<kPrefetchBytes, 1>(0);
    prefetch.advance();
    V v[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      const scalar_t* from = values + j * stride + c * lanes;
      v[c] = partial_lanes ? load_first(from, partial_lanes) : load(from);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
      const V w = broadcast(weights[r * kDecodeBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) x[r][c] = multiply_add(w, v[c], x[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(acc + r * acc_stride + c * lanes, x[r][c]);
  }
}

// acc = factor * acc + weights x values, for kQueries queries and all `dim` elements of the values. Prefetches
// `count * dim` elements from `prefetch` on.
template <int kQueries, typename scalar_t, typename acc_t>
SINKATTN_INLINE void decode_add_values(
    acc_t* acc, int64_t acc_stride, const acc_t* factor, const acc_t* weights, const scalar_t* values, int64_t dim,
    int count, const scalar_t* prefetch) {
  constexpr int lanes = kLanes<acc_t>;
  constexpr int fitting = SINKATTN_VECTOR_REGISTERS / 2 / (kQueries == 3 ? 4 : kQueries);
  constexpr int vectors = fitting > 8 ? 8 : fitting;
  constexpr int bytes = lanes * sizeof(scalar_t);
  Prefetch next{reinterpret_cast<const char*>(prefetch), vectors * bytes};
  int64_t d = 0;
  for (; d + vectors * lanes <= dim; d += vectors * lanes) {
    decode_add_values_tile<kQueries, vectors, vectors * bytes>(
        acc + d, acc_stride, factor, weights, values + d, dim, count, next);
  }
  next.step = bytes;
  for (; d + lanes <= dim; d += lanes) {
    decode_add_values_tile<kQueries, 1, bytes>(acc + d, acc_stride, factor, weights, values + d, dim, count, next);
  }
  if (d < dim) {
    decode_add_values_tile<kQueries, 1, bytes>(
        acc + d, acc_stride, factor, weights, values + d, dim, count, next, dim - d);
  }
}

// The same for any number of queries.
template <typename scalar_t, typename acc_t>
SINKATTN_INLINE void decode_add_values(
    acc_t* acc, int64_t acc_stride, const acc_t* factor, const acc_t* weights, int64_t num_queries,
    const scalar_t* values, int64_t dim, int count, acc_t* staging, const scalar_t* prefetch) {
  constexpr int most = kDecodeQueries<acc_t>, lanes = kLanes<acc_t>;
  if (num_queries <= most) {
    with_queries<acc_t>(num_queries, [&](auto n) {
      decode_add_values<n>(acc, acc_stride, factor, weights, values, dim, count, prefetch);
    });
    return;
  }
  Prefetch next{reinterpret_cast<const char*>(prefetch), 0};
  const auto add = [&](auto vectors, int64_t d) {
    constexpr int64_t width = vectors * lanes;
    next.step = width * sizeof(scalar_t) * most / num_queries;
    const auto take_turns = [&](const auto* from, int64_t stride) {
      for (int64_t q = 0; q < num_queries; q += most) {
        with_queries<acc_t>(num_queries - q, [&](auto n) {
          decode_add_values_tile<n, vectors, width * int{sizeof(scalar_t)}>(
              acc + q * acc_stride + d, acc_stride, factor + q, weights + q * kDecodeBlock, from, stride, count, next);
        });
      }
    };
    if (std::is_same_v<scalar_t, acc_t> && d + width <= dim) {
      take_turns(values + d, dim);
    } else {
      stage(staging, width, values + d, dim, count, std::min(width, dim - d));
      take_turns(staging, width);
    }
  };
  int64_t d = 0;
  for (; d + kStagedVectors * lanes <= dim; d += kStagedVectors * lanes) {
    add(std::integral_constant<int, kStagedVectors>(), d);
  }
  for (; d < dim; d += lanes) add(std::integral_constant<int, 1>(), d);
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
