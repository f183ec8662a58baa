// Inner loops of decoding for bfloat16 on AMX, over rings of any type, where a KV head has more queries than share the
// registers of vector instructions. Included by attention_kernel.h when it is compiled for AMX.
//
// Keys are the left operand of the scores, as they lie in the cache; values are the right one of their weighted sums, of
// which two or four are interleaved. Queries and weights, in fp32, are split into two parts that AMX multiplies: two
// numbers of bfloat16 or, over int8, two digits of an integer. A tile has both parts of eight queries. A key of bfloat16
// with an infinite element may give NaN, as a part may be zero.
//
// Tiles are loaded from memory alone, so what vector instructions prepare is stored first. Prefetches are spread over all
// of the work: while nothing is prefetched, memory idles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "attention_decode_microkernel.h"

namespace sinkattn {
namespace SINKATTN_ISA {

template <>
class DecodeMicrokernel<BFloat16> : public VectorDecodeMicrokernel<BFloat16> {
  using Base = VectorDecodeMicrokernel<BFloat16>;
  using Floats = Vec<float>;

  static constexpr int kTileQueries = kTileRows / 2;
  static constexpr int kTiles = 4;  // of keys of a block, and of columns of values
  static constexpr int kWidth = kTiles * kTileRows;
  static_assert(kDecodeBlock == kTiles * kTileRows && kQueries % kTileQueries == 0);

 public:
  struct TileConfig {
    explicit TileConfig(const DecodeMicrokernel& kernel) {
      if (kernel.in_tiles_) registers.emplace();
    }
    std::optional<TileRegisters> registers;
  };

  DecodeMicrokernel(int64_t num_queries, int64_t head_dim, int64_t value_dim, RingType ring)
      : Base(num_queries, head_dim, value_dim, ring),
        in_tiles_(num_queries > kDecodeQueries<float>),
        has_digits_(ring == RingType::kInt8) {}

  int64_t packed_size() const {
    if (!in_tiles_) return Base::packed_size();
    return (num_queries_ + kTileQueries - 1) / kTileQueries * operand_size();
  }

  // A right operand for every kTileQueries queries, whose columns are the upper parts, then the lower ones. It ends with
  // the unit of each query.
  void pack(const DecodeQueries<float>& queries, int64_t count, bool for_sinks) const {
    if (!in_tiles_) return Base::pack(queries, count, for_sinks);
    for (int64_t q = 0; q < count; q += kTileQueries) {
      char* to = queries.packed + q / kTileQueries * operand_size();
      const int64_t some = std::min<int64_t>(kTileQueries, count - q);
      if (has_digits_ && !for_sinks) pack_operand<int8_t>(to, queries.rotated + q * query_stride_, some);
      else pack_operand<BFloat16>(to, queries.rotated + q * query_stride_, some);
    }
  }

  template <typename stored_t>
  void scores(
      float* scores, float scale, const DecodeQueries<float>& queries, int64_t first, int64_t num_queries,
      const stored_t* keys, int count, char* staging, Upcoming& upcoming) const {
    if (!in_tiles_) return Base::scores(scores, scale, queries, first, num_queries, keys, count, staging, upcoming);
    const Block<stored_t> block{keys, head_dim_, count};
    const int64_t operands = (num_queries + kTileQueries - 1) / kTileQueries;
    const int64_t part = upcoming.part(2 * operands * num_steps<stored_t>() * kTiles);
    for (int64_t q = 0, end; q < num_queries; q = end) {
      const int64_t column = (first + q) % kTileQueries;
      end = std::min(num_queries, q + kTileQueries - column);
      tile_scores(
          scores + q * kDecodeBlock, scale, queries.packed + (first + q) / kTileQueries * operand_size(), column,
          end - q, block, upcoming, part);
    }
  }

