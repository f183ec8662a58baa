// What decoding and chunks have in common: where a call's data lie, and what a query sees.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "attention_softmax.h"
#include "rotary.h"
#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kWorkerBytes = 1 << 16;  // less than this is not worth a thread

// Hands out a piece of memory in aligned arrays.
struct Arena {
  char* next;

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += bytes<T>(count);
    return taken;
  }

  template <typename T>
  static constexpr int64_t bytes(int64_t count) {
    return round_up(count * sizeof(T), 64);
  }
};

// Calls work(item, worker) for every item, on up to `workers` threads, each taking the next item when it is free.
template <typename Work>
void for_each(Workers& threads, int64_t workers, int64_t items, const Work& work) {
  struct Context {
    std::atomic<int64_t> next;
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

// A `pair` is one key head of one row.
template <typename scalar_t>
class AttentionRows {
 protected:
  using acc_t = typename Accumulate<scalar_t>::type;

  AttentionRows(const AttentionCall& call, Workers& threads)
      : call_(call),
        layout_(call.layout),
        threads_(threads),
        pairs_(call.batch * call.kv_heads),
        group_(call.heads / call.kv_heads),
        query_stride_(round_up(call.head_dim, kLanes<acc_t>)),
        sums_stride_(round_up(call.value_dim, kLanes<acc_t>)) {
    int exponent = 0;
    scale_ = static_cast<acc_t>(std::frexp(call.scale, &exponent));
    power_ = static_cast<acc_t>(std::ldexp(1.0, exponent));
  }

  int64_t row_of(int64_t pair) const { return pair / call_.kv_heads; }
  int64_t kv_head_of(int64_t pair) const { return pair % call_.kv_heads; }
  int64_t tokens_of(int64_t row) const { return call_.lengths ? call_.lengths[row] : call_.tokens; }

  scalar_t* keys_of(int64_t pair) const {
    return static_cast<scalar_t*>(call_.keys) + pair * layout_.slots() * call_.head_dim;
  }
  scalar_t* values_of(int64_t pair) const {
    return static_cast<scalar_t*>(call_.values) + pair * layout_.slots() * call_.value_dim;
  }

  // Bytes of `count` keys and values of every pair.
  int64_t cache_bytes(int64_t count) const {
    return pairs_ * count * (call_.head_dim + call_.value_dim) * int64_t{sizeof(scalar_t)};
  }

  int64_t workers_for(int64_t items, int64_t bytes) const {
    return std::max<int64_t>(1, std::min({threads_.count(), items, bytes / kWorkerBytes}));
  }

  // The new key of a token, rotated and rounded to the type of the cache.
  void write_key(scalar_t* to, int64_t pair, int64_t token) const {
    const int64_t row = row_of(pair);
    rotate(to, call_.key.at<scalar_t>(row, kv_head_of(pair), token), call_.key.stride[3], 0, row, token);
  }

  void write_value(scalar_t* to, int64_t pair, int64_t token) const {
    const scalar_t* from = call_.value.at<scalar_t>(row_of(pair), kv_head_of(pair), token);
    const int64_t stride = call_.value.stride[3];
    if (stride == 1) {
      std::copy_n(from, call_.value_dim, to);
    } else {
      for (int64_t d = 0; d < call_.value_dim; ++d) to[d] = from[d * stride];
    }
  }

  // The query of one head, as window keys and as sink keys see it, in whole vectors; `plain` is memory for one.
  // It takes in the power of two of the scale, which is exact and keeps sums in range.
  void rotate_query(acc_t* window, acc_t* sink, acc_t* plain, int64_t row, int64_t head, int64_t token) const {
    const scalar_t* from = call_.query.at<scalar_t>(row, head, token);
    const int64_t stride = call_.query.stride[3];
    constexpr int lanes = kLanes<acc_t>;
    int64_t d = 0;
    for (; stride == 1 && d + lanes <= call_.head_dim; d += lanes) store(plain + d, load(from + d) * power_);
    for (; d < call_.head_dim; ++d) plain[d] = static_cast<acc_t>(from[d * stride]) * power_;
    rotate(window, plain, 1, 0, row, token);
    rotate(sink, plain, 1, 1, row, token);
    std::fill(window + call_.head_dim, window + query_stride_, acc_t{0});
    std::fill(sink + call_.head_dim, sink + query_stride_, acc_t{0});
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

  // Soft cap and ALiBi on the scores of a query of `token` against consecutive keys from `key_token` on.
  void adjust_scores(acc_t* scores, int count, int64_t head, int64_t token, int64_t key_token, bool sinks) const {
    if (call_.softcap == 0 && !call_.alibi_slopes) return;
    const int64_t position = sinks ? layout_.position(token) : token;
    adjust(
        scores, count, static_cast<acc_t>(call_.softcap), option(call_.alibi_slopes, head, 0), position - key_token);
  }

  static acc_t option(const void* by_head, int64_t head, acc_t otherwise) {
    return by_head ? static_cast<const acc_t*>(by_head)[head] : otherwise;
  }

  void write_out(int64_t row, int64_t token, int64_t head, const acc_t* sums, acc_t total) const {
    scalar_t* out = out_of(row, token, head);
    constexpr int lanes = kLanes<acc_t>;
    int64_t d = 0;
    for (; d + lanes <= call_.value_dim; d += lanes) store(out + d, load(sums + d) / total);
    for (; d < call_.value_dim; ++d) out[d] = static_cast<scalar_t>(sums[d] / total);
  }

  // Tokens [first, end) are padding.
  void write_zeros(int64_t pair, int64_t first, int64_t end) const {
    for (int64_t token = first; token < end; ++token) {
      scalar_t* out = out_of(row_of(pair), token, kv_head_of(pair) * group_);
      std::memset(static_cast<void*>(out), 0, group_ * call_.value_dim * sizeof(scalar_t));
    }
  }

  // Rotates by the tables of stream positions (0) or cache-relative positions (1).
  template <typename T>
  void rotate(T* to, const T* from, int64_t stride, int64_t which, int64_t row, int64_t token) const {
    const acc_t* cos = call_.pairs ? call_.cos.at<acc_t>(which, row, token) : nullptr;
    const acc_t* sin = call_.pairs ? call_.sin.at<acc_t>(which, row, token) : nullptr;
    const int64_t dim = call_.head_dim, pairs = call_.pairs, table_stride = call_.cos.stride[3];
    if (stride == 1 && table_stride == 1) {  // with strides that the compiler knows it uses vectors
      rotate_vector<T>(to, from, 1, dim, pairs, cos, sin, 1, call_.interleaved);
    } else {
      rotate_vector<T>(to, from, stride, dim, pairs, cos, sin, table_stride, call_.interleaved);
    }
  }

  const AttentionCall& call_;
  const RingLayout layout_;
  Workers& threads_;
  const int64_t pairs_;
  const int64_t group_;         // query heads per key head
  const int64_t query_stride_;  // head_dim in whole vectors
  const int64_t sums_stride_;   // value_dim in whole vectors
  acc_t scale_;                 // factor on the scores that is left...
  acc_t power_;                 // ...once queries have taken in a power of two

 private:
  scalar_t* out_of(int64_t row, int64_t token, int64_t head) const {
    return static_cast<scalar_t*>(call_.out) + ((row * call_.tokens + token) * call_.heads + head) * call_.value_dim;
  }
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
