// CUDA kernels of the ring operators, and the host code that sizes their launches: only addresses and sizes, no torch
// and no runtime API. ring_cache_cuda.cu launches them; tests/csrc runs them on the host.
//
// Blocks have kThreads threads. Loops stride over the grid, so a grid of any size gives the same result.
//
// Kernels cannot raise. Contents that the CPU operators refuse are made harmless here: `lengths` are clamped to
// 0..tokens, `seen` to 0..2^61, `row_sinks` to 0..num_sinks, and row numbers out of range in `source` or `rows` are
// skipped.
#pragma once

#include <cstdint>

#include "quantise.h"
#include "ring.h"
#include "rotary.h"
#include "row_moves.h"

namespace sinkattn {

constexpr int kWarpSize = 32;
constexpr int kThreads = 128;
constexpr int kMaxAccessBytes = 16;  // of one load or store instruction

constexpr int64_t alignment(int64_t bytes) { return bytes < kMaxAccessBytes ? bytes : kMaxAccessBytes; }

// `n` elements, aligned so that they are loaded and stored in one access, or in several of kMaxAccessBytes bytes.
template <typename T, int n>
struct alignas(alignment(n * sizeof(T))) AlignedVector {
  T at[n];
};

// Elements of the widest access.
template <typename scalar_t>
constexpr int kVectorElements = kMaxAccessBytes / sizeof(scalar_t);

template <typename Unit, typename T>
__device__ const Unit& view_as(const T* data) {
  return *reinterpret_cast<const Unit*>(data);
}
template <typename Unit, typename T>
__device__ Unit& view_as(T* data) {
  return *reinterpret_cast<Unit*>(data);
}

__device__ inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

inline int64_t address(const void* data) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)); }

// Calls `launch` with a value of the widest access type, up to kMaxAccessBytes, whose size divides `bytes`, the bitwise
// OR of all addresses and sizes.
template <typename Launch>
void with_widest_unit(int64_t bytes, const Launch& launch) {
  if (bytes % 16 == 0) launch(AlignedVector<uint32_t, 4>{});
  else if (bytes % 8 == 0) launch(AlignedVector<uint32_t, 2>{});
  else if (bytes % 4 == 0) launch(uint32_t{});
  else if (bytes % 2 == 0) launch(uint16_t{});
  else launch(uint8_t{});
}

// Threads ("lanes") that share a vector of `units` accesses: a power of two, so that a warp handles whole vectors.
inline int lanes_for(int64_t units) {
  int lanes = 1;
  while (lanes < units && lanes < kWarpSize) lanes *= 2;
  return lanes;
}

// A [batch, kv_heads, tokens, dim] tensor; strides in elements.
template <typename scalar_t>
struct TokenView {
  const scalar_t* data;
  int64_t row_stride, head_stride, token_stride, element_stride;

  __device__ const scalar_t* at(int64_t row, int64_t head, int64_t token) const {
    return data + row * row_stride + head * head_stride + token * token_stride;
  }
};

// Rotary tables [batch, tokens, pairs] with the same strides; `pairs` is 0 if keys are not rotated.
template <typename acc_t>
struct RotaryTables {
  const acc_t* cos;
  const acc_t* sin;
  int64_t row_stride, token_stride, pair_stride, pairs;
};

// Where a new token of a KV head comes from, and the slot of which KV row of the cache it is written to.
struct NewToken {
  int64_t row, head, token;
  int64_t cache_kv_row, slot;  // slot -1: it is not written
};

template <typename scalar_t>
struct AppendCall {
  using acc_t = typename Accumulate<scalar_t>::type;

  scalar_t* keys;  // if the ring is of 8 bits, only of the sinks
  scalar_t* values;
  TokenView<scalar_t> key, value;
  const int64_t* seen;
  const int64_t* lengths;  // null: `tokens` in every row
  RotaryTables<acc_t> tables;
  int64_t batch, kv_heads, tokens, key_dim, value_dim;
  RingLayout layout;
  bool interleaved;
  int64_t cache_rows;
  const int64_t* rows;       // cache row of each row; null: row i
  const int64_t* row_sinks;  // sinks of each row; null: those of the layout

  // Most tokens of a KV row that are written.
  SINKATTN_HOST_DEVICE int64_t max_written() const { return tokens < layout.slots() ? tokens : layout.slots(); }
  SINKATTN_HOST_DEVICE int64_t num_items() const { return batch * kv_heads * max_written(); }

