// Inner loops of decoding: a few queries with keys and values as they lie in the cache, software-prefetched.
// Included by attention_decode.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kDecodeBlock = 64;  // keys of a block; their values are prefetched while scores are computed

// Most queries that share one load of a key or value.
template <typename acc_t>
constexpr int kDecodeQueries = kLanes<acc_t> < 4 ? kLanes<acc_t> : 4;

// scores[q * kDecodeBlock + j]: scaled dot products of kQueries queries with keys j < count <= kDecodeBlock. Prefetches
// `count` rows of `prefetch`, the memory that is read next.
template <int kQueries, typename scalar_t, typename acc_t>
SINKATTN_INLINE void decode_scores(
    acc_t* scores, acc_t scale, const acc_t* query, int64_t query_stride, const scalar_t* keys, int64_t dim, int count,
    const scalar_t* prefetch, int64_t prefetch_stride) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  constexpr int padded_queries = kQueries == 3 ? 4 : kQueries;
  constexpr int step = lanes / padded_queries;  // keys at a time: their scores fill one vector
  const int64_t full_dim = dim / lanes * lanes;
  for (int j = 0; j < count; j += step) {
    const scalar_t* key[step];
    for (int c = 0; c < step; ++c) key[c] = keys + std::min(j + c, count - 1) * dim;
    V partial[lanes] = {};
    for (int64_t d = 0; d < full_dim; d += lanes) {
      V q[kQueries];
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) q[r] = load(query + r * query_stride + d);
#pragma GCC unroll 16
      for (int c = 0; c < step; ++c) {
        const V k = load(key[c] + d);
        // One prefetch per 64-byte line, in address order, as hardware prefetchers expect.
        const int64_t next = d * step + c * lanes;
        if (next * sizeof(scalar_t) % 64 == 0) __builtin_prefetch(prefetch + j * prefetch_stride + next, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < kQueries; ++r) partial[r * step + c] = multiply_add(q[r], k, partial[r * step + c]);
      }
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

// acc = factor * acc + weights x values, for kQueries queries and kVectors vectors of value elements. If partial_lanes
// is not 0, kVectors is 1 and only that many elements of the vector are read.
template <int kQueries, int kVectors, typename scalar_t, typename acc_t>
SINKATTN_INLINE void decode_add_values_tile(
    acc_t* acc, int64_t acc_stride, const acc_t* factor, const acc_t* weights, const scalar_t* values, int64_t dim,
    int count, const scalar_t* prefetch, int64_t partial_lanes = 0) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  V x[kQueries][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) x[r][c] = load(acc + r * acc_stride + c * lanes) * factor[r];
  }
  for (int j = 0; j < count; ++j) {
    for (unsigned d = 0; d < kVectors * lanes; d += 64 / sizeof(scalar_t)) {
      __builtin_prefetch(prefetch + j * kVectors * lanes + d, 0, 2);
    }
    V v[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      const scalar_t* from = values + j * dim + c * lanes;
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
  int64_t d = 0;
  for (; d + vectors * lanes <= dim; d += vectors * lanes) {
    decode_add_values_tile<kQueries, vectors>(
        acc + d, acc_stride, factor, weights, values + d, dim, count, prefetch + d * count);
  }
  for (; d + lanes <= dim; d += lanes) {
    decode_add_values_tile<kQueries, 1>(
        acc + d, acc_stride, factor, weights, values + d, dim, count, prefetch + d * count);
  }
  if (d < dim) {
    decode_add_values_tile<kQueries, 1>(
        acc + d, acc_stride, factor, weights, values + d, dim, count, prefetch + d * count, dim - d);
  }
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
