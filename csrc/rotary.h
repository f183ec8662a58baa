// Rotation of one head vector, the one definition that every device compiles.
#pragma once

#include <cstdint>

#include "ring.h"

namespace sinkattn {

// Keys are rotated in fp32 (fp64 for fp64 caches) and rounded once, to the dtype of the cache.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// Turns the pair (a, b). Compiled without contraction to fused multiply-add, so that every device rounds alike.
template <typename scalar_t, typename acc_t>
SINKATTN_HOST_DEVICE inline void rotate_pair(scalar_t& a, scalar_t& b, acc_t cos, acc_t sin) {
  const acc_t x = static_cast<acc_t>(a);
  const acc_t y = static_cast<acc_t>(b);
  a = static_cast<scalar_t>(x * cos - y * sin);
  b = static_cast<scalar_t>(y * cos + x * sin);
}

// out = in rotated: pair i (of `pairs`) turns by the angle of cos[i], sin[i]; the rest of `head_dim` is copied.
// Pair i is elements (i, i + pairs), or (2i, 2i + 1) when `interleaved` (RoPE, arXiv 2104.09864).
// `step` lets several threads share one vector: this call does pairs and copies first, first + step, ...
template <typename scalar_t>
SINKATTN_HOST_DEVICE inline void rotate_vector(
    scalar_t* out, const scalar_t* in, int64_t in_stride, int64_t head_dim, int64_t pairs,
    const typename Accumulate<scalar_t>::type* cos, const typename Accumulate<scalar_t>::type* sin,
    int64_t table_stride, bool interleaved, int64_t first = 0, int64_t step = 1) {
  SINKATTN_ROLLED
  for (int64_t i = first; i < pairs; i += step) {
    const int64_t a = interleaved ? 2 * i : i;
    const int64_t b = interleaved ? 2 * i + 1 : i + pairs;
    scalar_t x = in[a * in_stride], y = in[b * in_stride];
    rotate_pair(x, y, cos[i * table_stride], sin[i * table_stride]);
    out[a] = x;
    out[b] = y;
  }
  SINKATTN_ROLLED
  for (int64_t i = 2 * pairs + first; i < head_dim; i += step) out[i] = in[i * in_stride];
}

}  // namespace sinkattn