  template <typename stored_t>
  void add_values(
      float* acc, const float* factor, const float* weights, int64_t num_queries, const stored_t* values, int count,
      char* staging, Upcoming& upcoming) const {
    if (!in_tiles_) return Base::add_values(acc, factor, weights, num_queries, values, count, staging, upcoming);
    constexpr int kSteps = kDecodeBlock / kDepth<stored_t>;
    alignas(64) char left[kQueries / kTileQueries][kSteps][kTileBytes], right[kSteps][kTiles][kTileBytes];
    alignas(64) uint32_t sums[kTiles][kTileRows][kTileRows];
    const Block<stored_t> block{values, value_dim_, count};
    const int steps = (count + kDepth<stored_t> - 1) / kDepth<stored_t>;
    const int64_t groups = (value_dim_ + kWidth - 1) / kWidth, quarter = upcoming.part(4);
    const int64_t per_row = round_up(quarter / (groups * steps * kTileRows) + 1, 64);
    Unit unit[kQueries];
    for (int64_t q = 0; q < num_queries; ++q) {
      const float* x = weights + q * kDecodeBlock;
      unit[q] = unit_for<stored_t>(x, count);
      for (int step = 0; step < steps; ++step) {
        upcoming.prefetch(quarter / (num_queries * steps));
        const Parts parts = split<stored_t>(x, step, count, unit[q]);
        char* row = left[q / kTileQueries][step] + q % kTileQueries * kTileRowBytes;
        std::memcpy(row, &parts.upper, kTileRowBytes);
        std::memcpy(row + kTileQueries * kTileRowBytes, &parts.lower, kTileRowBytes);
      }
    }
    for (int64_t d = 0; d < value_dim_; d += kWidth) {
      for (int step = 0; step < steps; ++step) {
        const bool is_whole = count == kDecodeBlock && d + kWidth <= value_dim_;
        if (is_whole) interleave<true>(right[step], block, step, d, upcoming, per_row);
        else interleave<false>(right[step], block, step, d, upcoming, per_row);
      }
      for (int64_t q = 0; q < num_queries; q += kTileQueries) {
        unrolled<kTiles>([](auto t) { Tile<t>::zero(); });
        for (int step = 0; step < steps; ++step) {
          Tile<4>::load(left[q / kTileQueries][step], kTileRowBytes);
          unrolled<kTiles>([&](auto t) {
            upcoming.prefetch(64);
            Tile<6 + t % 2>::load(right[step][t], kTileRowBytes);
            add_product<stored_t, t, 4, 6 + t % 2>();
          });
        }
        unrolled<kTiles>([&](auto t) { Tile<t>::store(sums[t], kTileRowBytes); });
        for (int64_t row = 0; row < std::min<int64_t>(kTileQueries, num_queries - q); ++row) {
          upcoming.prefetch(quarter / (groups * num_queries));
          Floats x[kTiles];
          for (int t = 0; t < kTiles; ++t) {
            x[t] = join<stored_t>(load_bits(sums[t][row]), load_bits(sums[t][row + kTileQueries]));
            x[t] *= unit[q + row].size;
          }
          order_columns<stored_t>(x);
          add_sums(acc + (q + row) * acc_stride_ + d, factor[q + row], x, weights + (q + row) * kDecodeBlock, block, d);
        }
      }
    }
    upcoming.prefetch(upcoming.end - upcoming.next);
  }

 private:
  template <typename stored_t>
  static constexpr bool kAsDigits = std::is_same_v<stored_t, int8_t>;

  // Inner dimension of a product.
  template <typename stored_t>
  static constexpr int kDepth = kAsDigits<stored_t> ? 2 * kTileDepth : kTileDepth;

  // Products over the elements of a key.
  template <typename stored_t>
  int64_t num_steps() const {
    return (head_dim_ + kDepth<stored_t> - 1) / kDepth<stored_t>;
  }

  int64_t operand_size() const { return num_steps<BFloat16>() * kTileBytes + kTileRowBytes; }

  // Consecutive keys or values, up to kDecodeBlock.
  template <typename stored_t>
  struct Block {
    const stored_t* data;
    int64_t dim;
    int count;

    // Elements of a row from d on, as many as a row of a tile has, then zeros.
    SINKATTN_INLINE WideBits load(int row, int64_t d) const {
      const stored_t* from = data + row * dim + d;
      if constexpr (!kAsDigits<stored_t>) {
        return load_tile_row(from, dim - d);
      } else {
        if (dim - d >= kTileRowBytes) return bit_cast<WideBits>(_mm512_loadu_si512(from));
        return bit_cast<WideBits>(_mm512_maskz_loadu_epi8((uint64_t{1} << (dim - d)) - 1, from));
      }
    }
  };

  // Calls body(std::integral_constant<int, i>()) for i in [0, n).
  template <int n, typename Body>
  static SINKATTN_INLINE void unrolled(const Body& body) {
    unrolled(body, std::make_integer_sequence<int, n>());
  }
  template <typename Body, int... i>
  static SINKATTN_INLINE void unrolled(const Body& body, std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>()), ...);
  }

  template <typename stored_t, int C, int A, int B>
  static SINKATTN_INLINE void add_product() {
    if constexpr (kAsDigits<stored_t>) add_product_int8<C, A, B>();
    else add_product_bf16<C, A, B>();
  }

  static SINKATTN_INLINE WideBits load_bits(const uint32_t* from) {
    return bit_cast<WideBits>(_mm512_load_si512(from));
  }

  static SINKATTN_INLINE bool all_finite(Floats x) { return _mm512_fpclass_ps_mask((__m512)x, 0x99) == 0; }

