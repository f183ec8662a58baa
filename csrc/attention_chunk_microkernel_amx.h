// Inner loops of prefill for bfloat16 on AMX. Included by attention_kernel.h when it is compiled for AMX.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "attention_chunk_microkernel.h"

namespace sinkattn {
namespace SINKATTN_ISA {

template <>
struct ChunkMicrokernel<BFloat16> {
  using acc_t = float;
  using packed_t = BFloat16;
  static constexpr int kQueries = 2 * kTileRows;
  static constexpr int kKeys = 128;
  static constexpr int64_t kItemQueries = 512;

  using TileConfig = TileRegisters;

  static int64_t query_size(int64_t dim) { return round_up(dim, kTileDepth); }
  static int64_t keys_size(int64_t dim) { return kKeys * round_up(dim, kTileDepth); }
  static int64_t values_size(int64_t dim) { return kKeys * round_up(dim, kTileRows); }

  static void pack_query(packed_t* packed, const float* query, int64_t dim, float scale) {
    int64_t d = 0;
    for (; d + kTileRows <= dim; d += kTileRows) store(packed + d, load(query + d) * scale);
    for (; d < dim; ++d) packed[d] = BFloat16(query[d] * scale);
    std::fill(packed + dim, packed + query_size(dim), BFloat16(0.0f));
  }

  // Transposed by pairs: packed[(d / 2 * kKeys + j) * 2 + d % 2] is element d of key j, or zero if there is none.
  template <typename stored_t>
  static void pack_keys(packed_t* packed, const stored_t* keys, int64_t dim, int count) {
    for (int64_t d = 0; d < dim; d += kTileDepth) {
      for (int j = 0; j < count; j += kTileRows) {
        WideBits square[kTileRows] = {};
        for (int i = 0; i < kTileRows && j + i < count; ++i) {
          square[i] = load_tile_row(keys + (j + i) * dim + d, std::min<int64_t>(kTileDepth, dim - d));
        }
        transpose(square);
        for (int i = 0; i < kTileRows; ++i) {
          std::memcpy(packed + ((d / 2 + i) * kKeys + j) * 2, &square[i], sizeof square[i]);
        }
      }
    }
  }

  // Rows interleaved by pairs: packed[(j / 2 * width + d) * 2 + j % 2] is element d of value j, or zero beyond dim or
  // beyond count, up to a multiple of kTileDepth. Returns whether all values are finite.
  template <typename stored_t>
  static bool pack_values(packed_t* packed, const stored_t* values, int64_t dim, int count) {
    const int64_t width = round_up(dim, kTileRows);
    Vec<float> nonfinite{};
    for (int j = 0; j < round_up(count, kTileDepth); j += 2) {
      for (int64_t d = 0; d < dim; d += kTileRows) {
        Vec<float> row[2] = {};
        for (int i = 0; i < 2 && j + i < count; ++i) {
          const stored_t* from = values + (j + i) * dim + d;
          row[i] = d + kTileRows <= dim ? load(from) : load_first(from, dim - d);
          nonfinite += row[i] * 0.0f;
        }
        const WideBits interleaved = bit_cast<WideBits>(row[0]) >> 16 | bit_cast<WideBits>(row[1]);
        std::memcpy(packed + (j / 2 * width + d) * 2, &interleaved, sizeof interleaved);
      }
    }
    return reduce_sum(nonfinite) == 0;
  }

  static void scores(
      float* scores, float /*scale*/, const packed_t* queries, const packed_t* keys, int64_t dim, int count) {
    multiply_tiles(
        scores, kKeys, false, queries, query_size(dim), keys, kKeys, query_size(dim), round_up(count, kTileRows));
  }

  // Rounds the weights to bfloat16, as PyTorch does in bfloat16 attention.
  static void add_values(
      float* acc, const float* factor, const float* weights, const packed_t* values, int64_t dim, int count) {
    const int64_t width = round_up(dim, kTileRows), depth = round_up(count, kTileDepth);
    alignas(64) BFloat16 rounded[kQueries * kKeys];
    for (int r = 0; r < kQueries; ++r) {
      for (int64_t j = 0; j < depth; j += kTileDepth) {
        const float* from = weights + r * kKeys + j;
        const Vec<float> low = load(from), high = j + kTileRows < count ? load(from + kTileRows) : Vec<float>{};
        const WideBits both = round_to_bf16(low, high);
        std::memcpy(rounded + r * kKeys + j, &both, sizeof both);
      }
      if (factor[r] == 1) continue;
      for (int64_t d = 0; d < width; d += kTileRows) {
        store(acc + r * width + d, load(acc + r * width + d) * factor[r]);
      }
    }
    multiply_tiles(acc, width, true, rounded, kKeys, values, width, depth, width);
  }

 private:
  // c += a x b if `add`, else c = a x b, for kQueries rows and `columns` columns, a multiple of 16.
  static void multiply_tiles(
      float* c, int64_t c_stride, bool add, const packed_t* a, int64_t a_stride, const packed_t* b, int64_t b_stride,
      int64_t depth, int64_t columns) {
    const int64_t c_bytes = c_stride * sizeof(float), a_bytes = a_stride * sizeof(packed_t);
    const int64_t b_bytes = 2 * b_stride * sizeof(packed_t);
    float* const c_lower = c + kTileRows * c_stride;
    const packed_t* const a_lower = a + kTileRows * a_stride;
    int64_t n = 0;
    for (; n + 2 * kTileRows <= columns; n += 2 * kTileRows) {
      Tile<0>::zero();
      Tile<1>::zero();
      Tile<2>::zero();
      Tile<3>::zero();
      if (add) {
        Tile<0>::load(c + n, c_bytes);
        Tile<1>::load(c + n + kTileRows, c_bytes);
        Tile<2>::load(c_lower + n, c_bytes);
        Tile<3>::load(c_lower + n + kTileRows, c_bytes);
      }
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        const packed_t* right = b + (k / 2 * b_stride + n) * 2;
        Tile<4>::load(a + k, a_bytes);
        Tile<5>::load(a_lower + k, a_bytes);
        Tile<6>::load(right, b_bytes);
        Tile<7>::load(right + 2 * kTileRows, b_bytes);
        add_product_bf16<0, 4, 6>();
        add_product_bf16<1, 4, 7>();
        add_product_bf16<2, 5, 6>();
        add_product_bf16<3, 5, 7>();
      }
      Tile<0>::store(c + n, c_bytes);
      Tile<1>::store(c + n + kTileRows, c_bytes);
      Tile<2>::store(c_lower + n, c_bytes);
      Tile<3>::store(c_lower + n + kTileRows, c_bytes);
    }
    if (n == columns) return;
    Tile<0>::zero();
    Tile<2>::zero();
    if (add) {
      Tile<0>::load(c + n, c_bytes);
      Tile<2>::load(c_lower + n, c_bytes);
    }
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      Tile<4>::load(a + k, a_bytes);
      Tile<5>::load(a_lower + k, a_bytes);
      Tile<6>::load(b + (k / 2 * b_stride + n) * 2, b_bytes);
      add_product_bf16<0, 4, 6>();
      add_product_bf16<2, 5, 6>();
    }
    Tile<0>::store(c + n, c_bytes);
    Tile<2>::store(c_lower + n, c_bytes);
  }
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
