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

// Calls emit(i, element) for the elements of the rotated vector: pair i < `pairs` is rotated by the angle with cosine
// cos[i] and sine sin[i]; elements from 2 * pairs on are as they were. Pair i is elements (i, i + pairs), or
// (2i, 2i + 1) if `interleaved`.
// Several threads can share one vector: this call handles pairs and other elements first, first + step, ... kBack
// rotates by the opposite angles.
template <typename scalar_t, bool kBack = false, typename Emit>
SINKATTN_HOST_DEVICE inline void for_each_rotated(
    const scalar_t* in, int64_t in_stride, int64_t head_dim, int64_t pairs,
    const typename Accumulate<scalar_t>::type* cos, const typename Accumulate<scalar_t>::type* sin,
    int64_t table_stride, bool interleaved, const Emit& emit, int64_t first = 0, int64_t step = 1) {
  SINKATTN_NO_UNROLL
  for (int64_t i = first; i < pairs; i += step) {
    const int64_t a = interleaved ? 2 * i : i;
    const int64_t b = interleaved ? 2 * i + 1 : i + pairs;
    scalar_t x = in[a * in_stride], y = in[b * in_stride];
    const auto s = sin[i * table_stride];
    rotate_pair(x, y, cos[i * table_stride], kBack ? -s : s);
    emit(a, x);
    emit(b, y);
  }
  SINKATTN_NO_UNROLL
  for (int64_t i = 2 * pairs + first; i < head_dim; i += step) emit(i, in[i * in_stride]);
}

// Rotates `in` into `out`, which may be `in`. Elements are rounded to scalar_t, whatever the type of `out` is.
template <typename scalar_t, bool kBack = false, typename out_t>
SINKATTN_HOST_DEVICE inline void rotate_vector(
    out_t* out, const scalar_t* in, int64_t in_stride, int64_t head_dim, int64_t pairs,
    const typename Accumulate<scalar_t>::type* cos, const typename Accumulate<scalar_t>::type* sin,
    int64_t table_stride, bool interleaved) {
  for_each_rotated<scalar_t, kBack>(
      in, in_stride, head_dim, pairs, cos, sin, table_stride, interleaved,
      [=](int64_t i, scalar_t x) { out[i] = static_cast<out_t>(x); });
}

}  // namespace sinkattn