  template <typename stored_t>
  static SINKATTN_INLINE Unit unit_for(const float* x, int64_t count) {
    if constexpr (kAsDigits<stored_t>) return unit_of(x, count);
    else return {1, 1};
  }

  // Both parts of kDepth elements, as rows of tiles.
  struct Parts {
    WideBits upper, lower;
  };

  // Of a vector of `count` elements, padded with zeros to a whole SIMD vector.
  template <typename stored_t>
  static SINKATTN_INLINE Parts split(const float* vector, int64_t step, int64_t count, Unit unit) {
    constexpr int kVectors = kDepth<stored_t> / kTileRows;
    Floats x[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const int64_t first = step * kDepth<stored_t> + i * kTileRows;
      x[i] = first < count ? load(vector + first) : Floats{};
    }
    if constexpr (kAsDigits<stored_t>) {
      Parts parts;
      for (int i = 0; i < kVectors; ++i) {
        const IntVec n = round_to_int(x[i] * unit.inverse);
        put_digits(parts.upper, i, (n + 128) >> 8);
        put_digits(parts.lower, i, n);
      }
      return parts;
    } else {
      Floats upper[2];
      for (int i = 0; i < 2; ++i) upper[i] = bit_cast<Floats>(bit_cast<WideBits>(x[i]) & 0xffff0000);
      return {round_to_bf16(upper[0], upper[1]), round_to_bf16(x[0] - upper[0], x[1] - upper[1])};
    }
  }

