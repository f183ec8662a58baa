// Kernels of the ring ops, and on the host what their launches follow from: plain addresses and sizes, no torch and no
// runtime API. Loops stride over the grid, so any grid is right; blocks have kThreads threads.
//
// What the CPU refuses for the content of a tensor is made harmless here: `lengths` are clamped to 0..tokens, `seen` to
// 0..2^61, a row number out of range in `source` or `rows` is left out.
#pragma once

#include <cstdint>

#include "ring.h"
#include "rotary.h"
#include "row_moves.h"

namespace sinkattn {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWidest = 16;  // bytes of the largest access

constexpr int64_t alignment(int64_t bytes) { return bytes < kWidest ? bytes : kWidest; }

// `n` elements that are loaded and stored in one access, or in several of kWidest bytes.
template <typename T, int n>
struct alignas(alignment(n * sizeof(T))) Pack {
  T at[n];
};

// Pack of as many elements as one access takes.
template <typename scalar_t>
constexpr int kPacked = kWidest / sizeof(scalar_t);

template <typename Unit, typename T>
__device__ const Unit& as(const T* data) {
  return *reinterpret_cast<const Unit*>(data);
}
template <typename Unit, typename T>
__device__ Unit& as(T* data) {
  return *reinterpret_cast<Unit*>(data);
}

__device__ inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

inline int64_t address(const void* data) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)); }

// Calls `launch` with a unit of the widest type, up to kWidest bytes, that divides `bytes`: addresses and sizes, joined
// by `|`.
template <typename Launch>
void with_widest_unit(int64_t bytes, const Launch& launch) {
  if (bytes % 16 == 0) launch(Pack<uint32_t, 4>{});
  else if (bytes % 8 == 0) launch(Pack<uint32_t, 2>{});
  else if (bytes % 4 == 0) launch(uint32_t{});
  else if (bytes % 2 == 0) launch(uint16_t{});
  else launch(uint8_t{});
}

// Threads of a warp that share a vector of so many units: a power of two, so that a warp takes whole vectors.
inline int lanes_for(int64_t units) {
  int lanes = 1;
  while (lanes < units && lanes < kWarp) lanes *= 2;
  return lanes;
}

// A [batch, heads, tokens, dim] tensor of any strides, in elements.
template <typename scalar_t>
struct NewTokens {
  const scalar_t* data;
  int64_t row, head, token, element;

  __device__ const scalar_t* at(int64_t r, int64_t h, int64_t t) const { return data + r * row + h * head + t * token; }
};

// Rotary tables [batch, tokens, pairs] of equal strides; no pairs when keys are written as they are.
template <typename acc_t>
struct Tables {
  const acc_t* cos;
  const acc_t* sin;
  int64_t row, token, pair, pairs;
};

template <typename scalar_t>
struct AppendCall {
  using acc_t = typename Accumulate<scalar_t>::type;

  scalar_t* keys;
  scalar_t* values;
  NewTokens<scalar_t> key, value;
  const int64_t* seen;
  const int64_t* lengths;  // null: all bring `tokens`
  Tables<acc_t> tables;
  int64_t batch, heads, tokens, key_dim, value_dim;
  RingLayout layout;
  bool interleaved;

  // Tokens of one head that are written at most.
  SINKATTN_HOST_DEVICE int64_t written() const { return tokens < layout.slots() ? tokens : layout.slots(); }
  SINKATTN_HOST_DEVICE int64_t items() const { return batch * heads * written(); }

  // Whether all accesses can be packs.
  bool packs() const {
    constexpr int64_t n = kPacked<scalar_t>, size = sizeof(scalar_t);
    const auto packed = [&](const scalar_t* cache, const NewTokens<scalar_t>& x, int64_t dim) {
      const int64_t bytes = address(cache) | address(x.data) | (x.row | x.head | x.token | dim) * size;
      return bytes % kWidest == 0 && x.element == 1;
    };
    if (!packed(keys, key, key_dim) || !packed(values, value, value_dim)) return false;
    if (tables.pairs == 0) return true;
    const int64_t entry = sizeof(acc_t), entries = interleaved ? n / 2 : n;  // of the tables, for one pack
    const int64_t bytes = address(tables.cos) | address(tables.sin) | (tables.row | tables.token) * entry;
    return tables.pair == 1 && bytes % alignment(entries * entry) == 0 && tables.pairs % entries == 0;
  }

  int key_lanes(bool packed) const {
    const int64_t n = packed ? kPacked<scalar_t> : 1;
    const int64_t turned = packed && interleaved ? 2 * tables.pairs : tables.pairs, copied = key_dim - 2 * tables.pairs;
    return lanes_for((turned > copied ? turned : copied) / n);
  }
  int value_lanes(bool packed) const { return lanes_for(value_dim / (packed ? kPacked<scalar_t> : 1)); }
};

