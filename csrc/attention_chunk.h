// Prefill: chunks with many queries per KV head. Included by attention_kernel.h.
//
// A work item is a block of queries of one KV row. It packs blocks of keys and values into small buffers that stay in
// the CPU cache while all queries of the item use them. Blocks that no query of a tile sees are skipped.
//
// New keys and values are first written to a buffer. Queries attend over the old content of the ring and over the
// buffer; then the buffer is written to the ring. This is correct for calls longer than the ring, too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention_base.h"
#include "attention_chunk_microkernel.h"

namespace sinkattn {
namespace SINKATTN_ISA {

// A long call is processed in chunks of at most kMaxChunkTokens tokens: fewer, down to kMinChunkTokens, if the buffer
// of new keys and values would exceed kMaxBufferBytes.
constexpr int64_t kMaxChunkTokens = 512;
constexpr int64_t kMinChunkTokens = 64;
constexpr int64_t kMaxBufferBytes = 32 << 20;

template <typename scalar_t>
class Chunk : AttentionBase<scalar_t> {
  using Base = AttentionBase<scalar_t>;
  using typename Base::acc_t, typename Base::Interval, typename Base::Vectors;
  using Base::call_, Base::workers_, Base::num_kv_rows_, Base::group_size_, Base::query_stride_, Base::acc_stride_,
      Base::score_scale_;
  using Microkernel = ChunkMicrokernel<scalar_t>;
  using packed_t = typename Microkernel::packed_t;

 public:
  Chunk(const AttentionCall& call, Workers& workers) : Base(call, workers) {}

  void run() {
    const int64_t fitting_tokens = kMaxBufferBytes / std::max<int64_t>(1, this->cache_bytes(1));
    const int64_t step = std::clamp(fitting_tokens, kMinChunkTokens, kMaxChunkTokens);
    for (chunk_start_ = 0; chunk_start_ < call_.tokens; chunk_start_ += step) {
      chunk_tokens_ = std::min(step, call_.tokens - chunk_start_);
      attend_chunk();
    }
  }

 private:
  struct Scratch {
    packed_t *window_query, *sink_query, *keys, *values;
    acc_t *rotated, *acc, *scores;
    SoftmaxState<acc_t>* state;
  };

  // Tokens of the chunk in a batch row, padding excluded.
  int64_t chunk_tokens_of(int64_t row) const {
    return std::clamp<int64_t>(this->tokens_of(row) - chunk_start_, 0, chunk_tokens_);
  }

  // Buffered keys and values of a KV row, rotated and rounded as in the ring, from a token of the chunk on.
  Vectors new_keys_of(int64_t kv_row, int64_t token) const {
    return new_keys_.after(kv_row * chunk_tokens_ + token, call_.head_dim);
  }
  Vectors new_values_of(int64_t kv_row, int64_t token) const {
    return new_values_.after(kv_row * chunk_tokens_ + token, call_.value_dim);
  }

