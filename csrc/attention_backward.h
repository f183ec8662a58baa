// Gradients of attention (AttentionGradients in attention.h), in the same blocks as prefill. Included by
// attention_kernel.h.
//
// With scores s, weights p = softmax(s), output o and its gradient g: dv = p^T g and ds = p (g.v - g.o). A query was
// rotated twice, for sinks and for the window, so its gradient is the sum of two, each rotated back; a key once. What
// was in the ring before the call is a constant: only new keys and values have gradients.
//
// A work item is a range of queries of one KV row. Blocks of its queries keep their scores over all keys in sight,
// computed once, in panels of kKeys columns. Gradients of new keys and values add up in a buffer of each item; a last
// pass adds the buffers in a fixed order, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention_base.h"
#include "attention_chunk_microkernel.h"

namespace sinkattn {
namespace SINKATTN_ISA {

template <typename scalar_t>
class Backward : AttentionBase<scalar_t> {
  using Base = AttentionBase<scalar_t>;
  using typename Base::acc_t, typename Base::Interval;
  using Base::call_, Base::layout_, Base::workers_, Base::num_kv_rows_, Base::group_size_, Base::query_stride_,
      Base::acc_stride_, Base::score_scale_, Base::query_scale_;
  using Microkernel = ChunkMicrokernel<scalar_t>;
  static constexpr int kQueries = Microkernel::kQueries, kKeys = Microkernel::kKeys;
  static constexpr int64_t kMaxPanelBytes = 2 << 20;  // about the second-level cache of a core
  static constexpr int kKeyRows = 4;                  // rows of a register tile of key gradients
  static_assert(kKeys % kKeyRows == 0 && kKeys <= AttentionGradients::kExtraRows);

 public:
  Backward(const AttentionGradients& call, Workers& workers)
      : Base(call.forward, workers),
        gradients_(call),
        key_width_(AttentionGradients::padded(call_.head_dim)),
        value_width_(AttentionGradients::padded(call_.value_dim)) {}