  // item = kv_row * max_written + i, for the i-th token that the append writes.
  __device__ NewToken new_token(int64_t item) const {
    const int64_t kv_row = item / max_written(), row = kv_row / kv_heads, head = kv_row % kv_heads;
    NewToken out{row, head, 0, 0, -1};
    if (item >= num_items()) return out;
    const int64_t cache_row = rows ? rows[row] : row;
    if (cache_row < 0 || cache_row >= cache_rows) return out;
    const int64_t most = layout.num_sinks;
    const RingLayout here = layout.of_row(row_sinks ? clamp(row_sinks[row], 0, most) : most, 0);
    const int64_t before = clamp(seen[row], 0, kMaxTokens);
    const int64_t count = lengths ? clamp(lengths[row], 0, tokens) : tokens;
    out.token = here.written_token(before, count, item % max_written());
    out.cache_kv_row = cache_row * kv_heads + head;
    if (out.token < count) out.slot = here.slot(before + out.token);  // else this row writes fewer tokens
    return out;
  }

  // Calls emit(d, element) for the elements of a new key, rotated, or value, that are of one of `lanes` threads.
  template <typename Emit>
  __device__ void for_each_element(const NewToken& now, bool is_key, int lane, int lanes, const Emit& emit) const {
    if (is_key) {
      const int64_t table = now.row * tables.row_stride + now.token * tables.token_stride;
      for_each_rotated<scalar_t>(
          key.at(now.row, now.head, now.token), key.element_stride, key_dim, tables.pairs, tables.cos + table,
          tables.sin + table, tables.pair_stride, interleaved, emit, lane, lanes);
    } else {
      const scalar_t* from = value.at(now.row, now.head, now.token);
      SINKATTN_NO_UNROLL
      for (int64_t d = lane; d < value_dim; d += lanes) emit(d, from[d * value.element_stride]);
    }
  }

  // Whether all tensors can be read and written in accesses of kMaxAccessBytes (AlignedVector).
  bool can_vectorize() const {
    constexpr int64_t n = kVectorElements<scalar_t>, size = sizeof(scalar_t);
    const auto aligned = [&](const scalar_t* cache, const TokenView<scalar_t>& x, int64_t dim) {
      const int64_t elements = x.row_stride | x.head_stride | x.token_stride | dim;
      const int64_t bytes = address(cache) | address(x.data) | elements * size;
      return bytes % kMaxAccessBytes == 0 && x.element_stride == 1;
    };
    if (!aligned(keys, key, key_dim) || !aligned(values, value, value_dim)) return false;
    if (tables.pairs == 0) return true;
    const int64_t entry = sizeof(acc_t), entries = interleaved ? n / 2 : n;  // table entries per access
    const int64_t bytes =
        address(tables.cos) | address(tables.sin) | (tables.row_stride | tables.token_stride) * entry;
    return tables.pair_stride == 1 && bytes % alignment(entries * entry) == 0 && tables.pairs % entries == 0;
  }

  int key_lanes(bool vectorized) const {
    const int64_t n = vectorized ? kVectorElements<scalar_t> : 1;
    const int64_t rotated = vectorized && interleaved ? 2 * tables.pairs : tables.pairs;
    const int64_t copied = key_dim - 2 * tables.pairs;
    return lanes_for((rotated > copied ? rotated : copied) / n);
  }
  int value_lanes(bool vectorized) const { return lanes_for(value_dim / (vectorized ? kVectorElements<scalar_t> : 1)); }
};

