// The fused kernel, compiled once for each instruction set.
//
// Few queries per key (decoding): rows x heads x stretches of slots are dealt out to the threads. Keys and values are
// read once, in storage order, for all heads of a group; softmax is taken online (arXiv 1805.02867), and the last
// stretch to be finished combines them. What is split, and how, depends on shapes alone, never on the threads.
//
// Many queries per key (chunks): rows x heads x blocks of queries are dealt out; blocks of keys and values are
// converted and transposed into a small buffer that stays in the processor's cache while all queries of a block use
// it, and blocks outside every window are skipped.
//
// Slots in storage order hold runs of consecutive tokens, so what a query sees in a run is an interval of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "attention.h"
#include "rotary.h"
// Last: what follows is compiled for the chosen instruction set.
#include "simd.h"
#include "simd_math.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kDirectBlock = 32;       // keys whose scores are held at once: with their values, in half of an L1
constexpr int kPackedBlock = 64;       // the same for packed keys
constexpr int64_t kStretch = 256;      // slots dealt out at once while decoding...
constexpr int64_t kMaxItems = 256;     // ...unless rows and heads alone make as many items
constexpr int64_t kPackedRows = 24;    // queries per key from which packing keys pays
constexpr int64_t kItemRows = 192;     // queries per key that share a packed block
constexpr int64_t kCallTokens = 512;   // tokens of a chunk that are taken at once: bounds the workspace
constexpr int64_t kWorkerBytes = 1 << 16;  // less than this is not worth a thread

// Row tiles: queries that go through the registers together.
constexpr int kPackedTile = 6;
constexpr int kPackedVectors = SINKATTN_VECTOR_REGISTERS >= 32 ? 4 : 2;
template <typename acc_t>
constexpr int kDirectTile = kLanes<acc_t> < 4 ? kLanes<acc_t> : 4;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <typename acc_t>
constexpr acc_t kMinusInfinity = -std::numeric_limits<acc_t>::infinity();

// Hands out a piece of memory in aligned arrays.
struct Arena {
  char* next;

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += round_up(count * sizeof(T), 64);
    return taken;
  }
};

// Calls work(item, worker) for every item, on up to `workers` threads, each taking the next item when it is free.
template <typename Work>
void for_each(Workers& threads, int64_t workers, int64_t items, const Work& work) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t items;
    const Work& work;
  } context{{0}, items, work};
  threads.run(
      workers,
      [](void* raw, int64_t worker) {
        auto& context = *static_cast<Context*>(raw);
        for (int64_t item; (item = context.next.fetch_add(1, std::memory_order_relaxed)) < context.items;) {
          context.work(item, worker);
        }
      },
      &context);
}

// Softmax so far of one query.
template <typename acc_t>
struct Softmax {
  acc_t top;    // largest score
  acc_t total;  // sum of exp(score - top)
};

// Turns the scores s[0, count) into weights exp(s - top) and returns the factor on everything summed before.
// s[count, round_up(count, lanes)) is overwritten with zeros.
template <typename acc_t>
SINKATTN_INLINE acc_t update(Softmax<acc_t>& state, acc_t* s, int count) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  const int padded = (count + lanes - 1) / lanes * lanes;
  for (int j = count; j < padded; ++j) s[j] = kMinusInfinity<acc_t>;
  V tops = load(s);
  for (int j = lanes; j < padded; j += lanes) tops = maximum(tops, load(s + j));
  const acc_t before = state.top;
  state.top = std::max(before, largest(tops));
  // If no score counts yet, any base will do: every weight is exp(-infinity).
  const acc_t base = state.top == kMinusInfinity<acc_t> ? 0 : state.top;
  V total{};
  for (int j = 0; j < padded; j += lanes) {
    const V weight = exp(load(s + j) - base);
    store(s + j, weight);
    total += weight;
  }
  const acc_t factor = before == base ? 1 : std::exp(before - base);
  state.total = state.total * factor + sum(total);
  return factor;
}

// Soft cap and ALiBi on the scores of one query; `distance` is that of the first key, and falls by one per key.
template <typename acc_t>
SINKATTN_INLINE void adjust(acc_t* s, int count, acc_t softcap, acc_t slope, int64_t distance) {
  using V = Vec<acc_t>;
  V index;
  for (int i = 0; i < kLanes<acc_t>; ++i) index[i] = static_cast<acc_t>(i);
  for (int j = 0; j < count; j += kLanes<acc_t>) {
    V x = load(s + j);
    if (softcap != 0) x = softcap * tanh(x / softcap);
    if (slope != 0) x -= slope * (static_cast<acc_t>(distance - j) - index);
    store(s + j, x);
  }
}