  void run() {
    const int64_t group_tokens = (call_.tokens + gradients_.groups - 1) / gradients_.groups;
    const int64_t past = gradients_.past;
    const auto blocks = [](int64_t keys) { return (keys + kKeys - 1) / kKeys; };
    // An upper bound, by the most tokens that a block of queries can have.
    const int64_t max_tokens = std::clamp<int64_t>(Microkernel::kItemQueries / group_size_, 1, group_tokens);
    const int64_t max_blocks = blocks(std::min(past, layout_.num_sinks)) +
                               blocks(std::min(call_.tokens, layout_.num_sinks)) +
                               blocks(std::min(past, layout_.window)) +
                               blocks(std::min(call_.tokens, layout_.window + max_tokens));
    const int64_t fitting = kMaxPanelBytes / (max_blocks * kKeys * static_cast<int64_t>(sizeof(acc_t)));
    block_tokens_ = std::clamp<int64_t>(fitting / group_size_, 1, max_tokens);
    padded_queries_ = round_up(block_tokens_ * group_size_, kQueries);

    const int64_t query_elements = padded_queries_ * Microkernel::query_size(call_.head_dim);
    const int64_t gradient_elements = padded_queries_ * Microkernel::query_size(call_.value_dim);
    const int64_t panel_elements = max_blocks * padded_queries_ * kKeys;
    const int64_t widest = std::max(call_.head_dim, call_.value_dim);
    const int64_t scratch_bytes =
        4 * Arena::bytes<acc_t>(query_elements) + Arena::bytes<acc_t>(gradient_elements) +
        Arena::bytes<acc_t>(Microkernel::keys_size(widest)) + Arena::bytes<acc_t>(Microkernel::values_size(widest)) +
        Arena::bytes<acc_t>(3 * query_stride_) + Arena::bytes<acc_t>(kQueries * kKeys) +
        (call_.softcap != 0 ? 2 : 1) * Arena::bytes<acc_t>(panel_elements) + 2 * Arena::bytes<acc_t>(padded_queries_);
    const int64_t num_items = num_kv_rows_ * gradients_.groups;
    const int64_t num_workers = this->num_workers_for(num_items, this->cache_bytes(16 * call_.tokens));
    const int64_t logit_bytes = Arena::bytes<acc_t>(num_items * group_size_);
    Arena arena{workers_.workspace(num_workers * scratch_bytes + logit_bytes)};
    logit_sums_ = arena.take<acc_t>(num_items * group_size_);

    for_each_item(workers_, num_workers, num_kv_rows_, [&](int64_t kv_row, int64_t) {
      for (int64_t i = 0; i < this->tokens_of(this->row_of(kv_row)); ++i) {
        this->write_key(new_keys_of(kv_row) + i * call_.head_dim, kv_row, i);
        this->write_value(new_values_of(kv_row) + i * call_.value_dim, kv_row, i);
      }
    });
    for_each_item(workers_, num_workers, num_items, [&](int64_t item, int64_t worker) {
      Arena worker_arena{arena.next + worker * scratch_bytes};
      Scratch scratch;
      scratch.window_query = worker_arena.take<acc_t>(query_elements);
      scratch.sink_query = worker_arena.take<acc_t>(query_elements);
      scratch.window_dquery = worker_arena.take<acc_t>(query_elements);
      scratch.sink_dquery = worker_arena.take<acc_t>(query_elements);
      scratch.gradient = worker_arena.take<acc_t>(gradient_elements);
      scratch.keys = worker_arena.take<acc_t>(Microkernel::keys_size(widest));
      scratch.values = worker_arena.take<acc_t>(Microkernel::values_size(widest));
      scratch.rotated = worker_arena.take<acc_t>(3 * query_stride_);
      scratch.tile = worker_arena.take<acc_t>(kQueries * kKeys);
      scratch.panels = worker_arena.take<acc_t>(panel_elements);
      scratch.slopes = call_.softcap != 0 ? worker_arena.take<acc_t>(panel_elements) : nullptr;
      scratch.max = worker_arena.take<acc_t>(padded_queries_);
      scratch.delta = worker_arena.take<acc_t>(padded_queries_);
      const int64_t kv_row = item / gradients_.groups, group = item % gradients_.groups;
      scratch.logits = logit_sums_ + item * group_size_;
      std::fill_n(scratch.logits, group_size_, acc_t{0});
      const NewTokens touched = touched_by(kv_row, group);
      std::fill_n(dkeys_of(item) + touched.begin * key_width_, (touched.end - touched.begin) * key_width_, acc_t{0});
      std::fill_n(
          dvalues_of(item) + touched.begin * value_width_, (touched.end - touched.begin) * value_width_, acc_t{0});
      const int64_t begin = std::min(group * group_tokens, call_.tokens);
      const int64_t end = std::min(begin + group_tokens, call_.tokens);
      for (int64_t first = begin; first < end; first += block_tokens_) {
        const int64_t stop = std::min({first + block_tokens_, end, this->tokens_of(this->row_of(kv_row))});
        if (first < stop) add_block(item, kv_row, first, stop, scratch);
      }
    });
    for_each_item(workers_, num_workers, num_kv_rows_, [&](int64_t kv_row, int64_t) { write_new_tokens(kv_row); });
    if (gradients_.dsink_logits) write_logits();
  }

 private:
  struct Scratch {
    acc_t *window_query, *sink_query, *window_dquery, *sink_dquery, *gradient, *keys, *values, *rotated, *tile;
    acc_t *panels, *slopes, *max, *delta, *logits;
  };

  // Consecutive tokens whose keys and values are consecutive in memory; `index` of the first among the new tokens, or
  // -1 for tokens of the past.
  struct Segment {
    Run run;
    bool is_sink;
    const scalar_t *keys, *values;
    int64_t index;
  };

  struct Queries {
    int64_t row, token, count, head;  // of query 0: token counted from the start of the stream, first head
  };

  struct NewTokens {
    int64_t begin, end;
  };

  scalar_t* new_keys_of(int64_t kv_row) const {
    return static_cast<scalar_t*>(gradients_.new_keys) + kv_row * call_.tokens * call_.head_dim;
  }
  scalar_t* new_values_of(int64_t kv_row) const {
    return static_cast<scalar_t*>(gradients_.new_values) + kv_row * call_.tokens * call_.value_dim;
  }
  acc_t* dkeys_of(int64_t item) const {
    return static_cast<acc_t*>(gradients_.sums) + item * gradients_.sum_rows() * (key_width_ + value_width_);
  }
  acc_t* dvalues_of(int64_t item) const { return dkeys_of(item) + gradients_.sum_rows() * key_width_; }