// rotate_vector in accesses of kMaxAccessBytes, by one of `lanes` threads.
template <typename scalar_t, typename acc_t>
__device__ void rotate_vectorized(
    scalar_t* __restrict__ out, const scalar_t* __restrict__ in, int64_t head_dim, int64_t pairs,
    const acc_t* __restrict__ cos, const acc_t* __restrict__ sin, bool interleaved, int lane, int lanes) {
  constexpr int n = kVectorElements<scalar_t>;
  using Unit = AlignedVector<scalar_t, n>;
  const int64_t first = lane * n, step = lanes * n;
  if (interleaved) {
    SINKATTN_NO_UNROLL
    for (int64_t i = first; i < 2 * pairs; i += step) {
      Unit x = view_as<Unit>(in + i);
      using Entries = AlignedVector<acc_t, n / 2>;
      const auto c = view_as<Entries>(cos + i / 2), s = view_as<Entries>(sin + i / 2);
      for (int k = 0; k < n / 2; ++k) rotate_pair(x.at[2 * k], x.at[2 * k + 1], c.at[k], s.at[k]);
      view_as<Unit>(out + i) = x;
    }
  } else {
    SINKATTN_NO_UNROLL
    for (int64_t i = first; i < pairs; i += step) {
      Unit x = view_as<Unit>(in + i), y = view_as<Unit>(in + pairs + i);
      const auto c = view_as<AlignedVector<acc_t, n>>(cos + i), s = view_as<AlignedVector<acc_t, n>>(sin + i);
      for (int k = 0; k < n; ++k) rotate_pair(x.at[k], y.at[k], c.at[k], s.at[k]);
      view_as<Unit>(out + i) = x;
      view_as<Unit>(out + pairs + i) = y;
    }
  }
  SINKATTN_NO_UNROLL
  for (int64_t i = 2 * pairs + first; i < head_dim; i += step) view_as<Unit>(out + i) = view_as<Unit>(in + i);
}

template <typename Unit>
__device__ void copy_vector(
    Unit* __restrict__ out, const Unit* __restrict__ in, int64_t in_stride, int64_t count, int lane, int lanes) {
  SINKATTN_NO_UNROLL
  for (int64_t i = lane; i < count; i += lanes) out[i] = in[i * in_stride];
}

// Blocks with blockIdx.y == 0 write keys, those with blockIdx.y == 1 write values. A group of `lanes` threads writes
// one token of one KV row.
template <typename scalar_t, bool vectorized>
__global__ void append_kernel(AppendCall<scalar_t> call, int key_lanes, int value_lanes) {
  const bool is_key = blockIdx.y == 0;
  const int lanes = is_key ? key_lanes : value_lanes, vectors_per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int64_t num_items = call.num_items(), step = int64_t{gridDim.x} * vectors_per_block;
  for (int64_t item = int64_t{blockIdx.x} * vectors_per_block + group; item < num_items; item += step) {
    const NewToken now = call.new_token(item);
    if (now.slot < 0) continue;
    const int64_t target = now.cache_kv_row * call.layout.slots() + now.slot;
    scalar_t* to = is_key ? call.keys + target * call.key_dim : call.values + target * call.value_dim;
    if constexpr (vectorized) {
      if (is_key) {
        const auto& tables = call.tables;
        const int64_t table = now.row * tables.row_stride + now.token * tables.token_stride;
        rotate_vectorized(
            to, call.key.at(now.row, now.head, now.token), call.key_dim, tables.pairs, tables.cos + table,
            tables.sin + table, call.interleaved, lane, lanes);
      } else {
        using Unit = AlignedVector<scalar_t, kVectorElements<scalar_t>>;
        const scalar_t* from = call.value.at(now.row, now.head, now.token);
        const int64_t units = call.value_dim / kVectorElements<scalar_t>;
        copy_vector(&view_as<Unit>(to), &view_as<Unit>(from), 1, units, lane, lanes);
      }
    } else {
      call.for_each_element(now, is_key, lane, lanes, [&](int64_t d, scalar_t x) { to[d] = x; });
    }
  }
}

// The ring of a cache of 8 bits (quantise.h).
template <typename stored_t>
struct EightBitRing {
  stored_t *keys, *values;           // [cache rows, kv_heads, ring, head_dim or value_dim]
  float *key_scales, *value_scales;  // [cache rows, kv_heads, ring]
};

constexpr int kMaxEightBitDim = 256;
// Vectors are shared by a warp, or by at least a third as many threads as they have elements.
constexpr int kEightBitElements = kThreads / kWarpSize * kMaxEightBitDim;