// Scores of kRows queries against up to kDirectBlock keys as they lie in the cache; `ahead` is memory to be read next, of
// as many rows.
template <int kRows, typename scalar_t, typename acc_t>
SINKATTN_INLINE void direct_scores(
    acc_t* scores, const acc_t* query, int64_t query_stride, const scalar_t* keys, int64_t dim, int count,
    const scalar_t* ahead, int64_t ahead_stride) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  constexpr int padded_rows = kRows == 3 ? 4 : kRows;
  constexpr int step = lanes / padded_rows;  // keys at a time, so that their sums fill one vector
  const int64_t whole = dim / lanes * lanes;
  for (int j = 0; j < count; j += step) {
    const scalar_t* key[step];
    for (int c = 0; c < step; ++c) key[c] = keys + std::min(j + c, count - 1) * dim;
    V partial[lanes] = {};
    for (int64_t d = 0; d < whole; d += lanes) {
      V q[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) q[r] = load(query + r * query_stride + d);
#pragma GCC unroll 16
      for (int c = 0; c < step; ++c) {
        const V k = load(key[c] + d);
        if (d * sizeof(scalar_t) % 64 == 0) __builtin_prefetch(ahead + (j + c) * ahead_stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) partial[r * step + c] = multiply_add(q[r], k, partial[r * step + c]);
      }
    }
    if (whole < dim) {
      for (int c = 0; c < step; ++c) {
        const V k = load_first(key[c] + whole, dim - whole);
        for (int r = 0; r < kRows; ++r) {
          partial[r * step + c] = multiply_add(load(query + r * query_stride + whole), k, partial[r * step + c]);
        }
      }
    }
    acc_t all[lanes];
    store(all, sums<lanes>(partial));
    for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kDirectBlock + j, all + r * step, step * sizeof(acc_t));
  }
}