  void attend_chunk() {
    const int64_t item_tokens = std::clamp<int64_t>(Microkernel::kItemQueries / group_size_, 1, chunk_tokens_);
    const int64_t num_blocks = (chunk_tokens_ + item_tokens - 1) / item_tokens, num_items = num_kv_rows_ * num_blocks;
    const int64_t queries = round_up(item_tokens * group_size_, Microkernel::kQueries);
    const int64_t num_workers = this->num_workers_for(num_items, this->cache_bytes(16 * chunk_tokens_));
    const int64_t query_elements = queries * Microkernel::query_size(call_.head_dim);
    const int64_t keys_elements = Microkernel::keys_size(call_.head_dim);
    const int64_t values_elements = Microkernel::values_size(call_.value_dim);
    const int64_t scratch_bytes =
        2 * Arena::bytes<packed_t>(query_elements) + Arena::bytes<packed_t>(keys_elements) +
        Arena::bytes<packed_t>(values_elements) + Arena::bytes<acc_t>(3 * query_stride_) +
        Arena::bytes<acc_t>(queries * acc_stride_) + Arena::bytes<acc_t>(Microkernel::kQueries * Microkernel::kKeys) +
        Arena::bytes<SoftmaxState<acc_t>>(queries);
    const int64_t count = num_kv_rows_ * chunk_tokens_;
    const int64_t num_scales = call_.ring == RingType::kWhole ? 0 : count;
    const int64_t key_bytes = count * call_.head_dim * this->element_bytes();
    const int64_t value_bytes = count * call_.value_dim * this->element_bytes();
    Arena arena{workers_.workspace(
        num_workers * scratch_bytes + Arena::bytes<char>(key_bytes) + Arena::bytes<char>(value_bytes) +
        2 * Arena::bytes<float>(num_scales))};
    new_keys_.data = arena.take<char>(key_bytes);
    new_values_.data = arena.take<char>(value_bytes);
    if (num_scales > 0) {
      new_keys_.scales = arena.take<float>(num_scales);
      new_values_.scales = arena.take<float>(num_scales);
    }

    for_each_item(workers_, num_workers, num_kv_rows_, [&](int64_t kv_row, int64_t worker) {
      fill_buffer(kv_row, reinterpret_cast<acc_t*>(arena.next + worker * scratch_bytes));
    });
    for_each_item(workers_, num_workers, num_items, [&](int64_t item, int64_t worker) {
      Arena worker_arena{arena.next + worker * scratch_bytes};
      Scratch scratch;
      scratch.window_query = worker_arena.take<packed_t>(query_elements);
      scratch.sink_query = worker_arena.take<packed_t>(query_elements);
      scratch.keys = worker_arena.take<packed_t>(keys_elements);
      scratch.values = worker_arena.take<packed_t>(values_elements);
      scratch.rotated = worker_arena.take<acc_t>(3 * query_stride_);
      scratch.acc = worker_arena.take<acc_t>(queries * acc_stride_);
      scratch.scores = worker_arena.take<acc_t>(Microkernel::kQueries * Microkernel::kKeys);
      scratch.state = worker_arena.take<SoftmaxState<acc_t>>(queries);
      const int64_t kv_row = item / num_blocks, first = item % num_blocks * item_tokens;
      const int64_t end = std::min(first + item_tokens, chunk_tokens_);
      const int64_t valid_end = std::min(end, chunk_tokens_of(this->row_of(kv_row)));
      if (first < valid_end) attend(kv_row, first, valid_end, scratch);
      this->write_zeros(kv_row, chunk_start_ + std::max(first, valid_end), chunk_start_ + end);
    });
    for_each_item(workers_, num_workers, num_kv_rows_, [&](int64_t kv_row, int64_t) { flush_buffer(kv_row); });
  }

  // `key` has room for one.
  void fill_buffer(int64_t kv_row, acc_t* key) const {
    const int64_t row = this->row_of(kv_row), seen = call_.seen[row] + chunk_start_;
    const int64_t num_sinks = this->layout_of(row).num_sinks;
    for (int64_t i = 0; i < chunk_tokens_of(row); ++i) {
      // Sinks evict nothing, so they are written at once: queries read them from the cache.
      const int64_t slot = seen + i;
      const bool is_sink = slot < num_sinks;
      this->write_key(
          is_sink ? this->keys_of(kv_row, slot) : new_keys_of(kv_row, i), kv_row, chunk_start_ + i, key);
      this->write_value(
          is_sink ? this->values_of(kv_row, slot) : new_values_of(kv_row, i), kv_row, chunk_start_ + i);
    }
  }

  void flush_buffer(int64_t kv_row) const {
    const int64_t row = this->row_of(kv_row);
    const RingLayout layout = this->layout_of(row);
    Run runs[RingLayout::kMaxRuns];
    const int n = layout.write_runs(call_.seen[row] + chunk_start_, chunk_tokens_of(row), runs);
    for (int r = 0; r < n; ++r) {
      const auto [token, slot, count] = runs[r];
      if (slot < layout.num_sinks) continue;
      copy(this->keys_of(kv_row, slot), new_keys_of(kv_row, token), count, call_.head_dim);
      copy(this->values_of(kv_row, slot), new_values_of(kv_row, token), count, call_.value_dim);
    }
  }

  void copy(const Vectors& to, const Vectors& from, int64_t count, int64_t dim) const {
    std::memcpy(to.data, from.data, count * dim * this->element_bytes());
    if (to.scales) std::copy_n(from.scales, count, to.scales);
  }

