// Decoding: few queries per KV head. Included by attention_kernel.h.
//
// A work item is one KV split (a range of slots) of one KV row. For each new token, an item reads its keys and values
// once, in storage order, for all query heads of the group. The last item of a KV row to finish combines the splits.
// The number of splits depends only on shapes, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <new>

#include "attention_base.h"
#include "attention_decode_microkernel.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kSplitSlots = 512;  // slots of a KV split; more if there would be more than kMaxItems items
constexpr int64_t kMaxItems = 256;

template <typename scalar_t>
class Decode : AttentionBase<scalar_t> {
  using Base = AttentionBase<scalar_t>;
  using typename Base::acc_t, typename Base::Interval;
  using Base::call_, Base::layout_, Base::workers_, Base::num_kv_rows_, Base::group_size_, Base::query_stride_,
      Base::acc_stride_, Base::score_scale_;

 public:
  // Requires call.tokens <= headroom + 1: then appending first overwrites no key that a query sees.
  Decode(const AttentionCall& call, Workers& workers)
      : Base(call, workers),
        num_splits_(num_splits(layout_.slots())),
        num_queries_(call.tokens * group_size_) {}

  void run() {
    const int64_t num_items = num_kv_rows_ * num_splits_;
    const int64_t num_workers = this->num_workers_for(num_items, this->cache_bytes(layout_.slots()));
    const int64_t scratch_bytes = 2 * Arena::bytes<acc_t>(group_size_ * query_stride_) +
                                  Arena::bytes<acc_t>(query_stride_) +
                                  Arena::bytes<acc_t>(kDecodeQueries<acc_t> * kDecodeBlock);
    Arena arena{workers_.workspace(
        num_workers * scratch_bytes + Arena::bytes<SoftmaxState<acc_t>>(num_items * num_queries_) +
        Arena::bytes<acc_t>(num_items * num_queries_ * acc_stride_) +
        Arena::bytes<std::atomic<int64_t>>(num_kv_rows_))};
    const Partial partial{
        arena.take<SoftmaxState<acc_t>>(num_items * num_queries_),
        arena.take<acc_t>(num_items * num_queries_ * acc_stride_)};
    auto* splits_done = arena.take<std::atomic<int64_t>>(num_kv_rows_);
    for (int64_t kv_row = 0; kv_row < num_kv_rows_; ++kv_row) new (splits_done + kv_row) std::atomic<int64_t>(0);

    for_each_item(workers_, num_workers, num_items, [&](int64_t item, int64_t worker) {
      Arena worker_arena{arena.next + worker * scratch_bytes};
      Scratch scratch;
      scratch.window_query = worker_arena.take<acc_t>(group_size_ * query_stride_);
      scratch.sink_query = worker_arena.take<acc_t>(group_size_ * query_stride_);
      scratch.unrotated = worker_arena.take<acc_t>(query_stride_);
      scratch.scores = worker_arena.take<acc_t>(kDecodeQueries<acc_t> * kDecodeBlock);
      const int64_t kv_row = item / num_splits_;
      const RingLayout layout = this->layout_of(this->row_of(kv_row));
      const SlotRange split = split_of(layout, item % num_splits_);
      append(kv_row, layout, split);
      attend(kv_row, layout, split, scratch, at(partial, item * num_queries_));
      // Acquire and release: the last item reads what the others wrote.
      if (splits_done[kv_row].fetch_add(1, std::memory_order_acq_rel) == num_splits_ - 1) {
        combine_splits(kv_row, at(partial, kv_row * num_splits_ * num_queries_));
      }
    });
  }

 private:
  struct SlotRange {
    int64_t begin, end;
  };

  struct Scratch {
    acc_t *window_query, *sink_query, *unrotated, *scores;
  };

  // Results of the queries for one split: state[query], acc[query][acc_stride].
  struct Partial {
    SoftmaxState<acc_t>* state;
    acc_t* acc;
  };
  Partial at(const Partial& partial, int64_t query) const {
    return {partial.state + query, partial.acc + query * acc_stride_};
  }

  int64_t num_splits(int64_t slots) const {
    return std::clamp<int64_t>(
        (slots + kSplitSlots - 1) / kSplitSlots, 1, std::max<int64_t>(1, kMaxItems / num_kv_rows_));
  }

  // A split of a row; empty from num_splits(slots of the row) on. Unused slots do not count: they would change results.
  SlotRange split_of(const RingLayout& layout, int64_t split) const {
    const int64_t slots = layout.slots() - layout.unused, count = num_splits(slots);
    const int64_t size = round_up((slots + count - 1) / count, 16);
    return {split * size, std::min((split + 1) * size, slots)};
  }

  // Slots of the cache that belong to a run and to a split.
  static SlotRange intersect(const RingLayout& layout, const SlotRange& split, const Run& run) {
    const int64_t unused = run.slot < layout.num_sinks ? 0 : layout.unused;
    return {std::max(run.slot, split.begin + unused), std::min(run.slot + run.count, split.end + unused)};
  }

  // Writes the new tokens whose slots lie in this split. No other item writes or reads these slots.
  void append(int64_t kv_row, const RingLayout& layout, const SlotRange& split) const {
    const int64_t row = this->row_of(kv_row);
    Run runs[RingLayout::kMaxRuns];
    const int n = layout.write_runs(call_.seen[row], this->tokens_of(row), runs);
    for (int r = 0; r < n; ++r) {
      const SlotRange here = intersect(layout, split, runs[r]);
      for (int64_t slot = here.begin; slot < here.end; ++slot) {
        const int64_t token = runs[r].token + slot - runs[r].slot;
        this->write_key(this->keys_of(kv_row) + slot * call_.head_dim, kv_row, token);
        this->write_value(this->values_of(kv_row) + slot * call_.value_dim, kv_row, token);
      }
    }
  }