// append_kernel for a ring of 8 bits, with vectors of up to kMaxEightBitDim elements. The threads of a group have their
// vector in shared memory, so all threads of a block take as many turns.
template <typename scalar_t, typename stored_t>
__global__ void append_eight_bit_kernel(
    AppendCall<scalar_t> call, EightBitRing<stored_t> ring, int key_lanes, int value_lanes) {
  __shared__ float elements[kEightBitElements];
  __shared__ uint32_t largest_of[kThreads], best_of[kThreads];
  const bool is_key = blockIdx.y == 0;
  const int lanes = is_key ? key_lanes : value_lanes, vectors_per_block = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int dim = static_cast<int>(is_key ? call.key_dim : call.value_dim);
  const int block = is_key ? static_cast<int>(hadamard_block(dim)) : 1;
  const int64_t sinks = call.layout.num_sinks;
  const int64_t num_items = call.num_items(), step = int64_t{gridDim.x} * vectors_per_block;
  float* const x = elements + group * dim;
  for (int64_t first = int64_t{blockIdx.x} * vectors_per_block; first < num_items; first += step) {
    const NewToken now = call.new_token(first + group);
    const bool in_ring = now.slot >= sinks;
    if (in_ring) {
      call.for_each_element(now, is_key, lane, lanes, [&](int64_t d, scalar_t from) {
        x[d] = static_cast<float>(from);
      });
    } else if (now.slot >= 0) {
      scalar_t* to = (is_key ? call.keys : call.values) + (now.cache_kv_row * sinks + now.slot) * dim;
      call.for_each_element(now, is_key, lane, lanes, [&](int64_t d, scalar_t from) { to[d] = from; });
    }
    __syncthreads();
    for (int distance = 1; distance < block; distance *= 2) {
      for (int pair = lane; in_ring && pair < dim / 2; pair += lanes) {
        const int i = pair / distance * 2 * distance + pair % distance;
        add_and_subtract(x[i], x[i + distance]);
      }
      __syncthreads();
    }
    uint32_t largest = 0;
    const auto include = [&](uint32_t magnitude) { largest = magnitude > largest ? magnitude : largest; };
    for (int d = lane; in_ring && d < dim; d += lanes) include(magnitude_of(x[d]));
    largest_of[threadIdx.x] = largest;
    __syncthreads();
    for (int i = group * lanes; in_ring && i < (group + 1) * lanes; ++i) include(largest_of[i]);
    float scale = scale_of<stored_t>(largest);
    if (has_choice_of_scales<stored_t>(dim)) {
      uint32_t best = UINT32_MAX;
      const auto consider = [&](uint32_t rank) { best = rank < best ? rank : best; };
      for (int k = lane; in_ring && largest < kTooLargeForChoice && k < kNumScales; k += lanes) {
        consider(rank_of_scale(k, dim, [&](int64_t d) { return x[d] / scale; }));
      }
      best_of[threadIdx.x] = best;
      __syncthreads();
      for (int i = group * lanes; in_ring && i < (group + 1) * lanes; ++i) consider(best_of[i]);
      if (largest < kTooLargeForChoice) scale *= scale_factor(scale_of_rank(best));
    }
    if (in_ring) {
      const int64_t target = now.cache_kv_row * call.layout.ring() + now.slot - sinks;
      stored_t* to = (is_key ? ring.keys : ring.values) + target * dim;
      if (lane == 0) (is_key ? ring.key_scales : ring.value_scales)[target] = scale;
      for (int d = lane; d < dim; d += lanes) quantise_element(to[d], x[d], scale, largest);
    }
    __syncthreads();
  }
}

// The first row whose rollback is refused, and its counts; row is -1 if no rollback is refused.
struct RollbackFailure {
  int64_t row, count, seen, peak;
};

// One block: it checks all rows before it changes any. The same arithmetic as rollback_ in ring_cache.cpp.
static __global__ void rollback_kernel(
    int64_t* seen, int64_t* peak, const int64_t* counts, int64_t batch, int64_t headroom, RollbackFailure* failure) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = batch;
  __syncthreads();
  for (int64_t row = threadIdx.x; row < batch; row += kThreads) {
    const int64_t count = counts[row];
    const int64_t new_peak = peak[row] > seen[row] ? peak[row] : seen[row];
    const bool in_range = count >= 0 && count <= seen[row];
    // Tokens that were rolled back before have already overwritten older ones: headroom counts from the peak.
    const bool in_headroom = count == 0 || new_peak - (seen[row] - count) <= headroom;
    if (!(in_range && in_headroom)) atomicMin(&first, static_cast<unsigned long long>(row));
  }
  __syncthreads();
  const int64_t failed = first;
  if (failed < batch) {
    if (threadIdx.x == 0) *failure = RollbackFailure{failed, counts[failed], seen[failed], peak[failed]};
    return;
  }
  if (threadIdx.x == 0) *failure = RollbackFailure{-1, 0, 0, 0};
  for (int64_t row = threadIdx.x; row < batch; row += kThreads) {
    if (seen[row] > peak[row]) peak[row] = seen[row];
    seen[row] -= counts[row];
  }
}