// rotate_vector in packs, by one of `lanes` threads.
template <typename scalar_t, typename acc_t>
__device__ void rotate_packs(
    scalar_t* __restrict__ out, const scalar_t* __restrict__ in, int64_t head_dim, int64_t pairs,
    const acc_t* __restrict__ cos, const acc_t* __restrict__ sin, bool interleaved, int lane, int lanes) {
  constexpr int n = kPacked<scalar_t>;
  using Unit = Pack<scalar_t, n>;
  const int64_t first = lane * n, step = lanes * n;
  if (interleaved) {
    SINKATTN_ROLLED
    for (int64_t i = first; i < 2 * pairs; i += step) {
      Unit x = as<Unit>(in + i);
      const auto c = as<Pack<acc_t, n / 2>>(cos + i / 2), s = as<Pack<acc_t, n / 2>>(sin + i / 2);
      for (int k = 0; k < n / 2; ++k) rotate_pair(x.at[2 * k], x.at[2 * k + 1], c.at[k], s.at[k]);
      as<Unit>(out + i) = x;
    }
  } else {
    SINKATTN_ROLLED
    for (int64_t i = first; i < pairs; i += step) {
      Unit x = as<Unit>(in + i), y = as<Unit>(in + pairs + i);
      const auto c = as<Pack<acc_t, n>>(cos + i), s = as<Pack<acc_t, n>>(sin + i);
      for (int k = 0; k < n; ++k) rotate_pair(x.at[k], y.at[k], c.at[k], s.at[k]);
      as<Unit>(out + i) = x;
      as<Unit>(out + pairs + i) = y;
    }
  }
  SINKATTN_ROLLED
  for (int64_t i = 2 * pairs + first; i < head_dim; i += step) as<Unit>(out + i) = as<Unit>(in + i);
}

template <typename Unit>
__device__ void copy_vector(
    Unit* __restrict__ out, const Unit* __restrict__ in, int64_t in_stride, int64_t count, int lane, int lanes) {
  SINKATTN_ROLLED
  for (int64_t i = lane; i < count; i += lanes) out[i] = in[i * in_stride];
}

// Blocks in the second row of the grid write values, those in the first write keys: neither waits for the other. Some
// lanes write one token of one head: item = (row * heads + head) * written + i, token i of those that stay.
template <typename scalar_t, bool packed>
__global__ void append_kernel(AppendCall<scalar_t> call, int key_lanes, int value_lanes) {
  const bool is_key = blockIdx.y == 0;
  const int lanes = is_key ? key_lanes : value_lanes, at_once = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int64_t written = call.written(), items = call.items(), step = int64_t{gridDim.x} * at_once;
  for (int64_t item = int64_t{blockIdx.x} * at_once + group; item < items; item += step) {
    const int64_t vector = item / written;
    const int64_t row = vector / call.heads, head = vector % call.heads;
    const int64_t before = clamp(call.seen[row], 0, kMaxTokens);
    const int64_t count = call.lengths ? clamp(call.lengths[row], 0, call.tokens) : call.tokens;
    const int64_t token = call.layout.written_token(before, count, item % written);
    if (token == count) continue;  // a row that brings fewer tokens than another
    const int64_t target = vector * call.layout.slots() + call.layout.slot(before + token);
    if (is_key) {
      scalar_t* to = call.keys + target * call.key_dim;
      const scalar_t* from = call.key.at(row, head, token);
      const auto& tables = call.tables;
      const int64_t table = row * tables.row + token * tables.token;
      const auto *cos = tables.cos + table, *sin = tables.sin + table;
      if constexpr (packed) {
        rotate_packs(to, from, call.key_dim, tables.pairs, cos, sin, call.interleaved, lane, lanes);
      } else {
        rotate_vector<scalar_t>(
            to, from, call.key.element, call.key_dim, tables.pairs, cos, sin, tables.pair, call.interleaved, lane,
            lanes);
      }
    } else {
      scalar_t* to = call.values + target * call.value_dim;
      const scalar_t* from = call.value.at(row, head, token);
      if constexpr (packed) {
        using Unit = Pack<scalar_t, kPacked<scalar_t>>;
        copy_vector(&as<Unit>(to), &as<Unit>(from), 1, call.value_dim / kPacked<scalar_t>, lane, lanes);
      } else {
        copy_vector(to, from, call.value.element, call.value_dim, lane, lanes);
      }
    }
  }
}

// The first row that cannot go back as far as it is asked to, and why; row is -1 when every row can.
struct Refusal {
  int64_t row, count, seen, peak;
};