  void attend(
      int64_t kv_row, const RingLayout& layout, const SlotRange& split, const Scratch& scratch,
      const Partial& partial) const {
    const int64_t row = this->row_of(kv_row), count = this->tokens_of(row), seen = call_.seen[row];
    Run runs[RingLayout::kMaxRuns];
    const int n = layout.held_runs(seen + count, runs);
    for (int64_t i = 0; i < count; ++i) {
      const Partial token_partial = at(partial, i * group_size_);
      for (int64_t g = 0; g < group_size_; ++g) {
        this->rotate_query(
            scratch.window_query + g * query_stride_, scratch.sink_query + g * query_stride_, scratch.unrotated, row,
            this->kv_head_of(kv_row) * group_size_ + g, i);
      }
      std::fill(token_partial.state, token_partial.state + group_size_, SoftmaxState<acc_t>{kMinusInfinity<acc_t>, 0});
      std::fill(token_partial.acc, token_partial.acc + group_size_ * acc_stride_, acc_t{0});
      for (int r = 0; r < n; ++r) {
        const SlotRange here = intersect(layout, split, runs[r]);
        if (here.begin >= here.end) continue;
        const bool is_sink = runs[r].slot < layout.num_sinks;
        const Run run{runs[r].token + here.begin - runs[r].slot, here.begin, here.end - here.begin};
        const Interval visible = this->visible_interval(layout, seen + i, run, is_sink);
        for (int64_t j = 0; j < visible.count; j += kDecodeBlock) {
          const int64_t first = visible.first + j;
          const Run block{run.token + first, run.slot + first, std::min<int64_t>(kDecodeBlock, visible.count - j)};
          attend_block(
              kv_row, layout, seen + i, block, is_sink, is_sink ? scratch.sink_query : scratch.window_query,
              scratch.scores, token_partial);
        }
      }
    }
  }

  // All heads of the group use a block while its keys are in the L1 cache.
  void attend_block(
      int64_t kv_row, const RingLayout& layout, int64_t token, const Run& block, bool is_sink, const acc_t* query,
      acc_t* scores, const Partial& partial) const {
    constexpr int max_queries = kDecodeQueries<acc_t>;
    for (int64_t g = 0; g < group_size_; g += max_queries) {
      const acc_t* group_query = query + g * query_stride_;
      const Partial group_partial = at(partial, g);
      const int64_t head = this->kv_head_of(kv_row) * group_size_ + g;
      switch (std::min<int64_t>(max_queries, group_size_ - g)) {
        case 1:
          attend_queries<1>(kv_row, layout, head, token, block, is_sink, group_query, scores, group_partial);
          break;
        case 2:
          attend_queries<2>(kv_row, layout, head, token, block, is_sink, group_query, scores, group_partial);
          break;
        case 3:
          attend_queries<std::min(max_queries, 3)>(
              kv_row, layout, head, token, block, is_sink, group_query, scores, group_partial);
          break;
        case 4:
          attend_queries<max_queries>(
              kv_row, layout, head, token, block, is_sink, group_query, scores, group_partial);
          break;
      }
    }
  }

  template <int kQueries>
  void attend_queries(
      int64_t kv_row, const RingLayout& layout, int64_t head, int64_t token, const Run& block, bool is_sink,
      const acc_t* query, acc_t* scores, const Partial& partial) const {
    const int count = static_cast<int>(block.count);
    const scalar_t* keys = this->keys_of(kv_row) + block.slot * call_.head_dim;
    const scalar_t* values = this->values_of(kv_row) + block.slot * call_.value_dim;
    decode_scores<kQueries>(
        scores, score_scale_, query, query_stride_, keys, call_.head_dim, count, values, call_.value_dim);
    acc_t factor[kQueries];
    for (int r = 0; r < kQueries; ++r) {
      acc_t* query_scores = scores + r * kDecodeBlock;
      this->adjust_scores(layout, query_scores, count, head + r, token, block.token, is_sink);
      factor[r] = update_softmax(partial.state[r], query_scores, count);
    }
    decode_add_values<kQueries>(
        partial.acc, acc_stride_, factor, scores, values, call_.value_dim, count, keys + count * call_.head_dim);
  }

  void combine_splits(int64_t kv_row, const Partial& partial) const {
    const int64_t row = this->row_of(kv_row), count = this->tokens_of(row);
    for (int64_t q = 0; q < count * group_size_; ++q) {
      const int64_t head = this->kv_head_of(kv_row) * group_size_ + q % group_size_;
      const acc_t logit = this->head_value(call_.sink_logits, head, kMinusInfinity<acc_t>);
      acc_t max = logit;
      for (int64_t s = 0; s < num_splits_; ++s) max = std::max(max, partial.state[s * num_queries_ + q].max);
      const acc_t base = max == kMinusInfinity<acc_t> ? 0 : max;
      acc_t sum = std::exp(logit - base);
      acc_t* acc = partial.acc + q * acc_stride_;  // the first split's: the others are added to it
      for (int64_t s = 0; s < num_splits_; ++s) {
        const Partial other = at(partial, s * num_queries_ + q);
        const acc_t weight = std::exp(other.state->max - base);
        sum += weight * other.state->sum;
        for (int64_t d = 0; d < acc_stride_; ++d) acc[d] = (s > 0 ? acc[d] : 0) + weight * other.acc[d];
      }
      this->write_out(row, q / group_size_, head, acc, sum);
    }
    this->write_zeros(kv_row, count, call_.tokens);
  }

  const int64_t num_splits_;   // KV splits of each KV row; rows with fewer sinks may need fewer
  const int64_t num_queries_;  // of each KV row: tokens x heads of the group
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
