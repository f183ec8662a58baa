// Inner loops of prefill for bfloat16 on AMX, the matrix unit of x86-64: tiles of 16 rows of 64 bytes, accumulation in
// fp32. Included by attention_kernel.h when it is compiled for AMX.
//
// The right operand of a tile product is stored as pairs: elements 2k and 2k + 1 of a column lie side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention_chunk_microkernel.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kTileRows = 16;
constexpr int kTilePairs = 16;              // pairs of bfloat16 in a row of a tile
constexpr int kTileDepth = 2 * kTilePairs;  // elements of the inner dimension of one tile product

template <>
struct ChunkMicrokernel<BFloat16> {
  using acc_t = float;
  using packed_t = BFloat16;
  static constexpr int kQueries = 2 * kTileRows;
  static constexpr int kKeys = 128;
  static constexpr int64_t kItemQueries = 512;

  struct TileConfig {
    TileConfig() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } tiles;
      _tile_loadconfig(&tiles);
    }
    ~TileConfig() { _tile_release(); }
    TileConfig(const TileConfig&) = delete;
    TileConfig& operator=(const TileConfig&) = delete;
  };

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
          square[i] = load_row(keys + (j + i) * dim + d, std::min<int64_t>(kTileDepth, dim - d));
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
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
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
  // `count` elements in a row of a tile, then zeros. Elements of 8 bits are exact in bfloat16.
  static WideBits load_row(const BFloat16* from, int64_t count) {
    WideBits row{};
    if (count == kTileDepth) std::memcpy(&row, from, sizeof row);
    else std::memcpy(&row, from, count * sizeof(BFloat16));
    return row;
  }
  template <typename stored_t>
  static WideBits load_row(const stored_t* from, int64_t count) {
    stored_t padded[kTileDepth] = {};
    if (count < kTileDepth) {
      std::memcpy(padded, from, count * sizeof(stored_t));
      from = padded;
    }
    return bit_cast<WideBits>(_mm512_cvtne2ps_pbh((__m512)load(from + kTileRows), (__m512)load(from)));
  }

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
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (add) {
        _tile_loadd(0, c + n, c_bytes);
        _tile_loadd(1, c + n + kTileRows, c_bytes);
        _tile_loadd(2, c_lower + n, c_bytes);
        _tile_loadd(3, c_lower + n + kTileRows, c_bytes);
      }
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        const packed_t* right = b + (k / 2 * b_stride + n) * 2;
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(5, a_lower + k, a_bytes);
        _tile_loadd(6, right, b_bytes);
        _tile_loadd(7, right + 2 * kTileRows, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c + n, c_bytes);
      _tile_stored(1, c + n + kTileRows, c_bytes);
      _tile_stored(2, c_lower + n, c_bytes);
      _tile_stored(3, c_lower + n + kTileRows, c_bytes);
    }
    if (n == columns) return;
    _tile_zero(0);
    _tile_zero(2);
    if (add) {
      _tile_loadd(0, c + n, c_bytes);
      _tile_loadd(2, c_lower + n, c_bytes);
    }
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(5, a_lower + k, a_bytes);
      _tile_loadd(6, b + (k / 2 * b_stride + n) * 2, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, c + n, c_bytes);
    _tile_stored(2, c_lower + n, c_bytes);
  }
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