constexpr int64_t kMaxSharedRows = 1024;  // up to this many rows, plan_kernel works in shared memory

// Plans the moves that reorder the rows of a cache (row_moves.h). One block, in which one thread plans: each step
// depends on the one before.
static __global__ void plan_kernel(
    const int64_t* source, int64_t batch, int64_t* num_readers, RowMove* moves, int64_t* num_moves) {
  __shared__ int64_t shared_source[kMaxSharedRows];
  __shared__ int64_t shared_readers[kMaxSharedRows];
  const bool shared = batch <= kMaxSharedRows;
  for (int64_t row = threadIdx.x; shared && row < batch; row += kThreads) shared_source[row] = source[row];
  __syncthreads();
  if (threadIdx.x > 0) return;
  *num_moves = shared ? plan_row_moves(shared_source, batch, shared_readers, moves)
                      : plan_row_moves(source, batch, num_readers, moves);
}

// Each thread makes all moves for one column, an access unit of every row, and holds the temporary row's unit.
template <typename Unit>
__global__ void move_rows_kernel(
    Unit* cache, const RowMove* __restrict__ moves, const int64_t* __restrict__ num_moves, int64_t row_units) {
  constexpr int kReadAhead = 4;  // moves whose reads are issued together: the plan allows reads ahead of earlier moves
  const int64_t count = *num_moves, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < row_units; i += step) {
    Unit* column = cache + i;
    Unit spare{};
    for (int64_t first = 0; first < count; first += kReadAhead) {
      RowMove now[kReadAhead];
      Unit content[kReadAhead];
      for (int k = 0; k < kReadAhead; ++k) {
        now[k] = first + k < count ? moves[first + k] : RowMove{kSpareRow, kSpareRow};
      }
      for (int k = 0; k < kReadAhead; ++k) {
        content[k] = now[k].from == kSpareRow ? spare : column[now[k].from * row_units];
        if (now[k].to == kSpareRow) spare = content[k];
      }
      for (int k = 0; k < kReadAhead; ++k) {
        if (now[k].to != kSpareRow) column[now[k].to * row_units] = content[k];
      }
    }
  }
}

// Zeros the rows listed in `rows`; blockIdx.y strides over the list.
template <typename Unit>
__global__ void zero_rows_kernel(Unit* cache, const int64_t* rows, int64_t count, int64_t batch, int64_t row_units) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t entry = blockIdx.y; entry < count; entry += gridDim.y) {
    const int64_t row = rows[entry];
    if (row < 0 || row >= batch) continue;
    Unit* to = cache + row * row_units;
    SINKATTN_NO_UNROLL
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < row_units; i += step) to[i] = Unit{};
  }
}

// Copies the visible tokens in stream order. A group of `lanes` threads writes one vector: item = kv_row * length + i.
template <typename Unit>
__global__ void linearise_kernel(
    Unit* __restrict__ out, const Unit* __restrict__ cache, const int64_t* __restrict__ seen, int64_t batch,
    int64_t kv_heads, int64_t units, RingLayout layout, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int vectors_per_block = kThreads / lanes;
  const int64_t length = layout.num_sinks + layout.window;
  const int64_t num_items = batch * kv_heads * length, step = int64_t{gridDim.x} * vectors_per_block;
  for (int64_t item = int64_t{blockIdx.x} * vectors_per_block + group; item < num_items; item += step) {
    const int64_t kv_row = item / length, i = item % length;
    const int64_t count = clamp(seen[kv_row / kv_heads], 0, kMaxTokens);
    const int64_t sinks = count < layout.num_sinks ? count : layout.num_sinks;
    const int64_t recent = count - sinks < layout.window ? count - sinks : layout.window;
    Unit* to = out + item * units;
    if (i < sinks + recent) {
      const int64_t token = i < sinks ? i : count - recent + (i - sinks);
      copy_vector(to, cache + (kv_row * layout.slots() + layout.slot(token)) * units, 1, units, lane, lanes);
    } else {
      SINKATTN_NO_UNROLL
      for (int64_t u = lane; u < units; u += lanes) to[u] = Unit{};
    }
  }
}

}  // namespace sinkattn
