// Packed blocks of bfloat16 for the matrix unit of x86-64 (AMX): tiles of 16 rows of 64 bytes, products summed in fp32.
// The right operand of a product holds two rows in one: pairs of elements that follow each other down a column.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention_chunk_microkernel.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kTileRows = 16;
constexpr int kTilePairs = 16;              // pairs of bfloat16 in a row of a tile
constexpr int kTileDepth = 2 * kTilePairs;  // elements that one product sums over

template <>
struct Packed<BFloat16> {
  using acc_t = float;
  using element = BFloat16;
  static constexpr int kRows = 2 * kTileRows;
  static constexpr int kKeys = 128;
  static constexpr int64_t kItemRows = 512;

  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } tiles;
      _tile_loadconfig(&tiles);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static int64_t query_size(int64_t dim) { return round_up(dim, kTileDepth); }
  static int64_t keys_size(int64_t dim) { return kKeys * round_up(dim, kTileDepth); }
  static int64_t values_size(int64_t dim) { return kKeys * round_up(dim, kTileRows); }

  static void pack_query(element* packed, const float* query, int64_t dim, float scale) {
    int64_t d = 0;
    for (; d + kTileRows <= dim; d += kTileRows) store(packed + d, load(query + d) * scale);
    for (; d < dim; ++d) packed[d] = BFloat16(query[d] * scale);
    std::fill(packed + dim, packed + query_size(dim), BFloat16(0.0f));
  }

  // Transposed by pairs: packed[(d / 2 * kKeys + j) * 2 + d % 2] is element d of key j; zero where there is none.
  static void pack_keys(element* packed, const BFloat16* keys, int64_t dim, int count) {
    for (int64_t d = 0; d < dim; d += kTileDepth) {
      const bool whole = d + kTileDepth <= dim;
      for (int j = 0; j < count; j += kTileRows) {
        WideBits square[kTileRows] = {};
        for (int i = 0; i < kTileRows && j + i < count; ++i) {
          const BFloat16* from = keys + (j + i) * dim + d;
          if (whole) std::memcpy(&square[i], from, sizeof square[i]);
          else std::memcpy(&square[i], from, (dim - d) * sizeof(BFloat16));
        }
        transpose(square);
        for (int i = 0; i < kTileRows; ++i) std::memcpy(packed + ((d / 2 + i) * kKeys + j) * 2, &square[i], sizeof square[i]);
      }
    }
  }

  // Pairs of rows woven into one: packed[(j / 2 * width + d) * 2 + j % 2] is element d of value j; zero where there is
  // none, up to the whole depth of a product. Returns whether all are finite.
  static bool pack_values(element* packed, const BFloat16* values, int64_t dim, int count) {
    const int64_t width = round_up(dim, kTileRows);
    Vec<float> spoiled{};
    for (int j = 0; j < round_up(count, kTileDepth); j += 2) {
      for (int64_t d = 0; d < dim; d += kTileRows) {
        Vec<float> row[2] = {};
        for (int i = 0; i < 2 && j + i < count; ++i) {
          const BFloat16* from = values + (j + i) * dim + d;
          row[i] = d + kTileRows <= dim ? load(from) : load_first(from, dim - d);
          spoiled += row[i] * 0.0f;
        }
        const WideBits woven = as<WideBits>(row[0]) >> 16 | as<WideBits>(row[1]);
        std::memcpy(packed + (j / 2 * width + d) * 2, &woven, sizeof woven);
      }
    }
    return sum(spoiled) == 0;
  }

  static void scores(
      float* scores, float /*scale*/, const element* queries, const element* keys, int64_t dim, int count) {
    multiply_tiles(
        scores, kKeys, false, queries, query_size(dim), keys, kKeys, query_size(dim), round_up(count, kTileRows));
  }

  // Weights are rounded to bfloat16, like those of an attention in that type.
  static void add_values(
      float* sums, const float* factor, const float* weights, const element* values, int64_t dim, int count) {
    const int64_t width = round_up(dim, kTileRows), depth = round_up(count, kTileDepth);
    alignas(64) BFloat16 rounded[kRows * kKeys];
    for (int r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < depth; j += kTileDepth) {
        const float* from = weights + r * kKeys + j;
        const Vec<float> low = load(from), high = j + kTileRows < count ? load(from + kTileRows) : Vec<float>{};
        const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        std::memcpy(rounded + r * kKeys + j, &pair, sizeof pair);
      }
      if (factor[r] == 1) continue;
      for (int64_t d = 0; d < width; d += kTileRows) store(sums + r * width + d, load(sums + r * width + d) * factor[r]);
    }
    multiply_tiles(sums, width, true, rounded, kKeys, values, width, depth, width);
  }

 private:
  // c += a times b (or c = without `add`) for kRows rows of `a`, `columns` (a multiple of 16) wide.
  static void multiply_tiles(
      float* c, int64_t c_stride, bool add, const element* a, int64_t a_stride, const element* b, int64_t b_stride,
      int64_t depth, int64_t columns) {
    const int64_t c_bytes = c_stride * sizeof(float), a_bytes = a_stride * sizeof(element);
    const int64_t b_bytes = 2 * b_stride * sizeof(element);
    float* const c_low = c + kTileRows * c_stride;
    const element* const a_low = a + kTileRows * a_stride;
    int64_t n = 0;
    for (; n + 2 * kTileRows <= columns; n += 2 * kTileRows) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (add) {
        _tile_loadd(0, c + n, c_bytes);
        _tile_loadd(1, c + n + kTileRows, c_bytes);
        _tile_loadd(2, c_low + n, c_bytes);
        _tile_loadd(3, c_low + n + kTileRows, c_bytes);
      }
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        const element* right = b + (k / 2 * b_stride + n) * 2;
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(5, a_low + k, a_bytes);
        _tile_loadd(6, right, b_bytes);
        _tile_loadd(7, right + 2 * kTileRows, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c + n, c_bytes);
      _tile_stored(1, c + n + kTileRows, c_bytes);
      _tile_stored(2, c_low + n, c_bytes);
      _tile_stored(3, c_low + n + kTileRows, c_bytes);
    }
    if (n == columns) return;
    _tile_zero(0);
    _tile_zero(2);
    if (add) {
      _tile_loadd(0, c + n, c_bytes);
      _tile_loadd(2, c_low + n, c_bytes);
    }
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(5, a_low + k, a_bytes);
      _tile_loadd(6, b + (k / 2 * b_stride + n) * 2, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, c + n, c_bytes);
    _tile_stored(2, c_low + n, c_bytes);
  }
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
