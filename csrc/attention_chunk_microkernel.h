// Inner loops of prefill: many queries with one block of keys and values that is packed once for all of them (as in
// GEMM). This is the version for vector registers; attention_chunk_microkernel_amx.h specialises it for bfloat16 on
// AMX. Included by attention_kernel.h and attention_chunk.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rotary.h"
#include "simd.h"
#include "simd_math.h"

namespace sinkattn {
namespace SINKATTN_ISA {

// Register tile: rows x vectors of accumulators.
constexpr int kRegisterRows = 6;
constexpr int kRegisterVectors = SINKATTN_VECTOR_REGISTERS >= 32 ? 4 : 2;

// c += a x b, for kRows rows of `a` and kVectors vectors of columns of `b`. Element (m, k) of `a` is
// a[m * a_stride + k * a_step].
template <int kVectors, int kRows, typename acc_t>
SINKATTN_INLINE void multiply_register_tile(
    Vec<acc_t> (&c)[kRows][kVectors], const acc_t* a, int64_t a_stride, const acc_t* b, int64_t b_stride,
    int64_t depth, int64_t a_step) {
  using V = Vec<acc_t>;
  for (int64_t k = 0; k < depth; ++k) {
    V x[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) x[n] = load(b + k * b_stride + n * kLanes<acc_t>);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const V y = broadcast(a[m * a_stride + k * a_step]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) c[m][n] = multiply_add(y, x[n], c[m][n]);
    }
  }
}

// c = factor * c + a x b, or c = a x b if `factor` is null, for kRows rows and `columns` columns, a multiple of the
// vector lanes.
template <int kVectors, int kRows, typename acc_t>
SINKATTN_INLINE void multiply(
    acc_t* c, int64_t c_stride, const acc_t* factor, const acc_t* a, int64_t a_stride, const acc_t* b,
    int64_t b_stride, int64_t depth, int64_t columns, int64_t a_step = 1) {
  using V = Vec<acc_t>;
  constexpr int width = kVectors * kLanes<acc_t>;
  int64_t n = 0;
  for (; n + width <= columns; n += width) {
    V tile[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        tile[r][v] = factor ? load(c + r * c_stride + n + v * kLanes<acc_t>) * factor[r] : V{};
      }
    }
    multiply_register_tile<kVectors, kRows>(tile, a, a_stride, b + n, b_stride, depth, a_step);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + n + v * kLanes<acc_t>, tile[r][v]);
    }
  }
  if constexpr (kVectors > 1) {
    if (n < columns) {
      multiply<1, kRows>(c + n, c_stride, factor, a, a_stride, b + n, b_stride, depth, columns - n, a_step);
    }
  }
}

// Packs queries, keys and values and multiplies them.
template <typename scalar_t>
struct ChunkMicrokernel {
  using acc_t = typename Accumulate<scalar_t>::type;
  using packed_t = acc_t;
  static constexpr int kVectorLanes = kLanes<acc_t>;
  static constexpr int kQueries = kRegisterRows;  // queries of a tile
  static constexpr int kKeys = 64;                // keys of a block
  static constexpr int64_t kItemQueries = 256;    // queries of a work item, which share packed blocks

  // RAII guard for the AMX tile configuration of a thread; no-op here.
  struct TileConfig {
    TileConfig() {}
  };

  // Elements of a packed query, a packed block of keys and a packed block of values.
  static int64_t query_size(int64_t dim) { return round_up(dim, kVectorLanes); }
  static int64_t keys_size(int64_t dim) { return kKeys * round_up(dim, kVectorLanes); }
  static int64_t values_size(int64_t dim) { return kKeys * round_up(dim, kVectorLanes); }

  // `scale` is unused here: `scores` applies it. The AMX version multiplies queries by it before it rounds them.
  static void pack_query(packed_t* packed, const acc_t* query, int64_t dim, acc_t /*scale*/) {
    std::copy(query, query + dim, packed);
    std::fill(packed + dim, packed + query_size(dim), acc_t{0});
  }

  // Transposed: packed[d * kKeys + j] is element d of key j.
  template <typename stored_t>
  static void pack_keys(packed_t* packed, const stored_t* keys, int64_t dim, int count) {
    for (int64_t d = 0; d < dim; d += kVectorLanes) {
      for (int j = 0; j < count; j += kVectorLanes) {
        Vec<acc_t> square[kVectorLanes] = {};
        for (int i = 0; i < kVectorLanes && j + i < count; ++i) {
          const stored_t* from = keys + (j + i) * dim + d;
          square[i] = d + kVectorLanes <= dim ? load(from) : load_first(from, dim - d);
        }
        transpose(square);
        for (int i = 0; i < kVectorLanes; ++i) store(packed + (d + i) * kKeys + j, square[i]);
      }
    }
  }

  // Converted to acc_t, rows padded with zeros. Returns whether all values are finite.
  template <typename stored_t>
  static bool pack_values(packed_t* packed, const stored_t* values, int64_t dim, int count) {
    Vec<acc_t> nonfinite{};
    for (int j = 0; j < count; ++j) {
      for (int64_t d = 0; d < dim; d += kVectorLanes) {
        const stored_t* from = values + j * dim + d;
        const Vec<acc_t> x = d + kVectorLanes <= dim ? load(from) : load_first(from, dim - d);
        store(packed + j * round_up(dim, kVectorLanes) + d, x);
        nonfinite += x * acc_t{0};
      }
    }
    return reduce_sum(nonfinite) == 0;
  }

  // scores[r * kKeys + j]: scaled dot product of query r and key j, for kQueries queries and `count` keys.
  static void scores(
      acc_t* scores, acc_t scale, const packed_t* queries, const packed_t* keys, int64_t dim, int count) {
    const int64_t columns = round_up(count, kVectorLanes);
    multiply<kRegisterVectors, kRegisterRows, acc_t>(
        scores, kKeys, nullptr, queries, query_size(dim), keys, kKeys, dim, columns);
    for (int r = 0; r < kQueries; ++r) {
      for (acc_t* x = scores + r * kKeys; x < scores + r * kKeys + columns; x += kVectorLanes) {
        store(x, load(x) * scale);
      }
    }
  }

  // acc = factor * acc + weights x values, for kQueries rows weights[r * kKeys + j], j < count. Weights from `count` up
  // to a whole vector are zero.
  static void add_values(
      acc_t* acc, const acc_t* factor, const acc_t* weights, const packed_t* values, int64_t dim, int count) {
    const int64_t stride = round_up(dim, kVectorLanes);
    multiply<kRegisterVectors, kRegisterRows, acc_t>(
        acc, stride, factor, weights, kKeys, values, stride, count, stride);
  }
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
