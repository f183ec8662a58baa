// Scores and weighted sums of a block of keys and values in decoding: chooses the inner loops for the type of the ring.
// Included by attention_decode.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "attention_decode_microkernel_float.h"
#include "attention_decode_microkernel_int8.h"
#include "rotary.h"

namespace sinkattn {
namespace SINKATTN_ISA {

// All queries of a KV row, rotated for keys of one kind.
template <typename acc_t>
struct DecodeQueries {
  acc_t* rotated;  // [query][round_up(head_dim, kLanes<acc_t>)], padded with zeros
  char* packed;    // what a microkernel makes of them
};

// Memory that is read next and is to be prefetched.
struct Upcoming {
  const char *next, *end;

  template <typename stored_t>
  Upcoming(const stored_t* from, int64_t count)
      : next(reinterpret_cast<const char*>(from)), end(reinterpret_cast<const char*>(from + count)) {}

  // A part of it of 1 / parts, in whole cache lines.
  int64_t part(int64_t parts) const { return round_up((end - next + parts - 1) / parts, 64); }

  SINKATTN_INLINE void prefetch(int64_t bytes) {
    const char *line = next, *stop = std::min(end, next + bytes);
    for (; line < stop; line += 64) __builtin_prefetch(line, 0, 2);
    next = line;
  }

  // All of it, for the caller to prefetch.
  template <typename stored_t>
  const stored_t* take() {
    const stored_t* all = reinterpret_cast<const stored_t*>(next);
    next = end;
    return all;
  }
};

// With vector instructions.
template <typename scalar_t>
class VectorDecodeMicrokernel {
 public:
  using acc_t = typename Accumulate<scalar_t>::type;
  static constexpr int kQueries = kDecodeShared;  // of a group; most that a call of scores() or add_values() takes

  // RAII guard for the AMX tile registers of a thread; no-op here.
  struct TileConfig {
    explicit TileConfig(const VectorDecodeMicrokernel&) {}
  };

  // For a KV row with `num_queries` queries.
  VectorDecodeMicrokernel(int64_t num_queries, int64_t head_dim, int64_t value_dim, RingType ring)
      : num_queries_(num_queries),
        head_dim_(head_dim),
        value_dim_(value_dim),
        query_stride_(round_up(head_dim, kLanes<acc_t>)),
        acc_stride_(round_up(value_dim, kLanes<acc_t>)),
        in_integers_(kHasIntegers && ring == RingType::kInt8 && head_dim <= kMaxInt8Dim) {}

  // Bytes of all packed queries, and of staging, which calls use as they like.
  int64_t packed_size() const { return in_integers_ ? num_queries_ * int8_query_size(head_dim_) : 0; }
  int64_t staging_size() const { return decode_staging_size<acc_t>(query_stride_); }

  // Packs the first `count` queries.
  void pack(
      [[maybe_unused]] const DecodeQueries<acc_t>& queries, [[maybe_unused]] int64_t count,
      [[maybe_unused]] bool for_sinks) const {
    if constexpr (kHasIntegers) {
      if (in_integers_ && !for_sinks) pack_for_int8(queries.packed, queries.rotated, query_stride_, count, head_dim_);
    }
  }

  // scores[q * kDecodeBlock + j]: scaled dot products of queries [first, first + num_queries), of one group, with keys
  // j < count. Prefetches.
  template <typename stored_t>
  void scores(
      acc_t* scores, acc_t scale, const DecodeQueries<acc_t>& queries, int64_t first, int64_t num_queries,
      const stored_t* keys, int count, char* staging, Upcoming& upcoming) const {
    const stored_t* next = upcoming.take<stored_t>();
    if constexpr (kHasIntegers && std::is_same_v<stored_t, int8_t>) {
      if (in_integers_) {
        return int8_scores(
            scores, scale, queries.packed + first * int8_query_size(head_dim_), num_queries, keys, head_dim_, count,
            next, value_dim_);
      }
    }
    decode_scores(
        scores, scale, queries.rotated + first * query_stride_, query_stride_, num_queries, keys, head_dim_, count,
        reinterpret_cast<acc_t*>(staging), next, value_dim_);
  }

  // acc = factor * acc + weights x values, for as many queries. Weights from `count` up to a whole vector are zero.
  template <typename stored_t>
  void add_values(
      acc_t* acc, const acc_t* factor, const acc_t* weights, int64_t num_queries, const stored_t* values, int count,
      char* staging, Upcoming& upcoming) const {
    const stored_t* next = upcoming.take<stored_t>();
    if constexpr (kHasIntegers && std::is_same_v<stored_t, int8_t>) {
      if (in_integers_) {
        return int8_add_values(
            acc, acc_stride_, factor, weights, num_queries, values, value_dim_, count, next, head_dim_);
      }
    }
    decode_add_values(
        acc, acc_stride_, factor, weights, num_queries, values, value_dim_, count, reinterpret_cast<acc_t*>(staging),
        next);
  }

 protected:
  // Of models in 16 bits; in fp32 the rounding to int16 would show.
  static constexpr bool kHasIntegers = kHasInt8Loops && sizeof(scalar_t) == 2;

  const int64_t num_queries_, head_dim_, value_dim_;
  const int64_t query_stride_, acc_stride_;
  const bool in_integers_;
};

template <typename scalar_t>
class DecodeMicrokernel : public VectorDecodeMicrokernel<scalar_t> {
  using VectorDecodeMicrokernel<scalar_t>::VectorDecodeMicrokernel;
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