  // Attention of one item: all query heads of the group for tokens [first, end) of the chunk. Query q of the item is
  // head q % group_size_ of token first + q / group_size_.
  void attend(int64_t kv_row, int64_t first, int64_t end, const Scratch& scratch) const {
    const typename Microkernel::TileConfig tile_config{};
    const int64_t row = this->row_of(kv_row), seen = call_.seen[row] + chunk_start_;
    const int64_t num_queries = (end - first) * group_size_, padded = round_up(num_queries, Microkernel::kQueries);
    const int64_t size = Microkernel::query_size(call_.head_dim);
    acc_t* const window = scratch.rotated;
    acc_t* const sink = window + query_stride_;
    for (int64_t q = 0; q < num_queries; ++q) {
      this->rotate_query(
          window, sink, sink + query_stride_, row, this->kv_head_of(kv_row) * group_size_ + q % group_size_,
          chunk_start_ + first + q / group_size_);
      Microkernel::pack_query(scratch.window_query + q * size, window, call_.head_dim, score_scale_);
      Microkernel::pack_query(scratch.sink_query + q * size, sink, call_.head_dim, score_scale_);
    }
    // Padding up to a whole number of tiles: queries that see no key.
    std::fill(scratch.window_query + num_queries * size, scratch.window_query + padded * size, packed_t{});
    std::fill(scratch.sink_query + num_queries * size, scratch.sink_query + padded * size, packed_t{});
    std::fill(scratch.state, scratch.state + padded, SoftmaxState<acc_t>{kMinusInfinity<acc_t>, 0});
    std::fill(scratch.acc, scratch.acc + padded * acc_stride_, acc_t{0});

    const RingLayout layout = this->layout_of(row);
    const Queries queries{layout, seen + first, num_queries, this->kv_head_of(kv_row) * group_size_};
    const int64_t stop = seen + end, sinks = std::min(stop, layout.num_sinks);
    attend_run(queries, {0, 0, sinks}, true, this->keys_of(kv_row, 0), this->values_of(kv_row, 0), stop, scratch);
    Run runs[RingLayout::kMaxRuns];
    const int n = layout.held_runs(seen, runs);
    for (int r = 0; r < n; ++r) {
      if (runs[r].slot < layout.num_sinks) continue;
      attend_run(
          queries, runs[r], false, this->keys_of(kv_row, runs[r].slot), this->values_of(kv_row, runs[r].slot), stop,
          scratch);
    }
    const int64_t skip = std::clamp<int64_t>(layout.num_sinks - seen, 0, end);
    attend_run(
        queries, {seen + skip, 0, end - skip}, false, new_keys_of(kv_row, skip), new_values_of(kv_row, skip), stop,
        scratch);

    for (int64_t q = 0; q < num_queries; ++q) {
      acc_t* acc = scratch.acc + q * acc_stride_;
      const int64_t head = queries.head + q % group_size_;
      if (call_.sink_logits) {
        const acc_t factor = add_sink_logit(scratch.state[q], this->head_value(call_.sink_logits, head, 0));
        for (int64_t d = 0; d < call_.value_dim; ++d) acc[d] *= factor;
      }
      this->write_out(row, chunk_start_ + first + q / group_size_, head, acc, scratch.state[q].sum);
    }
  }

  struct Queries {
    RingLayout layout;  // of their row
    int64_t token;  // of query 0, counted from the start of the stream
    int64_t count;
    int64_t head;  // of query 0
  };

  // A block of keys and values that is packed.
  struct Packed {
    Run tokens;
    bool is_sink;
    const scalar_t* nonfinite_values;  // null if all values are finite, else their address before packing
    const float *key_scales, *value_scales;  // null for scalar_t
    bool finite_scales;                      // of the values
  };

  // Attends over a run: consecutive tokens, before token `stop`, whose keys and values are consecutive in memory.
  void attend_run(
      const Queries& queries, const Run& run, bool is_sink, const Vectors& keys, const Vectors& values, int64_t stop,
      const Scratch& scratch) const {
    const int64_t begin = std::max(run.token, is_sink ? 0 : queries.layout.window_begin(queries.token));
    const int64_t end = std::min(run.token + run.count, stop);
    for (int64_t token = begin; token < end; token += Microkernel::kKeys) {
      const int count = static_cast<int>(std::min<int64_t>(Microkernel::kKeys, end - token));
      const Vectors block_keys = keys.after(token - run.token, call_.head_dim);
      const Vectors block_values = values.after(token - run.token, call_.value_dim);
      Packed block{{token, 0, count}, is_sink, nullptr, block_keys.scales, block_values.scales, true};
      for (int j = 0; block.value_scales && j < count; ++j) block.finite_scales &= std::isfinite(block.value_scales[j]);
      this->with_elements(block_keys, [&](const auto* from) {
        Microkernel::pack_keys(scratch.keys, from, call_.head_dim, count);
      });
      this->with_elements(block_values, [&](const auto* from) {
        const bool finite = Microkernel::pack_values(scratch.values, from, call_.value_dim, count);
        if constexpr (std::is_same_v<decltype(from), const scalar_t*>) block.nonfinite_values = finite ? nullptr : from;
      });
      for (int64_t q = 0; q < queries.count; q += Microkernel::kQueries) attend_tile(queries, q, block, scratch);
    }
  }