  // New tokens, with padding, whose gradients queries of a group add to.
  NewTokens touched_by(int64_t kv_row, int64_t group) const {
    const int64_t group_tokens = (call_.tokens + gradients_.groups - 1) / gradients_.groups;
    const int64_t begin = std::min(group * group_tokens, call_.tokens);
    const int64_t end = std::min(begin + group_tokens, call_.tokens);
    if (call_.seen[this->row_of(kv_row)] < layout_.num_sinks) return {0, end + kKeys};
    return {std::max<int64_t>(0, begin - layout_.window + 1), end + kKeys};
  }

  // Gradients of one block of queries: tokens [first, end) of the call, all heads of the group. Query q is head
  // q % group_size_ of token first + q / group_size_.
  void add_block(int64_t item, int64_t kv_row, int64_t first, int64_t end, const Scratch& scratch) const {
    const int64_t row = this->row_of(kv_row), seen = call_.seen[row];
    const Queries queries{row, seen + first, (end - first) * group_size_, this->kv_head_of(kv_row) * group_size_};
    load_queries(queries, first, scratch);

    Segment segments[4];
    int count = 0;
    const int64_t sinks = layout_.num_sinks, held_sinks = std::min(seen, sinks), stop = seen + end;
    const int64_t past_sinks = gradients_.past ? held_sinks : 0;
    const auto past_at = [&](int64_t index) {
      const int64_t at = kv_row * gradients_.past + index;
      return std::pair<const scalar_t*, const scalar_t*>{
          static_cast<const scalar_t*>(call_.keys) + at * call_.head_dim,
          static_cast<const scalar_t*>(call_.values) + at * call_.value_dim};
    };
    const auto add_past = [&](int64_t token, int64_t until, bool is_sink, int64_t index) {
      if (until > token) {
        segments[count++] = {{token, 0, until - token}, is_sink, past_at(index).first, past_at(index).second, -1};
      }
    };
    const auto add_new = [&](int64_t token, int64_t until, bool is_sink) {
      if (until > token) {
        segments[count++] = {
            {token, 0, until - token},
            is_sink,
            new_keys_of(kv_row) + (token - seen) * call_.head_dim,
            new_values_of(kv_row) + (token - seen) * call_.value_dim,
            token - seen};
      }
    };
    const int64_t window_begin = layout_.window_begin(std::max(queries.token, sinks));
    add_past(0, past_sinks, true, 0);
    add_new(held_sinks, std::min(stop, sinks), true);
    if (gradients_.past) {
      const int64_t oldest = std::max(seen - layout_.window, sinks), begin = std::max(oldest, window_begin);
      add_past(begin, seen, false, sinks + begin - oldest);
    }
    add_new(std::max({seen, sinks, window_begin}), stop, false);

    int64_t panel = 0;
    for (int s = 0; s < count; ++s) {
      for (int64_t at = 0; at < segments[s].run.count; at += kKeys) {
        add_scores(queries, segments[s], at, panel++, scratch);
      }
    }
    normalise(queries, panel, scratch);
    panel = 0;
    for (int s = 0; s < count; ++s) {
      for (int64_t at = 0; at < segments[s].run.count; at += kKeys) {
        add_gradients(item, queries, segments[s], at, panel++, scratch);
      }
    }
    write_queries(queries, first, scratch);
  }

  // Rotated queries, gradients of their outputs, and delta = g.o of each.
  void load_queries(const Queries& queries, int64_t first, const Scratch& scratch) const {
    const int64_t size = Microkernel::query_size(call_.head_dim), width = Microkernel::query_size(call_.value_dim);
    acc_t* const window = scratch.rotated;
    acc_t* const sink = window + query_stride_;
    for (int64_t q = 0; q < queries.count; ++q) {
      const int64_t head = queries.head + q % group_size_, token = first + q / group_size_;
      this->rotate_query(window, sink, sink + query_stride_, queries.row, head, token);
      std::copy_n(window, size, scratch.window_query + q * size);
      std::copy_n(sink, size, scratch.sink_query + q * size);
      const scalar_t* from = gradients_.gradient.template at<scalar_t>(queries.row, head, token);
      const scalar_t* out = gradients_.out.template at<scalar_t>(queries.row, head, token);
      acc_t* to = scratch.gradient + q * width;
      acc_t delta = 0;
      for (int64_t d = 0; d < call_.value_dim; ++d) {
        to[d] = static_cast<acc_t>(from[d * gradients_.gradient.stride[3]]);
        delta += to[d] * static_cast<acc_t>(out[d * gradients_.out.stride[3]]);
      }
      std::fill(to + call_.value_dim, to + width, acc_t{0});
      scratch.delta[q] = delta;
    }
    // Padding up to a whole number of tiles.
    const int64_t padded = round_up(queries.count, kQueries);
    std::fill(scratch.window_query + queries.count * size, scratch.window_query + padded * size, acc_t{0});
    std::fill(scratch.sink_query + queries.count * size, scratch.sink_query + padded * size, acc_t{0});
    std::fill(scratch.gradient + queries.count * width, scratch.gradient + padded * width, acc_t{0});
    std::fill(scratch.window_dquery, scratch.window_dquery + padded * size, acc_t{0});
    std::fill(scratch.sink_dquery, scratch.sink_dquery + padded * size, acc_t{0});
    std::fill(scratch.max, scratch.max + padded, kMinusInfinity<acc_t>);
    std::fill(scratch.delta + queries.count, scratch.delta + padded, acc_t{0});
  }

