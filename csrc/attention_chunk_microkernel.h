// Many queries against one block of keys and values, which is packed once for all of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rotary.h"
#include "simd.h"
#include "simd_math.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kPackedRows = 6;
constexpr int kPackedVectors = SINKATTN_VECTOR_REGISTERS >= 32 ? 4 : 2;

// c += a times b, for kPackedRows rows of `a` and kVectors vectors of columns of `b`.
template <int kVectors, typename acc_t>
SINKATTN_INLINE void multiply_tile(
    Vec<acc_t> (&c)[kPackedRows][kVectors], const acc_t* a, int64_t a_stride, const acc_t* b, int64_t b_stride,
    int64_t depth) {
  using V = Vec<acc_t>;
  for (int64_t k = 0; k < depth; ++k) {
    V x[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) x[n] = load(b + k * b_stride + n * kLanes<acc_t>);
#pragma GCC unroll 6
    for (int m = 0; m < kPackedRows; ++m) {
      const V y = broadcast(a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) c[m][n] = multiply_add(y, x[n], c[m][n]);
    }
  }
}

// c = factor * c + a times b, or a times b without factors; `columns`, a multiple of the lanes, wide.
template <int kVectors = kPackedVectors, typename acc_t>
SINKATTN_INLINE void multiply(
    acc_t* c, int64_t c_stride, const acc_t* factor, const acc_t* a, int64_t a_stride, const acc_t* b,
    int64_t b_stride, int64_t depth, int64_t columns) {
  using V = Vec<acc_t>;
  constexpr int width = kVectors * kLanes<acc_t>;
  int64_t n = 0;
  for (; n + width <= columns; n += width) {
    V tile[kPackedRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kPackedRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        tile[r][v] = factor ? load(c + r * c_stride + n + v * kLanes<acc_t>) * factor[r] : V{};
      }
    }
    multiply_tile<kVectors>(tile, a, a_stride, b + n, b_stride, depth);
#pragma GCC unroll 6
    for (int r = 0; r < kPackedRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + n + v * kLanes<acc_t>, tile[r][v]);
    }
  }
  if constexpr (kVectors > 1) {
    if (n < columns) multiply<1>(c + n, c_stride, factor, a, a_stride, b + n, b_stride, depth, columns - n);
  }
}

// Blocks of keys and values in the form in which matrix products take them, here for vector registers. Specialised for
// processors that multiply matrices (attention_chunk_microkernel_amx.h).
template <typename scalar_t>
struct Packed {
  using acc_t = typename Accumulate<scalar_t>::type;
  using element = acc_t;
  static constexpr int kLanesOf = kLanes<acc_t>;
  static constexpr int kRows = kPackedRows;  // queries of a tile
  static constexpr int kKeys = 64;           // keys of a block
  static constexpr int64_t kItemRows = 256;  // queries that share a packed block

  // Lives while a thread multiplies: what the processor must be told before, and cleared of afterwards.
  struct Session {
    Session() {}
  };

  // Elements of a packed query, of a block of keys and of a block of values.
  static int64_t query_size(int64_t dim) { return round_up(dim, kLanesOf); }
  static int64_t keys_size(int64_t dim) { return kKeys * round_up(dim, kLanesOf); }
  static int64_t values_size(int64_t dim) { return kKeys * round_up(dim, kLanesOf); }

  // The scale is for those who round queries: they have to take it in before.
  static void pack_query(element* packed, const acc_t* query, int64_t dim, acc_t /*scale*/) {
    std::copy(query, query + dim, packed);
    std::fill(packed + dim, packed + query_size(dim), acc_t{0});
  }

  // Transposed: packed[d * kKeys + j] is element d of key j.
  static void pack_keys(element* packed, const scalar_t* keys, int64_t dim, int count) {
    for (int64_t d = 0; d < dim; d += kLanesOf) {
      for (int j = 0; j < count; j += kLanesOf) {
        Vec<acc_t> square[kLanesOf] = {};
        for (int i = 0; i < kLanesOf && j + i < count; ++i) {
          const scalar_t* from = keys + (j + i) * dim + d;
          square[i] = d + kLanesOf <= dim ? load(from) : load_first(from, dim - d);
        }
        transpose(square);
        for (int i = 0; i < kLanesOf; ++i) store(packed + (d + i) * kKeys + j, square[i]);
      }
    }
  }

  // Widened, rows padded with zeros; returns whether all are finite.
  static bool pack_values(element* packed, const scalar_t* values, int64_t dim, int count) {
    Vec<acc_t> spoiled{};
    for (int j = 0; j < count; ++j) {
      for (int64_t d = 0; d < dim; d += kLanesOf) {
        const scalar_t* from = values + j * dim + d;
        const Vec<acc_t> x = d + kLanesOf <= dim ? load(from) : load_first(from, dim - d);
        store(packed + j * round_up(dim, kLanesOf) + d, x);
        spoiled += x * acc_t{0};
      }
    }
    return sum(spoiled) == 0;
  }

  // scores[r * kKeys + j] of query r and key j, scaled, for kRows queries and `count` keys.
  static void scores(acc_t* scores, acc_t scale, const element* queries, const element* keys, int64_t dim, int count) {
    const int64_t columns = round_up(count, kLanesOf);
    multiply<kPackedVectors, acc_t>(
        scores, kKeys, nullptr, queries, query_size(dim), keys, kKeys, dim, columns);
    for (int r = 0; r < kRows; ++r) {
      for (acc_t* x = scores + r * kKeys; x < scores + r * kKeys + columns; x += kLanesOf) store(x, load(x) * scale);
    }
  }

  // sums = factor * sums + weights times values, for kRows rows of weights[r * kKeys + j]; beyond `count` they are zero
  // up to a whole vector.
  static void add_values(
      acc_t* sums, const acc_t* factor, const acc_t* weights, const element* values, int64_t dim, int count) {
    const int64_t stride = round_up(dim, kLanesOf);
    multiply<kPackedVectors, acc_t>(sums, stride, factor, weights, kKeys, values, stride, count, stride);
  }
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