// sums = factor * sums + weights times values for kRows queries and kVectors vectors of the values' elements; of the
// only vector just `part` elements if that is not 0.
template <int kRows, int kVectors, typename scalar_t, typename acc_t>
SINKATTN_INLINE void direct_sum_vectors(
    acc_t* sums, int64_t sums_stride, const acc_t* factor, const acc_t* weights, const scalar_t* values, int64_t dim,
    int count, const scalar_t* ahead, int64_t ahead_stride, int64_t part = 0) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  V x[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) x[r][c] = load(sums + r * sums_stride + c * lanes) * factor[r];
  }
  for (int j = 0; j < count; ++j) {
    for (unsigned d = 0; d < kVectors * lanes; d += 64 / sizeof(scalar_t)) {
      __builtin_prefetch(ahead + j * ahead_stride + d);
    }
    V v[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      const scalar_t* from = values + j * dim + c * lanes;
      v[c] = part ? load_first(from, part) : load(from);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V w = broadcast(weights[r * kDirectBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) x[r][c] = multiply_add(w, v[c], x[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(sums + r * sums_stride + c * lanes, x[r][c]);
  }
}

template <int kRows, typename scalar_t, typename acc_t>
SINKATTN_INLINE void direct_sum(
    acc_t* sums, int64_t sums_stride, const acc_t* factor, const acc_t* weights, const scalar_t* values, int64_t dim,
    int count, const scalar_t* ahead, int64_t ahead_stride) {
  constexpr int lanes = kLanes<acc_t>;
  constexpr int fitting = SINKATTN_VECTOR_REGISTERS / 2 / (kRows == 3 ? 4 : kRows);
  constexpr int vectors = fitting > 8 ? 8 : fitting;
  int64_t d = 0;
  for (; d + vectors * lanes <= dim; d += vectors * lanes) {
    direct_sum_vectors<kRows, vectors>(
        sums + d, sums_stride, factor, weights, values + d, dim, count, ahead + d, ahead_stride);
  }
  for (; d + lanes <= dim; d += lanes) {
    direct_sum_vectors<kRows, 1>(
        sums + d, sums_stride, factor, weights, values + d, dim, count, ahead + d, ahead_stride);
  }
  if (d < dim) {
    direct_sum_vectors<kRows, 1>(
        sums + d, sums_stride, factor, weights, values + d, dim, count, ahead + d, ahead_stride, dim - d);
  }
}

// c += a times b for kPackedTile rows of `a` and kVectors vectors of columns of `b`.
template <int kVectors, typename acc_t>
SINKATTN_INLINE void multiply_tile(
    Vec<acc_t> (&c)[kPackedTile][kVectors], const acc_t* a, int64_t a_stride, const acc_t* b, int64_t b_stride,
    int64_t depth) {
  using V = Vec<acc_t>;
  for (int64_t k = 0; k < depth; ++k) {
    V x[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) x[n] = load(b + k * b_stride + n * kLanes<acc_t>);
#pragma GCC unroll 6
    for (int m = 0; m < kPackedTile; ++m) {
      const V y = broadcast(a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) c[m][n] = multiply_add(y, x[n], c[m][n]);
    }
  }
}

// c = factor * c + a times b, `columns` (a multiple of the lanes) wide.
template <int kVectors = kPackedVectors, typename acc_t>
SINKATTN_INLINE void multiply(
    acc_t* c, int64_t c_stride, const acc_t* factor, const acc_t* a, int64_t a_stride, const acc_t* b,
    int64_t b_stride, int64_t depth, int64_t columns) {
  using V = Vec<acc_t>;
  constexpr int width = kVectors * kLanes<acc_t>;
  int64_t n = 0;
  for (; n + width <= columns; n += width) {
    V tile[kPackedTile][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kPackedTile; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        tile[r][v] = factor ? load(c + r * c_stride + n + v * kLanes<acc_t>) * factor[r] : V{};
      }
    }
    multiply_tile<kVectors>(tile, a, a_stride, b + n, b_stride, depth);
#pragma GCC unroll 6
    for (int r = 0; r < kPackedTile; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + n + v * kLanes<acc_t>, tile[r][v]);
    }
  }
  if constexpr (kVectors > 1) {
    if (n < columns) multiply<1>(c + n, c_stride, factor, a, a_stride, b + n, b_stride, depth, columns - n);
  }
}

// Keys transposed: packed[d * kPackedBlock + j] is element d of key j; columns beyond `count` are zero.
template <typename scalar_t, typename acc_t>
void pack_keys(acc_t* packed, const scalar_t* keys, int64_t dim, int count) {
  constexpr int lanes = kLanes<acc_t>;
  for (int64_t d = 0; d < dim; d += lanes) {
    for (int j = 0; j < kPackedBlock; j += lanes) {
      Vec<acc_t> square[lanes] = {};
      for (int i = 0; i < lanes && j + i < count; ++i) {
        const scalar_t* from = keys + (j + i) * dim + d;
        square[i] = d + lanes <= dim ? load(from) : load_first(from, dim - d);
      }
      transpose(square);
      for (int i = 0; i < lanes; ++i) store(packed + (d + i) * kPackedBlock + j, square[i]);
    }
  }
}

// Values widened, rows padded with zeros; returns whether all are finite.
template <typename scalar_t, typename acc_t>
bool pack_values(acc_t* packed, int64_t stride, const scalar_t* values, int64_t dim, int count) {
  constexpr int lanes = kLanes<acc_t>;
  Vec<acc_t> spoiled{};
  for (int j = 0; j < count; ++j) {
    for (int64_t d = 0; d < dim; d += lanes) {
      const scalar_t* from = values + j * dim + d;
      const Vec<acc_t> x = d + lanes <= dim ? load(from) : load_first(from, dim - d);
      store(packed + j * stride + d, x);
      spoiled += x * acc_t{0};
    }
  }
  return sum(spoiled) == 0;
}

template <typename scalar_t>
class Attention {
  using acc_t = typename Accumulate<scalar_t>::type;
  static constexpr int kTile = kDirectTile<acc_t>;

 public:
  Attention(const AttentionCall& call, Workers& threads)
      : call_(call),
        layout_(call.layout),
        threads_(threads),
        group_(call.heads / call.kv_heads),
        query_stride_(round_up(call.head_dim, kLanes<acc_t>)),
        sums_stride_(round_up(call.value_dim, kLanes<acc_t>)) {}

  void run() {
    // As many tokens can be appended before they attend without overwriting what the first of them sees.
    const bool append_first = call_.tokens <= layout_.headroom + 1;
    if (append_first && (call_.tokens == 1 || call_.tokens * group_ < kPackedRows)) return decode();
    for (int64_t start = 0; start < call_.tokens; start += kCallTokens) {
      chunk(start, std::min(kCallTokens, call_.tokens - start));
    }
  }

 private:
  int64_t tokens_of(int64_t row) const { return call_.lengths ? call_.lengths[row] : call_.tokens; }

  scalar_t* keys_of(int64_t item) const {
    return static_cast<scalar_t*>(call_.keys) + item * layout_.slots() * call_.head_dim;
  }
  scalar_t* values_of(int64_t item) const {
    return static_cast<scalar_t*>(call_.values) + item * layout_.slots() * call_.value_dim;
  }

  int64_t worker_count(int64_t items, int64_t bytes) const {
    return std::max<int64_t>(1, std::min({threads_.count(), items, bytes / kWorkerBytes}));
  }

  // Rotates the new key of a token and rounds it to the type of the cache.
  void write_key(scalar_t* to, int64_t row, int64_t kv_head, int64_t token) const {
    rotate_vector<scalar_t>(
        to, call_.key.at<scalar_t>(row, kv_head, token), call_.key.stride[3], call_.head_dim, call_.pairs,
        call_.pairs ? call_.cos.at<acc_t>(0, row, token) : nullptr,
        call_.pairs ? call_.sin.at<acc_t>(0, row, token) : nullptr, call_.cos.stride[3], call_.interleaved);
  }

  void write_value(scalar_t* to, int64_t row, int64_t kv_head, int64_t token) const {
    const scalar_t* from = call_.value.at<scalar_t>(row, kv_head, token);
    if (call_.value.stride[3] == 1) {
      std::memcpy(to, from, call_.value_dim * sizeof(scalar_t));
    } else {
      for (int64_t d = 0; d < call_.value_dim; ++d) to[d] = from[d * call_.value.stride[3]];
    }
  }

  // The query of one head, scaled: as window keys see it and as sink keys see it. `plain` is memory for one vector.
  void rotate_query(acc_t* window, acc_t* sink, acc_t* plain, int64_t row, int64_t head, int64_t token) const {
    const scalar_t* from = call_.query.at<scalar_t>(row, head, token);
    const int64_t stride = call_.query.stride[3];
    const acc_t scale = static_cast<acc_t>(call_.scale);
    for (int64_t d = 0; d < call_.head_dim; ++d) plain[d] = static_cast<acc_t>(from[d * stride]) * scale;
    const acc_t* tables[2][2] = {};
    for (int which = 0; which < 2 && call_.pairs; ++which) {
      tables[which][0] = call_.cos.at<acc_t>(which, row, token);
      tables[which][1] = call_.sin.at<acc_t>(which, row, token);
    }
    acc_t* to[2] = {window, sink};
    for (int which = 0; which < 2; ++which) {
      rotate_vector<acc_t>(
          to[which], plain, 1, call_.head_dim, call_.pairs, tables[which][0], tables[which][1], call_.cos.stride[3],
          call_.interleaved);
      for (int64_t d = call_.head_dim; d < query_stride_; ++d) to[which][d] = 0;
    }
  }

  // Part of a run that the query of `token` sees: [first, first + count) of its tokens.
  struct Interval {
    int64_t first, count;
  };
  Interval seen_by(int64_t token, const Run& run, bool sinks) const {
    const int64_t begin = std::max(run.token, sinks ? 0 : layout_.window_begin(token));
    const int64_t end = std::min(run.token + run.count, token + 1);
    return {begin - run.token, std::max<int64_t>(0, end - begin)};
  }

  // Cache-relative distance from the query of `token` to a key.
  int64_t distance(int64_t token, int64_t key_token, bool sink) const {
    return (sink ? layout_.position(token) : token) - key_token;
  }

  acc_t head_option(const void* option, int64_t head) const {
    return option ? static_cast<const acc_t*>(option)[head] : 0;
  }

  void write_out(int64_t row, int64_t token, int64_t head, const acc_t* sums, acc_t total) const {
    auto* out = static_cast<scalar_t*>(call_.out) +
                ((row * call_.tokens + token) * call_.heads + head) * call_.value_dim;
    for (int64_t d = 0; d < call_.value_dim; ++d) out[d] = static_cast<scalar_t>(sums[d] / total);
  }

  void zero_out(int64_t row, int64_t first, int64_t end, int64_t kv_head) const {
    for (int64_t token = first; token < end; ++token) {
      auto* out = static_cast<scalar_t*>(call_.out) +
                  ((row * call_.tokens + token) * call_.heads + kv_head * group_) * call_.value_dim;
      std::memset(static_cast<void*>(out), 0, group_ * call_.value_dim * sizeof(scalar_t));
    }
  }

  // Decoding

  struct DirectScratch {
    acc_t *window_query, *sink_query, *plain, *scores;
  };

  // What one stretch of slots contributes to one query.
  struct Partial {
    Softmax<acc_t>* state;
    acc_t* sums;
  };

  void decode() {
    const int64_t pairs = call_.batch * call_.kv_heads, slots = layout_.slots();
    const int64_t most = std::max<int64_t>(1, kMaxItems / std::max<int64_t>(1, pairs));
    const int64_t splits = std::min(most, (slots + kStretch - 1) / kStretch);
    const int64_t stretch = round_up((slots + splits - 1) / splits, 16);
    const int64_t queries = call_.tokens * group_;
    const int64_t items = pairs * splits;
    const int64_t workers =
        worker_count(items, pairs * slots * (call_.head_dim + call_.value_dim) * int64_t{sizeof(scalar_t)});

    const int64_t scratch_bytes = round_up(
        (2 * group_ + 1) * query_stride_ * sizeof(acc_t) + kTile * kDirectBlock * sizeof(acc_t) + 4 * 64, 64);
    const int64_t state_count = items * queries;
    Arena arena{threads_.workspace(
        workers * scratch_bytes + round_up(state_count * sizeof(Softmax<acc_t>), 64) +
        round_up(state_count * sums_stride_ * sizeof(acc_t), 64) + round_up(pairs * sizeof(std::atomic<int64_t>), 64))};
    auto* states = arena.take<Softmax<acc_t>>(state_count);
    auto* sums = arena.take<acc_t>(state_count * sums_stride_);
    auto* finished = arena.take<std::atomic<int64_t>>(pairs);
    for (int64_t pair = 0; pair < pairs; ++pair) new (finished + pair) std::atomic<int64_t>(0);
    char* scratch = arena.next;

    for_each(threads_, workers, items, [&](int64_t item, int64_t worker) {
      Arena own{scratch + worker * scratch_bytes};
      DirectScratch memory;
      memory.window_query = own.take<acc_t>(group_ * query_stride_);
      memory.sink_query = own.take<acc_t>(group_ * query_stride_);
      memory.plain = own.take<acc_t>(query_stride_);
      memory.scores = own.take<acc_t>(kTile * kDirectBlock);
      const int64_t pair = item / splits, split = item % splits;
      const Run slots_of_item{0, split * stretch, std::min(stretch, slots - split * stretch)};
      const Partial partial{states + item * queries, sums + item * queries * sums_stride_};
      append_to(pair, slots_of_item);
      attend_to(pair, slots_of_item, memory, partial);
      // The writes of all other stretches come before the last one's combination.
      if (finished[pair].fetch_add(1, std::memory_order_acq_rel) == splits - 1) {
        const int64_t first = pair * splits * queries;
        combine(pair, splits, {states + first, sums + first * sums_stride_});
      }
    });
  }

  // Writes those new tokens whose slots lie in the stretch; no other item reads or writes it.
  void append_to(int64_t pair, const Run& stretch) const {
    const int64_t row = pair / call_.kv_heads, kv_head = pair % call_.kv_heads;
    Run runs[RingLayout::kMaxRuns];
    const int n = layout_.write_runs(call_.seen[row], tokens_of(row), runs);
    for (int r = 0; r < n; ++r) {
      const int64_t begin = std::max(runs[r].slot, stretch.slot);
      const int64_t end = std::min(runs[r].slot + runs[r].count, stretch.slot + stretch.count);
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t token = runs[r].token + slot - runs[r].slot;
        write_key(keys_of(pair) + slot * call_.head_dim, row, kv_head, token);
        write_value(values_of(pair) + slot * call_.value_dim, row, kv_head, token);
      }
    }
  }

  void attend_to(int64_t pair, const Run& stretch, const DirectScratch& memory, const Partial& partial) const {
    const int64_t row = pair / call_.kv_heads, kv_head = pair % call_.kv_heads;
    const int64_t count = tokens_of(row), seen = call_.seen[row];
    Run runs[RingLayout::kMaxRuns];
    const int n = layout_.held_runs(seen + count, runs);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t g = 0; g < group_; ++g) {
        rotate_query(
            memory.window_query + g * query_stride_, memory.sink_query + g * query_stride_, memory.plain, row,
            kv_head * group_ + g, i);
        partial.state[i * group_ + g] = {kMinusInfinity<acc_t>, 0};
      }
      acc_t* sums = partial.sums + i * group_ * sums_stride_;
      std::fill(sums, sums + group_ * sums_stride_, acc_t{0});
      for (int r = 0; r < n; ++r) {
        const int64_t begin = std::max(runs[r].slot, stretch.slot);
        const int64_t end = std::min(runs[r].slot + runs[r].count, stretch.slot + stretch.count);
        if (begin >= end) continue;
        const bool sinks = runs[r].slot < layout_.num_sinks;
        const Run here{runs[r].token + begin - runs[r].slot, begin, end - begin};
        const Interval seen_here = seen_by(seen + i, here, sinks);
        const acc_t* query = sinks ? memory.sink_query : memory.window_query;
        for (int64_t j = 0; j < seen_here.count; j += kDirectBlock) {
          const int64_t first = seen_here.first + j;
          const Run block{here.token + first, here.slot + first, std::min<int64_t>(kDirectBlock, seen_here.count - j)};
          attend_block(pair, seen + i, block, sinks, query, memory.scores, {partial.state + i * group_, sums});
        }
      }
    }
  }

  void attend_block(
      int64_t pair, int64_t token, const Run& block, bool sinks, const acc_t* query, acc_t* scores,
      const Partial& partial) const {
    for (int64_t g = 0; g < group_; g += kTile) {
      const int64_t head = pair % call_.kv_heads * group_ + g;
      const acc_t* tile_query = query + g * query_stride_;
      const Partial tile{partial.state + g, partial.sums + g * sums_stride_};
      const int64_t far = distance(token, block.token, sinks);
      switch (std::min<int64_t>(kTile, group_ - g)) {
        case 1: attend_tile<1>(pair, head, block, far, tile_query, scores, tile); break;
        case 2: attend_tile<2>(pair, head, block, far, tile_query, scores, tile); break;
        case 3: if constexpr (kTile >= 4) attend_tile<3>(pair, head, block, far, tile_query, scores, tile); break;
        case 4: if constexpr (kTile >= 4) attend_tile<4>(pair, head, block, far, tile_query, scores, tile); break;
      }
    }
  }

  template <int kRows>
  void attend_tile(
      int64_t pair, int64_t head, const Run& block, int64_t far, const acc_t* query, acc_t* scores,
      const Partial& partial) const {
    const int count = static_cast<int>(block.count);
    const scalar_t* keys = keys_of(pair) + block.slot * call_.head_dim;
    const scalar_t* values = values_of(pair) + block.slot * call_.value_dim;
    direct_scores<kRows>(
        scores, query, query_stride_, keys, call_.head_dim, count, values, call_.value_dim);
    acc_t factor[kRows];
    for (int r = 0; r < kRows; ++r) {
      acc_t* s = scores + r * kDirectBlock;
      adjust_scores(s, count, head + r, far);
      factor[r] = update(partial.state[r], s, count);
    }
    direct_sum<kRows>(
        partial.sums, sums_stride_, factor, scores, values, call_.value_dim, count,
        keys + count * call_.head_dim, call_.head_dim);
  }

  void adjust_scores(acc_t* s, int count, int64_t head, int64_t far) const {
    if (call_.softcap == 0 && !call_.alibi_slopes) return;
    adjust(s, count, static_cast<acc_t>(call_.softcap), head_option(call_.alibi_slopes, head), far);
  }

  void combine(int64_t pair, int64_t splits, const Partial& partial) const {
    const int64_t row = pair / call_.kv_heads, kv_head = pair % call_.kv_heads;
    const int64_t count = tokens_of(row), queries = call_.tokens * group_;
    for (int64_t q = 0; q < count * group_; ++q) {
      const int64_t head = kv_head * group_ + q % group_;
      acc_t top = call_.sink_logits ? head_option(call_.sink_logits, head) : kMinusInfinity<acc_t>;
      for (int64_t s = 0; s < splits; ++s) top = std::max(top, partial.state[s * queries + q].top);
      const acc_t base = top == kMinusInfinity<acc_t> ? 0 : top;
      acc_t total = call_.sink_logits ? std::exp(head_option(call_.sink_logits, head) - base) : 0;
      acc_t* sums = partial.sums + q * sums_stride_;
      for (int64_t s = 0; s < splits; ++s) {
        const acc_t weight = std::exp(partial.state[s * queries + q].top - base);
        total += weight * partial.state[s * queries + q].total;
        const acc_t* more = partial.sums + (s * queries + q) * sums_stride_;
        for (int64_t d = 0; d < call_.value_dim; ++d) sums[d] = (s ? sums[d] : 0) + weight * more[d];
      }
      write_out(row, q / group_, head, sums, total);
    }
    zero_out(row, count, call_.tokens, kv_head);
  }

  // Chunks

  struct PackedScratch {
    acc_t *window_query, *sink_query, *plain, *sums, *scores, *keys, *values;
    Softmax<acc_t>* state;
  };

  // Tokens [start, start + count) of the call: rotated keys and values go to a buffer, then queries attend to what was
  // in the ring before and to the buffer, then the buffer goes to the ring. Sinks are never evicted, so they are
  // written at once.
  void chunk(int64_t start, int64_t count) {
    const int64_t pairs = call_.batch * call_.kv_heads;
    const int64_t item_tokens = std::max<int64_t>(1, kItemRows / group_);
    const int64_t blocks = (count + item_tokens - 1) / item_tokens;
    const int64_t rows = round_up(std::min(count, item_tokens) * group_, kPackedTile);
    const int64_t items = pairs * blocks;
    const int64_t workers = worker_count(
        items, pairs * count * (call_.head_dim + call_.value_dim) * int64_t{sizeof(scalar_t)} * 16);

    const int64_t scratch_bytes =
        round_up((2 * rows + 1 + kPackedBlock) * query_stride_ * sizeof(acc_t), 64) +
        round_up((rows + kPackedBlock) * sums_stride_ * sizeof(acc_t), 64) +
        round_up(kPackedTile * kPackedBlock * sizeof(acc_t) + rows * sizeof(Softmax<acc_t>), 64) + 8 * 64;
    const int64_t new_keys_bytes = round_up(pairs * count * call_.head_dim * sizeof(scalar_t), 64);
    Arena arena{threads_.workspace(
        workers * scratch_bytes + new_keys_bytes +
        round_up(pairs * count * call_.value_dim * sizeof(scalar_t), 64))};
    auto* new_keys = arena.take<scalar_t>(pairs * count * call_.head_dim);
    auto* new_values = arena.take<scalar_t>(pairs * count * call_.value_dim);
    char* scratch = arena.next;

    const auto counted = [&](int64_t row) { return std::clamp<int64_t>(tokens_of(row) - start, 0, count); };

    for_each(threads_, workers, pairs, [&](int64_t pair, int64_t) {
      const int64_t row = pair / call_.kv_heads, kv_head = pair % call_.kv_heads;
      for (int64_t i = 0; i < counted(row); ++i) {
        scalar_t* key = new_keys + (pair * count + i) * call_.head_dim;
        scalar_t* value = new_values + (pair * count + i) * call_.value_dim;
        write_key(key, row, kv_head, start + i);
        write_value(value, row, kv_head, start + i);
        const int64_t token = call_.seen[row] + start + i;
        if (token < layout_.num_sinks) write_slots(pair, {i, token, 1}, key, value);
      }
    });

    for_each(threads_, workers, items, [&](int64_t item, int64_t worker) {
      Arena own{scratch + worker * scratch_bytes};
      PackedScratch memory;
      memory.window_query = own.take<acc_t>(rows * query_stride_);
      memory.sink_query = own.take<acc_t>(rows * query_stride_);
      memory.plain = own.take<acc_t>(query_stride_);
      memory.keys = own.take<acc_t>(kPackedBlock * query_stride_);
      memory.sums = own.take<acc_t>(rows * sums_stride_);
      memory.values = own.take<acc_t>(kPackedBlock * sums_stride_);
      memory.scores = own.take<acc_t>(kPackedTile * kPackedBlock);
      memory.state = own.take<Softmax<acc_t>>(rows);
      const int64_t pair = item / blocks, first = item % blocks * item_tokens;
      const int64_t row = pair / call_.kv_heads;
      const int64_t end = std::min({first + item_tokens, count, counted(row)});
      if (first < end) {
        attend_packed(
            pair, start, first, end, new_keys + pair * count * call_.head_dim,
            new_values + pair * count * call_.value_dim, memory);
      }
      zero_out(
          row, start + std::max(first, end), start + std::min(first + item_tokens, count), pair % call_.kv_heads);
    });

    for_each(threads_, workers, pairs, [&](int64_t pair, int64_t) {
      const int64_t row = pair / call_.kv_heads;
      Run runs[RingLayout::kMaxRuns];
      const int n = layout_.write_runs(call_.seen[row] + start, counted(row), runs);
      for (int r = 0; r < n; ++r) {
        const int64_t from = pair * count + runs[r].token;
        write_slots(pair, runs[r], new_keys + from * call_.head_dim, new_values + from * call_.value_dim);
      }
    });
  }

  void write_slots(int64_t pair, const Run& run, const scalar_t* keys, const scalar_t* values) const {
    std::memcpy(
        static_cast<void*>(keys_of(pair) + run.slot * call_.head_dim), keys,
        run.count * call_.head_dim * sizeof(scalar_t));
    std::memcpy(
        static_cast<void*>(values_of(pair) + run.slot * call_.value_dim), values,
        run.count * call_.value_dim * sizeof(scalar_t));
  }

  // Queries of tokens [first, end) of a chunk that starts at token `start` of the call.
  void attend_packed(
      int64_t pair, int64_t start, int64_t first, int64_t end, const scalar_t* new_keys, const scalar_t* new_values,
      const PackedScratch& memory) const {
    const int64_t row = pair / call_.kv_heads, kv_head = pair % call_.kv_heads;
    const int64_t seen = call_.seen[row] + start;  // before the chunk
    const int64_t rows = (end - first) * group_, padded_rows = round_up(rows, kPackedTile);
    for (int64_t q = 0; q < rows; ++q) {
      rotate_query(
          memory.window_query + q * query_stride_, memory.sink_query + q * query_stride_, memory.plain, row,
          kv_head * group_ + q % group_, start + first + q / group_);
    }
    // What fills up the last tile sees nothing.
    for (acc_t* query : {memory.window_query, memory.sink_query}) {
      std::fill(query + rows * query_stride_, query + padded_rows * query_stride_, acc_t{0});
    }
    std::fill(memory.state, memory.state + padded_rows, Softmax<acc_t>{kMinusInfinity<acc_t>, 0});
    std::fill(memory.sums, memory.sums + padded_rows * sums_stride_, acc_t{0});

    const int64_t token = seen + first;
    const auto attend_run = [&](const Run& run, bool sinks, const scalar_t* keys, const scalar_t* values) {
      // What the first query to the last one see of it.
      const int64_t begin = std::max(run.token, sinks ? 0 : layout_.window_begin(token));
      const int64_t stop = std::min(run.token + run.count, seen + end);
      for (int64_t u = begin; u < stop; u += kPackedBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kPackedBlock, stop - u));
        pack_keys(memory.keys, keys + (u - run.token) * call_.head_dim, call_.head_dim, count);
        const bool finite = pack_values(
            memory.values, sums_stride_, values + (u - run.token) * call_.value_dim, call_.value_dim, count);
        for (int64_t q = 0; q < rows; q += kPackedTile) {
          attend_packed_tile(kv_head, token, {u, 0, count}, sinks, finite, q, rows, memory);
        }
      }
    };
    Run runs[RingLayout::kMaxRuns];
    const int n = layout_.held_runs(seen, runs);
    const int64_t sinks = std::min(seen + end, layout_.num_sinks);
    if (sinks > 0) attend_run({0, 0, sinks}, true, keys_of(pair), values_of(pair));
    for (int r = 0; r < n; ++r) {
      if (runs[r].slot < layout_.num_sinks) continue;
      attend_run(
          runs[r], false, keys_of(pair) + runs[r].slot * call_.head_dim,
          values_of(pair) + runs[r].slot * call_.value_dim);
    }
    const int64_t skip = std::clamp<int64_t>(layout_.num_sinks - seen, 0, end);
    attend_run(
        {seen + skip, 0, end - skip}, false, new_keys + skip * call_.head_dim, new_values + skip * call_.value_dim);

    for (int64_t q = 0; q < rows; ++q) {
      const int64_t head = kv_head * group_ + q % group_;
      Softmax<acc_t> state = memory.state[q];
      acc_t* sums = memory.sums + q * sums_stride_;
      if (call_.sink_logits) {
        acc_t logit = head_option(call_.sink_logits, head);
        const acc_t factor = add_logit(state, logit);
        for (int64_t d = 0; d < call_.value_dim; ++d) sums[d] *= factor;
      }
      write_out(row, start + first + q / group_, head, sums, state.total);
    }
  }

  // A score without a value.
  static acc_t add_logit(Softmax<acc_t>& state, acc_t logit) {
    const acc_t top = std::max(state.top, logit);
    const acc_t base = top == kMinusInfinity<acc_t> ? 0 : top;
    const acc_t factor = std::exp(state.top - base);
    state = {top, state.total * factor + std::exp(logit - base)};
    return factor;
  }

  // kPackedTile queries from number `q` on (rows of the packed queries, the first of them of `token`) against a block.
  void attend_packed_tile(
      int64_t kv_head, int64_t token, const Run& block, bool sinks, bool finite, int64_t q, int64_t rows,
      const PackedScratch& memory) const {
    Interval seen_here[kPackedTile];
    bool any = false, all = true;
    for (int r = 0; r < kPackedTile; ++r) {
      seen_here[r] = q + r < rows ? seen_by(token + (q + r) / group_, block, sinks) : Interval{0, 0};
      any |= seen_here[r].count > 0;
      all &= seen_here[r].count == block.count;
    }
    if (!any) return;
    const int count = static_cast<int>(block.count);
    const int columns = static_cast<int>(round_up(count, kLanes<acc_t>));
    const acc_t* query = (sinks ? memory.sink_query : memory.window_query) + q * query_stride_;
    multiply<kPackedVectors, acc_t>(
        memory.scores, kPackedBlock, nullptr, query, query_stride_, memory.keys, kPackedBlock, call_.head_dim, columns);
    acc_t factor[kPackedTile];
    for (int r = 0; r < kPackedTile; ++r) {
      acc_t* s = memory.scores + r * kPackedBlock;
      const Interval here = seen_here[r];
      if (here.count == 0) {
        std::fill(s, s + count, acc_t{0});
        factor[r] = 1;
        continue;
      }
      adjust_scores(
          s, count, kv_head * group_ + (q + r) % group_, distance(token + (q + r) / group_, block.token, sinks));
      std::fill(s, s + here.first, kMinusInfinity<acc_t>);
      std::fill(s + here.first + here.count, s + count, kMinusInfinity<acc_t>);
      factor[r] = update(memory.state[q + r], s, count);
    }
    acc_t* sums = memory.sums + q * sums_stride_;
    if (finite || all) {
      multiply<kPackedVectors, acc_t>(
          sums, sums_stride_, factor, memory.scores, kPackedBlock, memory.values, sums_stride_, count, sums_stride_);
      return;
    }
    // A hidden value that is no number has weight 0, and 0 times NaN is NaN: leave hidden values out.
    for (int r = 0; r < kPackedTile; ++r) {
      for (int64_t d = 0; d < call_.value_dim; ++d) {
        acc_t x = sums[r * sums_stride_ + d] * factor[r];
        for (int64_t j = seen_here[r].first; j < seen_here[r].first + seen_here[r].count; ++j) {
          x += memory.scores[r * kPackedBlock + j] * memory.values[j * sums_stride_ + d];
        }
        sums[r * sums_stride_ + d] = x;
      }
    }
  }

  const AttentionCall& call_;
  const RingLayout layout_;
  Workers& threads_;
  const int64_t group_;         // query heads per key head
  const int64_t query_stride_;  // head_dim in whole vectors
  const int64_t sums_stride_;   // value_dim in whole vectors
};

inline void attend(const AttentionCall& call, Workers& workers) {
  switch (call.type) {
    case CacheType::kFloat: return Attention<float>(call, workers).run();
    case CacheType::kDouble: return Attention<double>(call, workers).run();
    case CacheType::kHalf: return Attention<Half>(call, workers).run();
    case CacheType::kBFloat16: return Attention<BFloat16>(call, workers).run();
  }
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn

#if defined(__clang__) && (defined(SINKATTN_AVX512) || defined(SINKATTN_AVX2))
#pragma clang attribute pop
#endif