  acc_t* panel_of(acc_t* panels, int64_t panel) const { return panels + panel * padded_queries_ * kKeys; }

  // Which keys of a block each query of a tile sees; whether any query sees any.
  bool visible_to_tile(
      const Queries& queries, int64_t q, const Run& block, bool is_sink, Interval (&visible)[kQueries]) const {
    bool any = false;
    for (int r = 0; r < kQueries; ++r) {
      visible[r] = {0, 0};
      if (q + r < queries.count) {
        visible[r] = this->visible_interval(layout_, queries.token + (q + r) / group_size_, block, is_sink);
      }
      any |= visible[r].count > 0;
    }
    return any;
  }

  // Scores of all queries over kKeys keys of a segment, from key `at` on, -infinity where invisible, into a panel.
  void add_scores(
      const Queries& queries, const Segment& segment, int64_t at, int64_t panel, const Scratch& scratch) const {
    const int count = static_cast<int>(std::min<int64_t>(kKeys, segment.run.count - at));
    const int64_t size = Microkernel::query_size(call_.head_dim), token = segment.run.token + at;
    Microkernel::pack_keys(scratch.keys, segment.keys + at * call_.head_dim, call_.head_dim, count);
    const acc_t* query = segment.is_sink ? scratch.sink_query : scratch.window_query;
    for (int64_t q = 0; q < queries.count; q += kQueries) {
      acc_t* scores = panel_of(scratch.panels, panel) + q * kKeys;
      Interval visible[kQueries];
      if (!visible_to_tile(queries, q, {token, 0, count}, segment.is_sink, visible)) {
        std::fill_n(scores, kQueries * kKeys, kMinusInfinity<acc_t>);
        continue;
      }
      Microkernel::scores(scores, score_scale_, query + q * size, scratch.keys, call_.head_dim, count);
      for (int r = 0; r < kQueries; ++r, scores += kKeys) {
        const Interval here = visible[r];
        if (here.count == 0) {
          std::fill_n(scores, kKeys, kMinusInfinity<acc_t>);
          continue;
        }
        if (scratch.slopes) write_slopes(panel_of(scratch.slopes, panel) + (q + r) * kKeys, scores, count);
        const int64_t head = queries.head + (q + r) % group_size_;
        this->adjust_scores(
            layout_, scores, count, head, queries.token + (q + r) / group_size_, token, segment.is_sink);
        std::fill(scores, scores + here.first, kMinusInfinity<acc_t>);
        std::fill(scores + here.first + here.count, scores + kKeys, kMinusInfinity<acc_t>);
        acc_t& max = scratch.max[q + r];
        max = std::max(max, max_of(scores));
      }
    }
  }

  static acc_t max_of(const acc_t* scores) {
    Vec<acc_t> maxima = load(scores);
    for (int j = kLanes<acc_t>; j < kKeys; j += kLanes<acc_t>) maxima = maximum(maxima, load(scores + j));
    return reduce_max(maxima);
  }

  // Derivatives of softcap * tanh(x / softcap).
  void write_slopes(acc_t* slopes, const acc_t* scores, int count) const {
    const acc_t softcap = static_cast<acc_t>(call_.softcap);
    for (int j = 0; j < count; j += kLanes<acc_t>) {
      const Vec<acc_t> capped = tanh(load(scores + j) / softcap);
      store(slopes + j, acc_t{1} - capped * capped);
    }
  }