  // Attends with queries [q, q + kQueries) over a packed block.
  void attend_tile(const Queries& queries, int64_t q, const Packed& packed, const Scratch& scratch) const {
    const Run& block = packed.tokens;
    const bool is_sink = packed.is_sink;
    Interval visible[Microkernel::kQueries];
    bool any = false, all = true;
    for (int r = 0; r < Microkernel::kQueries; ++r) {
      visible[r] = {0, 0};
      if (q + r < queries.count) {
        visible[r] = this->visible_interval(queries.layout, queries.token + (q + r) / group_size_, block, is_sink);
      }
      any |= visible[r].count > 0;
      all &= visible[r].count == block.count;
    }
    if (!any) return;
    const int count = static_cast<int>(block.count);
    const packed_t* query =
        (is_sink ? scratch.sink_query : scratch.window_query) + q * Microkernel::query_size(call_.head_dim);
    Microkernel::scores(scratch.scores, score_scale_, query, scratch.keys, call_.head_dim, count);
    if (packed.key_scales) {
      this->multiply_by_scales(scratch.scores, Microkernel::kKeys, Microkernel::kQueries, packed.key_scales, count);
    }
    acc_t factor[Microkernel::kQueries];
    for (int r = 0; r < Microkernel::kQueries; ++r) {
      acc_t* scores = scratch.scores + r * Microkernel::kKeys;
      const Interval here = visible[r];
      if (here.count == 0) {
        std::fill(scores, scores + Microkernel::kKeys, acc_t{0});
        factor[r] = 1;
        continue;
      }
      const int64_t head = queries.head + (q + r) % group_size_, token = queries.token + (q + r) / group_size_;
      this->adjust_scores(queries.layout, scores, count, head, token, block.token, is_sink);
      std::fill(scores, scores + here.first, kMinusInfinity<acc_t>);
      std::fill(scores + here.first + here.count, scores + count, kMinusInfinity<acc_t>);
      factor[r] = update_softmax(scratch.state[q + r], scores, count);
    }
    if (packed.value_scales) {
      this->multiply_by_scales(scratch.scores, Microkernel::kKeys, Microkernel::kQueries, packed.value_scales, count);
      if (!packed.finite_scales) hide_weights(scratch.scores, visible, count);
    }
    acc_t* acc = scratch.acc + q * acc_stride_;
    if (!packed.nonfinite_values || all) {
      Microkernel::add_values(acc, factor, scratch.scores, scratch.values, call_.value_dim, count);
    } else {
      add_visible_values(acc, factor, scratch.scores, packed.nonfinite_values, visible);
    }
  }

  // Sets the weights that became NaN, of values that a query does not see, to 0 again.
  void hide_weights(acc_t* weights, const Interval* visible, int count) const {
    for (int r = 0; r < Microkernel::kQueries; ++r, weights += Microkernel::kKeys) {
      const Interval here = visible[r].count == 0 ? Interval{0, 0} : visible[r];
      std::fill(weights, weights + here.first, acc_t{0});
      std::fill(weights + here.first + here.count, weights + count, acc_t{0});
    }
  }

  // add_values for blocks with NaN or infinite values: skips values that a query does not see, since a weight of 0
  // times such a value would be NaN.
  void add_visible_values(
      acc_t* acc, const acc_t* factor, const acc_t* weights, const scalar_t* values, const Interval* visible) const {
    for (int r = 0; r < Microkernel::kQueries; ++r, acc += acc_stride_, weights += Microkernel::kKeys) {
      for (int64_t d = 0; d < call_.value_dim; ++d) {
        acc[d] *= factor[r];
        for (int64_t j = visible[r].first; j < visible[r].first + visible[r].count; ++j) {
          acc[d] += weights[j] * static_cast<acc_t>(values[j * call_.value_dim + d]);
        }
      }
    }
  }

  int64_t chunk_start_ = 0;  // first token of the chunk, counted from the start of the call
  int64_t chunk_tokens_ = 0;
  Vectors new_keys_{}, new_values_{};  // buffer, [KV row, token of the chunk, element]; without sinks
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
