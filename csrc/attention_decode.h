// Decoding: few queries per KV head. Included by attention_kernel.h.
//
// A work item is one KV split (a range of slots) of one KV row. An item reads its keys and values once, in storage order
// and in blocks, for all new tokens and all query heads of the group. The last item of a KV row to finish combines the
// splits.
//
// The number of splits depends only on shapes, so results do not depend on the number of threads. Where blocks begin
// depends only on slots, and the sums of a query only on the keys of a block that it sees, so a token gives bit for bit
// what it gives in a call of its own.
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
  using Microkernel = DecodeMicrokernel<scalar_t>;
  using typename Base::acc_t, typename Base::Interval, typename Base::Vectors;
  using Queries = DecodeQueries<acc_t>;
  using Base::call_, Base::layout_, Base::workers_, Base::num_kv_rows_, Base::group_size_, Base::query_stride_,
      Base::acc_stride_, Base::score_scale_;

 public:
  // Requires call.tokens <= headroom + 1: then appending first overwrites no key that a query sees.
  Decode(const AttentionCall& call, Workers& workers)
      : Base(call, workers),
        num_splits_(num_splits(layout_.slots())),
        num_queries_(call.tokens * group_size_),
        microkernel_(num_queries_, call.head_dim, call.value_dim, call.ring) {}

  void run() {
    const int64_t num_items = num_kv_rows_ * num_splits_;
    const int64_t num_workers = this->num_workers_for(num_items, this->cache_bytes(layout_.slots()));
    const int64_t scratch_bytes =
        2 * Arena::bytes<acc_t>(num_queries_ * query_stride_) + 2 * Arena::bytes<char>(microkernel_.packed_size()) +
        Arena::bytes<acc_t>(query_stride_) + Arena::bytes<acc_t>(Microkernel::kQueries * kDecodeBlock) +
        Arena::bytes<char>(microkernel_.staging_size());
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
      const typename Microkernel::TileConfig tile_config(microkernel_);
      Arena worker_arena{arena.next + worker * scratch_bytes};
      Scratch scratch;
      for (Queries* queries : {&scratch.window, &scratch.sinks}) {
        queries->rotated = worker_arena.take<acc_t>(num_queries_ * query_stride_);
        queries->packed = worker_arena.take<char>(microkernel_.packed_size());
      }
      scratch.unrotated = worker_arena.take<acc_t>(query_stride_);
      scratch.scores = worker_arena.take<acc_t>(Microkernel::kQueries * kDecodeBlock);
      scratch.staging = worker_arena.take<char>(microkernel_.staging_size());
      const int64_t kv_row = item / num_splits_;
      const RingLayout layout = this->layout_of(this->row_of(kv_row));
      const SlotRange split = split_of(layout, item % num_splits_);
      append(kv_row, layout, split, scratch);
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
    Queries window, sinks;
    acc_t *unrotated, *scores;
    char* staging;
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
    const int64_t size = round_up((slots + count - 1) / count, kDecodeBlock);
    return {split * size, std::min((split + 1) * size, slots)};
  }

  // Slots of the cache that belong to a run and to a split.
  static SlotRange intersect(const RingLayout& layout, const SlotRange& split, const Run& run) {
    const int64_t unused = run.slot < layout.num_sinks ? 0 : layout.unused;
    return {std::max(run.slot, split.begin + unused), std::min(run.slot + run.count, split.end + unused)};
  }

  // Writes the new tokens whose slots lie in this split. No other item writes or reads these slots.
  void append(int64_t kv_row, const RingLayout& layout, const SlotRange& split, const Scratch& scratch) const {
    const int64_t row = this->row_of(kv_row);
    Run runs[RingLayout::kMaxRuns];
    const int n = layout.write_runs(call_.seen[row], this->tokens_of(row), runs);
    for (int r = 0; r < n; ++r) {
      const SlotRange here = intersect(layout, split, runs[r]);
      for (int64_t slot = here.begin; slot < here.end; ++slot) {
        const int64_t token = runs[r].token + slot - runs[r].slot;
        this->write_key(this->keys_of(kv_row, slot), kv_row, token, scratch.unrotated);
        this->write_value(this->values_of(kv_row, slot), kv_row, token);
      }
    }
  }

  // Query q is head q % group_size_ of token q / group_size_.
  void attend(
      int64_t kv_row, const RingLayout& layout, const SlotRange& split, const Scratch& scratch,
      const Partial& partial) const {
    const int64_t row = this->row_of(kv_row), count = this->tokens_of(row), seen = call_.seen[row];
    const int64_t num_queries = count * group_size_;
    const bool has_sinks = split.begin < layout.num_sinks;
    for (int64_t q = 0; q < num_queries; ++q) {
      this->rotate_query(
          scratch.window.rotated + q * query_stride_,
          has_sinks ? scratch.sinks.rotated + q * query_stride_ : nullptr, scratch.unrotated, row,
          this->kv_head_of(kv_row) * group_size_ + q % group_size_, q / group_size_);
    }
    microkernel_.pack(scratch.window, num_queries, false);
    if (has_sinks) microkernel_.pack(scratch.sinks, num_queries, true);
    std::fill(partial.state, partial.state + num_queries, SoftmaxState<acc_t>{kMinusInfinity<acc_t>, 0});
    std::fill(partial.acc, partial.acc + num_queries * acc_stride_, acc_t{0});
    Run runs[RingLayout::kMaxRuns];
    const int n = layout.held_runs(seen + count, runs);
    for (int r = 0; r < n; ++r) {
      const bool is_sink = runs[r].slot < layout.num_sinks;
      const SlotRange here = intersect(layout, split, runs[r]);
      const int64_t origin = split.begin + (is_sink ? 0 : layout.unused);
      for (int64_t slot = here.begin, end; slot < here.end; slot = end) {
        end = std::min(here.end, slot + kDecodeBlock - (slot - origin) % kDecodeBlock);
        const Run block{runs[r].token + slot - runs[r].slot, slot, end - slot};
        attend_block(kv_row, layout, seen, count, block, is_sink, scratch, partial);
      }
    }
  }

  // Attention of all tokens over a block. Tokens that see the same keys of it, which are all but at an end of a window,
  // share loads.
  void attend_block(
      int64_t kv_row, const RingLayout& layout, int64_t seen, int64_t count, const Run& block, bool is_sink,
      const Scratch& scratch, const Partial& partial) const {
    for (int64_t i = 0, end; i < count; i = end) {
      const Interval visible = this->visible_interval(layout, seen + i, block, is_sink);
      for (end = i + 1; end < count; ++end) {
        const Interval other = this->visible_interval(layout, seen + end, block, is_sink);
        if (other.first != visible.first || other.count != visible.count) break;
      }
      if (visible.count == 0) continue;
      const Run keys{block.token + visible.first, block.slot + visible.first, visible.count};
      for (int64_t q = i * group_size_, stop; q < end * group_size_; q = stop) {
        stop = std::min(end * group_size_, q + Microkernel::kQueries - q % Microkernel::kQueries);
        attend_queries(kv_row, layout, seen, q, stop - q, keys, is_sink, scratch, partial);
      }
    }
  }

  // Attention of queries [q, q + num_queries), of one group of the microkernel, over keys that they all see.
  void attend_queries(
      int64_t kv_row, const RingLayout& layout, int64_t seen, int64_t q, int64_t num_queries, const Run& run,
      bool is_sink, const Scratch& scratch, const Partial& partial) const {
    const int count = static_cast<int>(run.count);
    const Vectors keys = this->keys_of(kv_row, run.slot), values = this->values_of(kv_row, run.slot);
    this->with_elements(keys, [&](const auto* key_elements) {
      const auto* value_elements = reinterpret_cast<decltype(key_elements)>(values.data);
      Upcoming next_values(value_elements, count * call_.value_dim);
      microkernel_.scores(
          scratch.scores, score_scale_, is_sink ? scratch.sinks : scratch.window, q, num_queries, key_elements, count,
          scratch.staging, next_values);
      if (keys.scales) this->multiply_by_scales(scratch.scores, kDecodeBlock, num_queries, keys.scales, count);
      const int64_t part = next_values.part(num_queries);
      acc_t factor[Microkernel::kQueries];
      for (int64_t r = 0; r < num_queries; ++r) {
        next_values.prefetch(part);
        acc_t* scores = scratch.scores + r * kDecodeBlock;
        const int64_t head = this->kv_head_of(kv_row) * group_size_ + (q + r) % group_size_;
        this->adjust_scores(layout, scores, count, head, seen + (q + r) / group_size_, run.token, is_sink);
        factor[r] = update_softmax(partial.state[q + r], scores, count);
      }
      if (values.scales) this->multiply_by_scales(scratch.scores, kDecodeBlock, num_queries, values.scales, count);
      Upcoming next_keys(key_elements + count * call_.head_dim, count * call_.head_dim);
      microkernel_.add_values(
          partial.acc + q * acc_stride_, factor, scratch.scores, num_queries, value_elements, count, scratch.staging,
          next_keys);
    });
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
  const Microkernel microkernel_;
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