  // Replaces scores by weights times the softmax sum, and divides gradients and deltas by that sum.
  void normalise(const Queries& queries, int64_t num_panels, const Scratch& scratch) const {
    const int64_t width = Microkernel::query_size(call_.value_dim);
    for (int64_t q = 0; q < queries.count; ++q) {
      const int64_t head = queries.head + q % group_size_;
      const acc_t logit = call_.sink_logits ? this->head_value(call_.sink_logits, head, 0) : kMinusInfinity<acc_t>;
      const acc_t max = std::max(scratch.max[q], logit), base = max == kMinusInfinity<acc_t> ? 0 : max;
      Vec<acc_t> sums{};
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        acc_t* scores = panel_of(scratch.panels, panel) + q * kKeys;
        for (int j = 0; j < kKeys; j += kLanes<acc_t>) {
          const Vec<acc_t> weight = exp(load(scores + j) - base);
          store(scores + j, weight);
          sums += weight;
        }
      }
      const acc_t extra = call_.sink_logits ? std::exp(logit - base) : 0, sum = reduce_sum(sums) + extra;
      const acc_t factor = sum == 0 ? 0 : 1 / sum;
      for (int64_t d = 0; d < width; ++d) scratch.gradient[q * width + d] *= factor;
      scratch.delta[q] *= factor;
      if (call_.sink_logits) scratch.logits[q % group_size_] -= extra * scratch.delta[q];
    }
    const int64_t padded = round_up(queries.count, kQueries);
    for (int64_t panel = 0; panel < num_panels && queries.count < padded; ++panel) {
      std::fill(
          panel_of(scratch.panels, panel) + queries.count * kKeys, panel_of(scratch.panels, panel) + padded * kKeys,
          acc_t{0});
    }
  }

  // Gradients that come by kKeys keys of a segment, from key `at` on.
  void add_gradients(
      int64_t item, const Queries& queries, const Segment& segment, int64_t at, int64_t panel,
      const Scratch& scratch) const {
    const int count = static_cast<int>(std::min<int64_t>(kKeys, segment.run.count - at));
    const int64_t size = Microkernel::query_size(call_.head_dim), width = Microkernel::query_size(call_.value_dim);
    const int64_t padded = round_up(queries.count, kQueries), token = segment.run.token + at;
    acc_t* const weights = panel_of(scratch.panels, panel);
    const bool is_new = segment.index >= 0;
    if (is_new) {
      add_transposed(
          dvalues_of(item) + (segment.index + at) * value_width_, value_width_, weights, scratch.gradient, width,
          padded, count);
    }
    Microkernel::pack_keys(scratch.keys, segment.values + at * call_.value_dim, call_.value_dim, count);
    Microkernel::pack_values(scratch.values, segment.keys + at * call_.head_dim, call_.head_dim, count);
    acc_t* const dquery = segment.is_sink ? scratch.sink_dquery : scratch.window_dquery;
    acc_t ones[kQueries];
    std::fill_n(ones, kQueries, acc_t{1});
    for (int64_t q = 0; q < queries.count; q += kQueries) {
      Interval visible[kQueries];
      if (!visible_to_tile(queries, q, {token, 0, count}, segment.is_sink, visible)) continue;  // all weights are zero
      Microkernel::scores(
          scratch.tile, acc_t{1}, scratch.gradient + q * width, scratch.keys, call_.value_dim, count);
      for (int r = 0; r < kQueries; ++r) {
        const acc_t delta = scratch.delta[q + r];
        acc_t* row = weights + (q + r) * kKeys;
        const acc_t* slopes = scratch.slopes ? panel_of(scratch.slopes, panel) + (q + r) * kKeys : nullptr;
        for (int j = 0; j < count; j += kLanes<acc_t>) {
          Vec<acc_t> dscore = load(row + j) * (load(scratch.tile + r * kKeys + j) - delta);
          if (slopes && visible[r].count > 0) dscore *= load(slopes + j);
          store(row + j, dscore);
        }
      }
      Microkernel::add_values(dquery + q * size, ones, weights + q * kKeys, scratch.values, call_.head_dim, count);
    }
    if (is_new) {
      add_transposed(
          dkeys_of(item) + (segment.index + at) * key_width_, key_width_, weights,
          segment.is_sink ? scratch.sink_query : scratch.window_query, size, padded, count);
    }
  }

