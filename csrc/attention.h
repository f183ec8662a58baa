// Interface of the CPU attention kernel, without torch: append new tokens to the ring, attend over sinks and window; and
// the gradients of that. attention.cpp (the operators) and tests/csrc call it; attention_kernel.h implements it, compiled
// once for each instruction set by attention_<set>.cpp.
#pragma once

#include <cstdint>

#include "ring.h"

namespace sinkattn {

// Of queries, keys, values and outputs.
enum class CacheType { kFloat, kDouble, kHalf, kBFloat16 };

// How the ring holds tokens: in that type, or in 8 bits with a scale for each vector (quantise.h).
enum class RingType { kWhole, kInt8, kFloat8 };

// Read-only view of a 4-dimensional tensor; strides in elements.
struct StridedView {
  const void* data = nullptr;
  int64_t stride[4] = {};

  template <typename T>
  const T* at(int64_t i, int64_t j, int64_t k) const {
    return static_cast<const T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

// Arguments of one call. cos, sin, sink_logits and alibi_slopes are fp32, or fp64 for an fp64 cache; accumulation is in
// the same type.
struct AttentionCall {
  CacheType type;
  RingLayout layout;
  int64_t batch, heads, kv_heads, tokens, head_dim, value_dim;
  void* keys;              // [cache rows, kv_heads, slots, head_dim], contiguous
  void* values;            // [cache rows, kv_heads, slots, value_dim], contiguous
  StridedView query;       // [batch, heads, tokens, head_dim], before rotation
  StridedView key, value;  // [batch, kv_heads, tokens, head_dim or value_dim], before rotation
  const int64_t* seen;     // [batch] tokens appended before this call
  const int64_t* lengths;  // [batch] new tokens of each row, the rest is padding; null: `tokens` in every row
  StridedView cos, sin;    // [2, batch, tokens, pairs] at stream and at cache-relative positions
  int64_t pairs;           // rotated pairs of elements; 0: no rotation, cos and sin have no data
  bool interleaved;
  double scale;
  double softcap;            // 0: none
  const void* sink_logits;   // [heads] or null
  const void* alibi_slopes;  // [heads] or null
  void* out;                 // [batch, tokens, heads, value_dim], contiguous
  const int64_t* rows = nullptr;       // [batch] cache row of each row, all different; null: row i
  const int64_t* row_sinks = nullptr;  // [batch] sinks of each row, up to layout.num_sinks; null: layout.num_sinks
  const int64_t* begins = nullptr;     // [batch] first token that a window of each row may hold, up to seen; null: 0
  RingType ring = RingType::kWhole;
  // Of a ring of 8 bits, whose slots are then all that keys and values have: sinks, [cache rows, kv_heads, num_sinks,
  // ...] in `type`, and scales, [cache rows, kv_heads, ring]; contiguous.
  void *sink_keys = nullptr, *sink_values = nullptr;
  float *key_scales = nullptr, *value_scales = nullptr;
};

// Arguments of the gradients of one call. What the ring held before the call is a constant.
struct AttentionGradients {
  // The call. keys and values, [batch, kv_heads, past, ...], hold the tokens in sight before it, in order of time:
  // sinks, then the window. layout has no headroom; out is not used.
  AttentionCall forward;
  int64_t past;               // num_sinks + window, or 0 if no row has seen a token
  StridedView out, gradient;  // [batch, heads, tokens, value_dim]: what the call returned, and its gradient
  void *dquery, *dkey, *dvalue;  // [batch, tokens, heads or kv_heads, head_dim or value_dim], contiguous
  void* dsink_logits;            // [heads] in the type of accumulation, or null
  int64_t groups;                // parts of the queries of a KV head, each with sums of its own
  // Buffers: new keys and values as the ring holds them, [batch, kv_heads, tokens, ...], and sums in the type of
  // accumulation, [batch, kv_heads, groups, sum_rows(), padded(head_dim) + padded(value_dim)].
  void *new_keys, *new_values, *sums;

  static constexpr int64_t kExtraRows = 64;  // one block of keys
  static int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }
  int64_t sum_rows() const { return forward.tokens + kExtraRows; }
};

}  // namespace sinkattn