// One block, so that no row changes before every row is known to be able to. The arithmetic is that of ring_cache.cpp.
static __global__ void rollback_kernel(
    int64_t* seen, int64_t* peak, const int64_t* counts, int64_t batch, int64_t headroom, Refusal* refusal) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = batch;
  __syncthreads();
  for (int64_t row = threadIdx.x; row < batch; row += kThreads) {
    const int64_t count = counts[row];
    const int64_t peak_now = peak[row] > seen[row] ? peak[row] : seen[row];
    const bool possible = count >= 0 && count <= seen[row];
    // What was rolled back before still has its slots, so it counts until as much is appended again.
    const bool kept = count == 0 || peak_now - (seen[row] - count) <= headroom;
    if (!(possible && kept)) atomicMin(&first, static_cast<unsigned long long>(row));
  }
  __syncthreads();
  const int64_t refused = first;
  if (refused < batch) {
    if (threadIdx.x == 0) *refusal = Refusal{refused, counts[refused], seen[refused], peak[refused]};
    return;
  }
  if (threadIdx.x == 0) *refusal = Refusal{-1, 0, 0, 0};
  for (int64_t row = threadIdx.x; row < batch; row += kThreads) {
    if (seen[row] > peak[row]) peak[row] = seen[row];
    seen[row] -= counts[row];
  }
}

constexpr int64_t kSharedRows = 1024;  // of which a plan is made in fast memory

// The moves that reorder the rows of a cache, by one thread: each step depends on the one before. One block.
static __global__ void plan_kernel(
    const int64_t* source, int64_t batch, int64_t* readers, RowMove* moves, int64_t* move_count) {
  __shared__ int64_t shared_source[kSharedRows];
  __shared__ int64_t shared_readers[kSharedRows];
  const bool shared = batch <= kSharedRows;
  for (int64_t row = threadIdx.x; shared && row < batch; row += kThreads) shared_source[row] = source[row];
  __syncthreads();
  if (threadIdx.x > 0) return;
  *move_count = shared ? plan_row_moves(shared_source, batch, shared_readers, moves)
                       : plan_row_moves(source, batch, readers, moves);
}

// Each thread does all moves of a column, one unit of each row, and holds the spare of that column.
template <typename Unit>
__global__ void move_rows_kernel(
    Unit* cache, const RowMove* __restrict__ moves, const int64_t* __restrict__ move_count, int64_t row_units) {
  constexpr int kAhead = 4;  // reads done together; a plan lets them precede its moves
  const int64_t count = *move_count, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < row_units; i += step) {
    Unit* column = cache + i;
    Unit spare{};
    for (int64_t first = 0; first < count; first += kAhead) {
      RowMove now[kAhead];
      Unit content[kAhead];
      for (int k = 0; k < kAhead; ++k) {
        now[k] = first + k < count ? moves[first + k] : RowMove{kSpareRow, kSpareRow};
      }
      for (int k = 0; k < kAhead; ++k) {
        content[k] = now[k].from == kSpareRow ? spare : column[now[k].from * row_units];
        if (now[k].to == kSpareRow) spare = content[k];
      }
      for (int k = 0; k < kAhead; ++k) {
        if (now[k].to != kSpareRow) column[now[k].to * row_units] = content[k];
      }
    }
  }
}

// Rows of the grid take rows of the list.
template <typename Unit>
__global__ void zero_rows_kernel(Unit* cache, const int64_t* rows, int64_t count, int64_t batch, int64_t row_units) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t entry = blockIdx.y; entry < count; entry += gridDim.y) {
    const int64_t row = rows[entry];
    if (row < 0 || row >= batch) continue;
    Unit* to = cache + row * row_units;
    SINKATTN_ROLLED
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < row_units; i += step) to[i] = Unit{};
  }
}

// Some lanes write one vector of the copy: item = (row * heads + head) * length + i.
template <typename Unit>
__global__ void linearise_kernel(
    Unit* __restrict__ out, const Unit* __restrict__ cache, const int64_t* __restrict__ seen, int64_t batch,
    int64_t heads, int64_t units, RingLayout layout, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int at_once = kThreads / lanes;
  const int64_t length = layout.num_sinks + layout.window;
  const int64_t items = batch * heads * length, step = int64_t{gridDim.x} * at_once;
  for (int64_t item = int64_t{blockIdx.x} * at_once + group; item < items; item += step) {
    const int64_t vector = item / length, i = item % length;
    const int64_t count = clamp(seen[vector / heads], 0, kMaxTokens);
    const int64_t sinks = count < layout.num_sinks ? count : layout.num_sinks;
    const int64_t recent = count - sinks < layout.window ? count - sinks : layout.window;
    Unit* to = out + item * units;
    if (i < sinks + recent) {
      const int64_t token = i < sinks ? i : count - recent + (i - sinks);
      copy_vector(to, cache + (vector * layout.slots() + layout.slot(token)) * units, 1, units, lane, lanes);
    } else {
      SINKATTN_ROLLED
      for (int64_t u = lane; u < units; u += lanes) to[u] = Unit{};
    }
  }
}

}  // namespace sinkattn
