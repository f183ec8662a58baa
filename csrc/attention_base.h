// Base class of Decode (attention_decode.h), Chunk (attention_chunk.h) and Backward (attention_backward.h), which include
// it: addresses of a call's data, rotation, visibility, writing of keys, values and outputs; and work distribution over
// threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention.h"
#include "attention_softmax.h"
#include "instruction_sets.h"
#include "quantise.h"
#include "rotary.h"
#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kMinWorkerBytes = 1 << 16;  // a thread with fewer cache bytes to read costs more than it saves

// Bump allocator over a workspace: arrays aligned to 64 bytes.
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

// Calls work(item, worker) for every item in [0, num_items). A worker takes consecutive items, so that what it
// prefetches at the end of one is what it reads next, and then what other workers have left of theirs.
template <typename Work>
void for_each_item(Workers& workers, int64_t num_workers, int64_t num_items, const Work& work) {
  constexpr int64_t kMaxRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Context {
    Range ranges[kMaxRanges];
    int64_t num_ranges;
    const Work& work;
  } context{{}, std::min(num_workers, kMaxRanges), work};
  for (int64_t i = 0; i < context.num_ranges; ++i) {
    context.ranges[i].next.store(num_items * i / context.num_ranges, std::memory_order_relaxed);
    context.ranges[i].end = num_items * (i + 1) / context.num_ranges;
  }
  workers.run(
      num_workers,
      [](void* raw, int64_t worker) {
        auto& context = *static_cast<Context*>(raw);
        for (int64_t i = 0; i < context.num_ranges; ++i) {
          Range& range = context.ranges[(worker + i) % context.num_ranges];
          for (int64_t item; (item = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
            context.work(item, worker);
          }
        }
      },
      &context);
}

// A KV row is one KV head of one batch row: kv_row = row * kv_heads + kv_head.
template <typename scalar_t>
class AttentionBase {
 protected:
  using acc_t = typename Accumulate<scalar_t>::type;

  AttentionBase(const AttentionCall& call, Workers& workers)
      : call_(call),
        layout_(call.layout),
        workers_(workers),
        num_kv_rows_(call.batch * call.kv_heads),
        group_size_(call.heads / call.kv_heads),
        query_stride_(round_up(call.head_dim, kLanes<acc_t>)),
        acc_stride_(round_up(call.value_dim, kLanes<acc_t>)) {
    int exponent = 0;
    score_scale_ = static_cast<acc_t>(std::frexp(call.scale, &exponent));
    query_scale_ = static_cast<acc_t>(std::ldexp(1.0, exponent));
  }

  int64_t row_of(int64_t kv_row) const { return kv_row / call_.kv_heads; }
  int64_t kv_head_of(int64_t kv_row) const { return kv_row % call_.kv_heads; }
  int64_t tokens_of(int64_t row) const { return call_.lengths ? call_.lengths[row] : call_.tokens; }

  RingLayout layout_of(int64_t row) const {
    return layout_.of_row(
        call_.row_sinks ? call_.row_sinks[row] : layout_.num_sinks, call_.begins ? call_.begins[row] : 0);
  }

  // Keys or values of consecutive slots, or of consecutive tokens in a buffer.
  struct Vectors {
    char* data;
    float* scales;  // null if elements are scalar_t, else they are of 8 bits

    Vectors after(int64_t count, int64_t dim) const {
      if (scales) return {data + count * dim, scales + count};
      return {data + count * dim * int64_t{sizeof(scalar_t)}, nullptr};
    }
  };

  // Keys and values from a slot on: as far as the sinks go, or to the end of the ring.
  Vectors keys_of(int64_t kv_row, int64_t slot) const {
    return slots_of(kv_row, slot, call_.head_dim, call_.keys, call_.sink_keys, call_.key_scales);
  }
  Vectors values_of(int64_t kv_row, int64_t slot) const {
    return slots_of(kv_row, slot, call_.value_dim, call_.values, call_.sink_values, call_.value_scales);
  }

  // Calls use(elements) with the address of the elements in the type that they have.
  template <typename Use>
  void with_elements(const Vectors& vectors, const Use& use) const {
    if constexpr (kCanQuantise) {
      if (vectors.scales && call_.ring == RingType::kInt8) return use(reinterpret_cast<int8_t*>(vectors.data));
      if (vectors.scales) return use(reinterpret_cast<Float8*>(vectors.data));
    }
    use(reinterpret_cast<scalar_t*>(vectors.data));
  }

  // Multiplies rows of scores or weights by the scales of `count` keys or values, whose elements are as `load` returns
  // them. Rows go on to a whole vector, in which they are not used.
  void multiply_by_scales(acc_t* x, int64_t stride, int64_t rows, const float* scales, int64_t count) const {
    if constexpr (kCanQuantise) {
      constexpr int lanes = kLanes<acc_t>;
      const acc_t load_scale = call_.ring == RingType::kFloat8 ? kLoadScale<Float8> : 1;
      for (int64_t j = 0; j < count; j += lanes) {
        const Vec<acc_t> s = (j + lanes <= count ? load(scales + j) : load_first(scales + j, count - j)) * load_scale;
        for (acc_t* to = x + j; to < x + rows * stride; to += stride) store(to, load(to) * s);
      }
    }
  }

  int64_t element_bytes() const { return call_.ring == RingType::kWhole ? sizeof(scalar_t) : 1; }

  // Bytes of `count` keys and values of every KV row in the ring.
  int64_t cache_bytes(int64_t count) const {
    return num_kv_rows_ * count * (call_.head_dim + call_.value_dim) * element_bytes();
  }

  int64_t num_workers_for(int64_t num_items, int64_t bytes) const {
    return std::max<int64_t>(1, std::min({workers_.max_workers(), num_items, bytes / kMinWorkerBytes}));
  }

  // Writes the new key or value of a token as it is held there. `buffer` has room for a key.
  void write_key(const Vectors& to, int64_t kv_row, int64_t token, acc_t* buffer) const {
    if (!to.scales) return write_key(reinterpret_cast<scalar_t*>(to.data), kv_row, token);
    write_key(buffer, kv_row, token);
    hadamard_vector(buffer, call_.head_dim);
    quantise_to(to, buffer, 1, call_.head_dim);
  }
  void write_value(const Vectors& to, int64_t kv_row, int64_t token) const {
    if (!to.scales) return write_value(reinterpret_cast<scalar_t*>(to.data), kv_row, token);
    const scalar_t* from = call_.value.at<scalar_t>(row_of(kv_row), kv_head_of(kv_row), token);
    quantise_to(to, from, call_.value.stride[3], call_.value_dim);
  }

  // Writes the new key of a token, rotated at its stream position and rounded to scalar_t.
  template <typename out_t>
  void write_key(out_t* to, int64_t kv_row, int64_t token) const {
    const int64_t row = row_of(kv_row);
    rotate(to, call_.key.at<scalar_t>(row, kv_head_of(kv_row), token), call_.key.stride[3], 0, row, token);
  }

  void write_value(scalar_t* to, int64_t kv_row, int64_t token) const {
    const scalar_t* from = call_.value.at<scalar_t>(row_of(kv_row), kv_head_of(kv_row), token);
    const int64_t stride = call_.value.stride[3];
    if (stride == 1) {
      std::copy_n(from, call_.value_dim, to);
    } else {
      for (int64_t d = 0; d < call_.value_dim; ++d) to[d] = from[d * stride];
    }
  }

  // Rotates the query of one head twice: into `window` at its stream position, for window keys, and into `sink` at its
  // cache-relative position, for sink keys, unless that is null. Both are padded with zeros to query_stride_.
  // `unrotated` is scratch for one query. The power of two in the softmax scale is multiplied in here: that is exact and
  // keeps the dot products in range. For keys of 8 bits, which are transformed, `window` is so, too.
  void rotate_query(acc_t* window, acc_t* sink, acc_t* unrotated, int64_t row, int64_t head, int64_t token) const {
    const scalar_t* from = call_.query.at<scalar_t>(row, head, token);
    const int64_t stride = call_.query.stride[3];
    constexpr int lanes = kLanes<acc_t>;
    int64_t d = 0;
    for (; stride == 1 && d + lanes <= call_.head_dim; d += lanes) store(unrotated + d, load(from + d) * query_scale_);
    for (; d < call_.head_dim; ++d) unrotated[d] = static_cast<acc_t>(from[d * stride]) * query_scale_;
    rotate(window, unrotated, 1, 0, row, token);
    if (sink) rotate(sink, unrotated, 1, 1, row, token);
    if (call_.ring != RingType::kWhole) {
      hadamard_vector(window, call_.head_dim);
      const acc_t inverse = acc_t{1} / static_cast<acc_t>(hadamard_block(call_.head_dim));
      for (int64_t i = 0; i < call_.head_dim; ++i) window[i] *= inverse;
    }
    std::fill(window + call_.head_dim, window + query_stride_, acc_t{0});
    if (sink) std::fill(sink + call_.head_dim, sink + query_stride_, acc_t{0});
  }

  // The tokens of a run that the query of `token` sees: [first, first + count), counted from the start of the run.
  struct Interval {
    int64_t first, count;
  };
  static Interval visible_interval(const RingLayout& layout, int64_t token, const Run& run, bool is_sink) {
    const int64_t begin = std::max(run.token, is_sink ? 0 : layout.window_begin(token));
    const int64_t end = std::min(run.token + run.count, token + 1);
    return {begin - run.token, std::max<int64_t>(0, end - begin)};
  }

  // Applies softcap and ALiBi to the scores of a query of `token` with `count` consecutive keys from `key_token` on.
  void adjust_scores(
      const RingLayout& layout, acc_t* scores, int count, int64_t head, int64_t token, int64_t key_token,
      bool is_sink) const {
    if (call_.softcap == 0 && !call_.alibi_slopes) return;
    const int64_t position = is_sink ? layout.position(token) : token;
    apply_softcap_and_alibi(
        scores, count, static_cast<acc_t>(call_.softcap), head_value(call_.alibi_slopes, head, 0),
        position - key_token);
  }

  static acc_t head_value(const void* per_head, int64_t head, acc_t otherwise) {
    return per_head ? static_cast<const acc_t*>(per_head)[head] : otherwise;
  }

  // Output of one query: `acc` divided by the sum of its softmax weights.
  void write_out(int64_t row, int64_t token, int64_t head, const acc_t* acc, acc_t sum) const {
    scalar_t* out = out_of(row, token, head);
    constexpr int lanes = kLanes<acc_t>;
    int64_t d = 0;
    for (; d + lanes <= call_.value_dim; d += lanes) store(out + d, load(acc + d) / sum);
    for (; d < call_.value_dim; ++d) out[d] = static_cast<scalar_t>(acc[d] / sum);
  }

  // Zero output for tokens [first, end), which are padding.
  void write_zeros(int64_t kv_row, int64_t first, int64_t end) const {
    for (int64_t token = first; token < end; ++token) {
      scalar_t* out = out_of(row_of(kv_row), token, kv_head_of(kv_row) * group_size_);
      std::memset(static_cast<void*>(out), 0, group_size_ * call_.value_dim * sizeof(scalar_t));
    }
  }

  // Rotates by the rotary tables of stream positions (table 0) or of cache-relative positions (table 1).
  template <typename out_t, typename T>
  void rotate(out_t* to, const T* from, int64_t stride, int64_t table, int64_t row, int64_t token) const {
    const acc_t* cos = call_.pairs ? call_.cos.at<acc_t>(table, row, token) : nullptr;
    const acc_t* sin = call_.pairs ? call_.sin.at<acc_t>(table, row, token) : nullptr;
    const int64_t dim = call_.head_dim, pairs = call_.pairs, table_stride = call_.cos.stride[3];
    if (stride == 1 && table_stride == 1) {  // the compiler vectorises only with constant strides
      rotate_vector<T>(to, from, 1, dim, pairs, cos, sin, 1, call_.interleaved);
    } else {
      rotate_vector<T>(to, from, stride, dim, pairs, cos, sin, table_stride, call_.interleaved);
    }
  }

  // Rotates by the opposite angles, in the type of accumulation; `to` may be `from`.
  void rotate_back(acc_t* to, const acc_t* from, int64_t table, int64_t row, int64_t token) const {
    const acc_t* cos = call_.pairs ? call_.cos.at<acc_t>(table, row, token) : nullptr;
    const acc_t* sin = call_.pairs ? call_.sin.at<acc_t>(table, row, token) : nullptr;
    rotate_vector<acc_t, true>(
        to, from, 1, call_.head_dim, call_.pairs, cos, sin, call_.cos.stride[3], call_.interleaved);
  }

  const AttentionCall& call_;
  const RingLayout layout_;  // of a row with all sinks
  Workers& workers_;
  const int64_t num_kv_rows_;
  const int64_t group_size_;    // query heads per KV head
  const int64_t query_stride_;  // head_dim, rounded up to whole vectors
  const int64_t acc_stride_;    // value_dim, rounded up to whole vectors
  acc_t score_scale_;           // softmax scale = score_scale_ * query_scale_: the latter is a power of two and is
  acc_t query_scale_;           // multiplied into the query, the former into the scores

 private:
  static constexpr bool kCanQuantise = std::is_same_v<acc_t, float>;

  Vectors slots_of(int64_t kv_row, int64_t slot, int64_t dim, void* cache, void* sinks, float* scales) const {
    const int64_t cache_row = cache_row_of(kv_row), num_sinks = layout_.num_sinks;
    if (call_.ring == RingType::kWhole) {
      return Vectors{static_cast<char*>(cache), nullptr}.after(cache_row * layout_.slots() + slot, dim);
    }
    if (slot < num_sinks) return Vectors{static_cast<char*>(sinks), nullptr}.after(cache_row * num_sinks + slot, dim);
    return Vectors{static_cast<char*>(cache), scales}.after(cache_row * layout_.ring() + slot - num_sinks, dim);
  }

  template <typename T>
  void quantise_to(const Vectors& to, const T* from, int64_t stride, int64_t dim) const {
    with_elements(to, [&](auto* elements) {
      using stored_t = std::remove_reference_t<decltype(*elements)>;
      if constexpr (!std::is_same_v<stored_t, scalar_t>) *to.scales = quantise(elements, from, stride, dim);
    });
  }

  // The KV row of the cache that a KV row of the call is in.
  int64_t cache_row_of(int64_t kv_row) const {
    return call_.rows ? call_.rows[row_of(kv_row)] * call_.kv_heads + kv_head_of(kv_row) : kv_row;
  }

  scalar_t* out_of(int64_t row, int64_t token, int64_t head) const {
    return static_cast<scalar_t*>(call_.out) + ((row * call_.tokens + token) * call_.heads + head) * call_.value_dim;
  }
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