  // Puts the low bytes of 16 integers into quarter `i` of a row.
  static SINKATTN_INLINE void put_digits(WideBits& row, int i, IntVec n) {
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)n);
    std::memcpy(reinterpret_cast<char*>(&row) + i * sizeof bytes, &bytes, sizeof bytes);
  }

  // The sum of products with both parts, in units.
  template <typename stored_t>
  static SINKATTN_INLINE Floats join(WideBits upper, WideBits lower) {
    if constexpr (!kAsDigits<stored_t>) return bit_cast<Floats>(upper) + bit_cast<Floats>(lower);
    else return multiply_add(to_floats(upper), broadcast(256.0f), to_floats(lower));
  }
  static SINKATTN_INLINE Floats to_floats(WideBits x) { return (Floats)_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)x); }

  template <typename stored_t>
  void pack_operand(char* to, const float* queries, int64_t count) const {
    float sizes[kTileQueries] = {};
    Unit unit[kTileQueries];
    for (int64_t q = 0; q < count; ++q) {
      unit[q] = unit_for<stored_t>(queries + q * query_stride_, head_dim_);
      sizes[q] = unit[q].size;
    }
    for (int64_t step = 0; step < num_steps<stored_t>(); ++step, to += kTileBytes) {
      WideBits rows[kTileRows] = {};
      for (int64_t q = 0; q < count; ++q) {
        const Parts parts = split<stored_t>(queries + q * query_stride_, step, head_dim_, unit[q]);
        rows[q] = parts.upper;
        rows[q + kTileQueries] = parts.lower;
      }
      transpose(rows);
      std::memcpy(to, rows, sizeof rows);
    }
    std::memcpy(to, sizes, sizeof sizes);
  }

  // Scores of the queries in columns [column, column + num_queries) of an operand.
  template <typename stored_t>
  void tile_scores(
      float* scores, float scale, const char* operand, int64_t column, int64_t num_queries,
      const Block<stored_t>& keys, Upcoming& upcoming, int64_t part) const {
    alignas(64) char copies[2][kTileBytes];
    alignas(64) uint32_t sums[kTiles][kTileRows][kTileRows];
    const int64_t steps = num_steps<stored_t>();
    unrolled<kTiles>([&](auto t) {
      if (t * kTileRows >= keys.count) return;
      Tile<t>::zero();
      for (int64_t step = 0; step < steps; ++step) {
        upcoming.prefetch(part);
        load_keys<6 + t % 2>(keys, t * kTileRows, step * kDepth<stored_t>, copies[t % 2]);
        Tile<4 + t % 2>::load(operand + step * kTileBytes, kTileRowBytes);
        add_product<stored_t, t, 6 + t % 2, 4 + t % 2>();
      }
      Tile<t>::store(sums[t], kTileRowBytes);
    });
    float unit[kTileQueries];
    std::memcpy(unit, operand + steps * kTileBytes, sizeof unit);
    for (int t = 0; t * kTileRows < keys.count; ++t) {
      WideBits columns[kTileRows];
      for (int i = 0; i < kTileRows; ++i) {
        upcoming.prefetch(64);
        columns[i] = load_bits(sums[t][i]);
      }
      transpose(columns);
      for (int64_t q = 0; q < num_queries; ++q) {
        const Floats x = join<stored_t>(columns[column + q], columns[column + q + kTileQueries]);
        store(scores + q * kDecodeBlock + t * kTileRows, x * (unit[column + q] * scale));
      }
    }
  }

  // Loads elements from d on of keys [first, first + 16) as a left operand: where they lie, or copied and padded.
  template <int tile, typename stored_t>
  static SINKATTN_INLINE void load_keys(const Block<stored_t>& keys, int first, int64_t d, char* copy) {
    constexpr bool kAsTheyLie = sizeof(stored_t) * kDepth<stored_t> == kTileRowBytes;
    if (kAsTheyLie && d + kDepth<stored_t> <= keys.dim && first + kTileRows <= keys.count) {
      return Tile<tile>::load(keys.data + first * keys.dim + d, keys.dim * sizeof(stored_t));
    }
    for (int i = 0; i < kTileRows; ++i) {
      const WideBits row = first + i < keys.count ? keys.load(first + i, d) : WideBits{};
      std::memcpy(copy + i * kTileRowBytes, &row, kTileRowBytes);
    }
    Tile<tile>::load(copy, kTileRowBytes);
  }

  // A step's right operands of kWidth columns from d on, in the order in which instructions interleave them. kWhole: all
  // rows and columns exist. Prefetches `part` bytes for each row of the operands.
  template <bool kWhole, typename stored_t>
  static SINKATTN_INLINE void interleave(
      char (*to)[kTileBytes], const Block<stored_t>& values, int step, int64_t d, Upcoming& upcoming, int64_t part) {
    const auto row = [&](int i, int64_t column) {
      i += step * kDepth<stored_t>;
      return (__m512i)(kWhole || (i < values.count && column < values.dim) ? values.load(i, column) : WideBits{});
    };
    for (int i = 0; i < kTileRows; ++i) {
      upcoming.prefetch(part);
      __m512i rows[kTiles];
      if constexpr (kAsDigits<stored_t>) {
        const __m512i a = row(4 * i, d), b = row(4 * i + 1, d), c = row(4 * i + 2, d), e = row(4 * i + 3, d);
        const __m512i low[] = {_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, e)};
        const __m512i high[] = {_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, e)};
        rows[0] = _mm512_unpacklo_epi16(low[0], low[1]);
        rows[1] = _mm512_unpackhi_epi16(low[0], low[1]);
        rows[2] = _mm512_unpacklo_epi16(high[0], high[1]);
        rows[3] = _mm512_unpackhi_epi16(high[0], high[1]);
      } else {
        for (int half = 0; half < 2; ++half) {
          const int64_t column = d + half * kTileDepth;
          const __m512i a = row(2 * i, column), b = row(2 * i + 1, column);
          rows[2 * half] = _mm512_unpacklo_epi16(a, b);
          rows[2 * half + 1] = _mm512_unpackhi_epi16(a, b);
        }
      }
      for (int t = 0; t < kTiles; ++t) _mm512_store_si512(to[t] + i * kTileRowBytes, rows[t]);
    }
  }

  // Undoes that order for sums of the columns, by quarters of vectors.
  template <typename stored_t>
  static SINKATTN_INLINE void order_columns(Floats* x) {
    if constexpr (kAsDigits<stored_t>) {
      const VectorPair<Floats> a = exchange<4>(x[0], x[1]), b = exchange<4>(x[2], x[3]);
      const VectorPair<Floats> even = exchange<8>(a.low, b.low), odd = exchange<8>(a.high, b.high);
      x[0] = even.low;
      x[1] = odd.low;
      x[2] = even.high;
      x[3] = odd.high;
    } else {
      for (int t = 0; t < kTiles; t += 2) {
        const VectorPair<Floats> both = in_order(x[t], x[t + 1], LaneNumbers<Floats>{});
        x[t] = both.low;
        x[t + 1] = both.high;
      }
    }
  }

  // acc = factor * acc + x for elements from d on of one query.
  template <typename stored_t>
  static SINKATTN_INLINE void add_sums(
      float* acc, float factor, const Floats* x, const float* weights, const Block<stored_t>& values, int64_t d) {
    for (int t = 0; t < kTiles && d + t * kTileRows < values.dim; ++t, acc += kTileRows) {
      if constexpr (!kAsDigits<stored_t>) {
        if (!all_finite(x[t])) {  // an infinite value times a part that is zero is NaN: without parts
          const int64_t first = d + t * kTileRows, rest = values.dim - first;
          Prefetch none{nullptr, 0};
          decode_add_values_tile<1, 1, 0>(
              acc, 0, &factor, weights, values.data + first, values.dim, values.count, none,
              rest < kTileRows ? rest : 0);
          continue;
        }
      }
      store(acc, multiply_add(load(acc), broadcast(factor), x[t]));
    }
  }

  const bool in_tiles_, has_digits_;
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
