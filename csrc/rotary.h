// Rotation of one head vector (RoPE, arXiv 2104.09864). CPU and CUDA operators compile this one definition.
#pragma once

#include <cstdint>

#include "ring.h"

namespace sinkattn {

// Type of accumulation. Keys are rotated in it and rounded once, to the dtype of the cache.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// Rotates the pair (a, b). Compiled without fused multiply-add, so that all devices round the same way.
template <typename scalar_t, typename acc_t>
SINKATTN_HOST_DEVICE inline void rotate_pair(scalar_t& a, scalar_t& b, acc_t cos, acc_t sin) {
  const acc_t x = static_cast<acc_t>(a);
  const acc_t y = static_cast<acc_t>(b);
  a = static_cast<scalar_t>(x * cos - y * sin);
  b = static_cast<scalar_t>(y * cos + x * sin);
}

// Rotates `in` into `out`: pair i < `pairs` by the angle with cosine cos[i] and sine sin[i]; elements from 2 * pairs on
// are copied. Pair i is elements (i, i + pairs), or (2i, 2i + 1) if `interleaved`.
// Several threads can share one vector: this call handles pairs and copied elements first, first + step, ... kBack
// rotates by the opposite angles; `out` may be `in`.
template <typename scalar_t, bool kBack = false>
SINKATTN_HOST_DEVICE inline void rotate_vector(
    scalar_t* out, const scalar_t* in, int64_t in_stride, int64_t head_dim, int64_t pairs,
    const typename Accumulate<scalar_t>::type* cos, const typename Accumulate<scalar_t>::type* sin,
    int64_t table_stride, bool interleaved, int64_t first = 0, int64_t step = 1) {
  SINKATTN_NO_UNROLL
  for (int64_t i = first; i < pairs; i += step) {
    const int64_t a = interleaved ? 2 * i : i;
    const int64_t b = interleaved ? 2 * i + 1 : i + pairs;
    scalar_t x = in[a * in_stride], y = in[b * in_stride];
    const auto s = sin[i * table_stride];
    rotate_pair(x, y, cos[i * table_stride], kBack ? -s : s);
    out[a] = x;
    out[b] = y;
  }
  SINKATTN_NO_UNROLL
  for (int64_t i = 2 * pairs + first; i < head_dim; i += step) out[i] = in[i * in_stride];
}

}  // namespace sinkattn
