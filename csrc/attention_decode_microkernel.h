// A few queries against keys and values as they lie in the cache: one pass for each token of the call, and what
// comes next is fetched ahead.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kDirectBlock = 64;  // keys whose scores are held at once; their values are fetched meanwhile

// Queries that go through the registers together, at most.
template <typename acc_t>
constexpr int kDirectRows = kLanes<acc_t> < 4 ? kLanes<acc_t> : 4;

// Scaled scores of kRows queries against up to kDirectBlock keys as they lie in the cache; `ahead` is memory to be
// read next, as many rows.
template <int kRows, typename scalar_t, typename acc_t>
SINKATTN_INLINE void direct_scores(
    acc_t* scores, acc_t scale, const acc_t* query, int64_t query_stride, const scalar_t* keys, int64_t dim, int count,
    const scalar_t* ahead, int64_t ahead_stride) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  constexpr int padded_rows = kRows == 3 ? 4 : kRows;
  constexpr int step = lanes / padded_rows;  // keys at a time, so that their sums fill one vector
  const int64_t whole = dim / lanes * lanes;
  for (int j = 0; j < count; j += step) {
    const scalar_t* key[step];
    for (int c = 0; c < step; ++c) key[c] = keys + std::min(j + c, count - 1) * dim;
    V partial[lanes] = {};
    for (int64_t d = 0; d < whole; d += lanes) {
      V q[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) q[r] = load(query + r * query_stride + d);
#pragma GCC unroll 16
      for (int c = 0; c < step; ++c) {
        const V k = load(key[c] + d);
        // Line by line as they lie, which is what the processor's own prefetching follows.
        const int64_t next = d * step + c * lanes;
        if (next * sizeof(scalar_t) % 64 == 0) __builtin_prefetch(ahead + j * ahead_stride + next, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) partial[r * step + c] = multiply_add(q[r], k, partial[r * step + c]);
      }
    }
    if (whole < dim) {
      for (int c = 0; c < step; ++c) {
        const V k = load_first(key[c] + whole, dim - whole);
        for (int r = 0; r < kRows; ++r) {
          partial[r * step + c] = multiply_add(load(query + r * query_stride + whole), k, partial[r * step + c]);
        }
      }
    }
    acc_t all[lanes];
    store(all, sums<lanes>(partial) * scale);
    for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kDirectBlock + j, all + r * step, step * sizeof(acc_t));
  }
}

// sums = factor * sums + weights times values for kRows queries and kVectors vectors of the values' elements; of the
// only vector just `part` elements if that is not 0.
template <int kRows, int kVectors, typename scalar_t, typename acc_t>
SINKATTN_INLINE void direct_sum_vectors(
    acc_t* sums, int64_t sums_stride, const acc_t* factor, const acc_t* weights, const scalar_t* values, int64_t dim,
    int count, const scalar_t* ahead, int64_t part = 0) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  V x[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) x[r][c] = load(sums + r * sums_stride + c * lanes) * factor[r];
  }
  for (int j = 0; j < count; ++j) {
    for (unsigned d = 0; d < kVectors * lanes; d += 64 / sizeof(scalar_t)) {
      __builtin_prefetch(ahead + j * kVectors * lanes + d, 0, 2);
    }
    V v[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      const scalar_t* from = values + j * dim + c * lanes;
      v[c] = part ? load_first(from, part) : load(from);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V w = broadcast(weights[r * kDirectBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) x[r][c] = multiply_add(w, v[c], x[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(sums + r * sums_stride + c * lanes, x[r][c]);
  }
}

template <int kRows, typename scalar_t, typename acc_t>
SINKATTN_INLINE void direct_sum(
    acc_t* sums, int64_t sums_stride, const acc_t* factor, const acc_t* weights, const scalar_t* values, int64_t dim,
    int count, const scalar_t* ahead) {
  constexpr int lanes = kLanes<acc_t>;
  constexpr int fitting = SINKATTN_VECTOR_REGISTERS / 2 / (kRows == 3 ? 4 : kRows);
  constexpr int vectors = fitting > 8 ? 8 : fitting;
  int64_t d = 0;
  for (; d + vectors * lanes <= dim; d += vectors * lanes) {
    direct_sum_vectors<kRows, vectors>(
        sums + d, sums_stride, factor, weights, values + d, dim, count, ahead + d * count);
  }
  for (; d + lanes <= dim; d += lanes) {
    direct_sum_vectors<kRows, 1>(
        sums + d, sums_stride, factor, weights, values + d, dim, count, ahead + d * count);
  }
  if (d < dim) {
    direct_sum_vectors<kRows, 1>(
        sums + d, sums_stride, factor, weights, values + d, dim, count, ahead + d * count, dim - d);
  }
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