  // sums += panel^T x rows, for `count` columns of a panel and vectors of `width` elements of each query.
  static void add_transposed(
      acc_t* sums, int64_t sums_width, const acc_t* panel, const acc_t* rows, int64_t width, int64_t queries,
      int count) {
    acc_t ones[kKeyRows];
    std::fill_n(ones, kKeyRows, acc_t{1});
    for (int j = 0; j < count; j += kKeyRows) {
      multiply<kRegisterVectors, kKeyRows, acc_t>(
          sums + j * sums_width, sums_width, ones, panel + j, 1, rows, width, queries, width, kKeys);
    }
  }

  void write_queries(const Queries& queries, int64_t first, const Scratch& scratch) const {
    const int64_t size = Microkernel::query_size(call_.head_dim);
    acc_t* const window = scratch.rotated;
    acc_t* const sink = window + query_stride_;
    for (int64_t q = 0; q < queries.count; ++q) {
      const int64_t token = first + q / group_size_, head = queries.head + q % group_size_;
      this->rotate_back(window, scratch.window_dquery + q * size, 0, queries.row, token);
      this->rotate_back(sink, scratch.sink_dquery + q * size, 1, queries.row, token);
      scalar_t* to = static_cast<scalar_t*>(gradients_.dquery) +
                     ((queries.row * call_.tokens + token) * call_.heads + head) * call_.head_dim;
      for (int64_t d = 0; d < call_.head_dim; ++d) {
        to[d] = static_cast<scalar_t>((window[d] + sink[d]) * score_scale_ * query_scale_);
      }
    }
  }

  // Gradients of new keys and values of a KV row, and zeros for padding.
  void write_new_tokens(int64_t kv_row) const {
    const int64_t row = this->row_of(kv_row), count = this->tokens_of(row);
    for (int64_t token = 0; token < call_.tokens; ++token) {
      const int64_t at = (row * call_.tokens + token) * call_.kv_heads + this->kv_head_of(kv_row);
      scalar_t* dkey = static_cast<scalar_t*>(gradients_.dkey) + at * call_.head_dim;
      scalar_t* dvalue = static_cast<scalar_t*>(gradients_.dvalue) + at * call_.value_dim;
      if (token >= count) {
        std::fill_n(dkey, call_.head_dim, static_cast<scalar_t>(acc_t{0}));
        std::fill_n(dvalue, call_.value_dim, static_cast<scalar_t>(acc_t{0}));
        // The queries of padding, which no item has.
        std::fill_n(
            static_cast<scalar_t*>(gradients_.dquery) + at * group_size_ * call_.head_dim,
            group_size_ * call_.head_dim, static_cast<scalar_t>(acc_t{0}));
        continue;
      }
      acc_t *key = nullptr, *value = nullptr;
      for (int64_t group = 0; group < gradients_.groups; ++group) {
        const NewTokens touched = touched_by(kv_row, group);
        if (token < touched.begin || token >= touched.end) continue;
        const int64_t item = kv_row * gradients_.groups + group;
        acc_t* keys = dkeys_of(item) + token * key_width_;
        acc_t* values = dvalues_of(item) + token * value_width_;
        if (!key) {
          key = keys;
          value = values;
          continue;
        }
        for (int64_t d = 0; d < key_width_; ++d) key[d] += keys[d];
        for (int64_t d = 0; d < value_width_; ++d) value[d] += values[d];
      }
      this->rotate_back(key, key, 0, row, token);
      for (int64_t d = 0; d < call_.head_dim; ++d) dkey[d] = static_cast<scalar_t>(key[d] * score_scale_);
      for (int64_t d = 0; d < call_.value_dim; ++d) dvalue[d] = static_cast<scalar_t>(value[d]);
    }
  }

  void write_logits() const {
    acc_t* out = static_cast<acc_t*>(gradients_.dsink_logits);
    std::fill_n(out, call_.heads, acc_t{0});
    for (int64_t item = 0; item < num_kv_rows_ * gradients_.groups; ++item) {
      const int64_t head = this->kv_head_of(item / gradients_.groups) * group_size_;
      for (int64_t g = 0; g < group_size_; ++g) out[head + g] += logit_sums_[item * group_size_ + g];
    }
  }

  const AttentionGradients& gradients_;
  const int64_t key_width_, value_width_;
  int64_t block_tokens_ = 0, padded_queries_ = 0;
  acc_t* logit_sums_ = nullptr;  // [item, query head of the group]
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
