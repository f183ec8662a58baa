// Few queries per key: rows x heads x stretches of slots are dealt out to the threads. Keys and values are read in
// storage order, once per token for all heads of a group, and the stretch that is finished last combines them all. What
// is split, and how, depends on shapes alone, never on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <new>

#include "attention_decode_microkernel.h"
#include "attention_base.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kStretch = 512;   // slots dealt out at once...
constexpr int64_t kMaxItems = 256;  // ...unless that makes more items

template <typename scalar_t>
class Decode : AttentionRows<scalar_t> {
  using Base = AttentionRows<scalar_t>;
  using typename Base::acc_t, typename Base::Interval;
  using Base::call_, Base::layout_, Base::threads_, Base::pairs_, Base::group_, Base::query_stride_,
      Base::sums_stride_, Base::scale_;

 public:
  // Needs call.tokens <= headroom + 1, so that appending first overwrites nothing that a query sees.
  Decode(const AttentionCall& call, Workers& threads)
      : Base(call, threads),
        splits_(std::clamp<int64_t>((layout_.slots() + kStretch - 1) / kStretch, 1, std::max<int64_t>(1, kMaxItems / pairs_))),
        stretch_(round_up((layout_.slots() + splits_ - 1) / splits_, 16)),
        queries_(call.tokens * group_) {}

  void run() {
    const int64_t items = pairs_ * splits_, workers = this->workers_for(items, this->cache_bytes(layout_.slots()));
    const int64_t scratch_bytes = 2 * Arena::bytes<acc_t>(group_ * query_stride_) +
                                  Arena::bytes<acc_t>(query_stride_) +
                                  Arena::bytes<acc_t>(kDirectRows<acc_t> * kDirectBlock);
    Arena arena{threads_.workspace(
        workers * scratch_bytes + Arena::bytes<Softmax<acc_t>>(items * queries_) +
        Arena::bytes<acc_t>(items * queries_ * sums_stride_) + Arena::bytes<std::atomic<int64_t>>(pairs_))};
    const Partial partial{
        arena.take<Softmax<acc_t>>(items * queries_), arena.take<acc_t>(items * queries_ * sums_stride_)};
    auto* finished = arena.take<std::atomic<int64_t>>(pairs_);
    for (int64_t pair = 0; pair < pairs_; ++pair) new (finished + pair) std::atomic<int64_t>(0);

    for_each(threads_, workers, items, [&](int64_t item, int64_t worker) {
      Arena own{arena.next + worker * scratch_bytes};
      Scratch memory;
      memory.window_query = own.take<acc_t>(group_ * query_stride_);
      memory.sink_query = own.take<acc_t>(group_ * query_stride_);
      memory.plain = own.take<acc_t>(query_stride_);
      memory.scores = own.take<acc_t>(kDirectRows<acc_t> * kDirectBlock);
      const int64_t pair = item / splits_, first = item % splits_ * stretch_;
      const Slots slots{first, std::min(first + stretch_, layout_.slots())};
      append(pair, slots);
      attend(pair, slots, memory, at(partial, item * queries_));
      // The last one has to see what all the others wrote.
      if (finished[pair].fetch_add(1, std::memory_order_acq_rel) == splits_ - 1) {
        combine(pair, at(partial, pair * splits_ * queries_));
      }
    });
  }

 private:
  struct Slots {
    int64_t begin, end;
  };

  struct Scratch {
    acc_t *window_query, *sink_query, *plain, *scores;
  };

  // What queries got from one stretch: [query] and [query, sums_stride].
  struct Partial {
    Softmax<acc_t>* state;
    acc_t* sums;
  };
  Partial at(const Partial& partial, int64_t query) const {
    return {partial.state + query, partial.sums + query * sums_stride_};
  }

  static Slots overlap(const Slots& slots, const Run& run) {
    return {std::max(run.slot, slots.begin), std::min(run.slot + run.count, slots.end)};
  }

  // Writes those new tokens whose slots lie in the stretch: no other item touches it.
  void append(int64_t pair, const Slots& slots) const {
    const int64_t row = this->row_of(pair);
    Run runs[RingLayout::kMaxRuns];
    const int n = layout_.write_runs(call_.seen[row], this->tokens_of(row), runs);
    for (int r = 0; r < n; ++r) {
      const Slots here = overlap(slots, runs[r]);
      for (int64_t slot = here.begin; slot < here.end; ++slot) {
        const int64_t token = runs[r].token + slot - runs[r].slot;
        this->write_key(this->keys_of(pair) + slot * call_.head_dim, pair, token);
        this->write_value(this->values_of(pair) + slot * call_.value_dim, pair, token);
      }
    }
  }

  void attend(int64_t pair, const Slots& slots, const Scratch& memory, const Partial& partial) const {
    const int64_t row = this->row_of(pair), count = this->tokens_of(row), seen = call_.seen[row];
    Run runs[RingLayout::kMaxRuns];
    const int n = layout_.held_runs(seen + count, runs);
    for (int64_t i = 0; i < count; ++i) {
      const Partial own = at(partial, i * group_);
      for (int64_t g = 0; g < group_; ++g) {
        this->rotate_query(
            memory.window_query + g * query_stride_, memory.sink_query + g * query_stride_, memory.plain, row,
            this->kv_head_of(pair) * group_ + g, i);
      }
      std::fill(own.state, own.state + group_, Softmax<acc_t>{kMinusInfinity<acc_t>, 0});
      std::fill(own.sums, own.sums + group_ * sums_stride_, acc_t{0});
      for (int r = 0; r < n; ++r) {
        const Slots here = overlap(slots, runs[r]);
        if (here.begin >= here.end) continue;
        const bool sinks = runs[r].slot < layout_.num_sinks;
        const Run run{runs[r].token + here.begin - runs[r].slot, here.begin, here.end - here.begin};
        const Interval seen_here = this->seen_by(seen + i, run, sinks);
        for (int64_t j = 0; j < seen_here.count; j += kDirectBlock) {
          const int64_t first = seen_here.first + j;
          const Run block{run.token + first, run.slot + first, std::min<int64_t>(kDirectBlock, seen_here.count - j)};
          attend_block(
              pair, seen + i, block, sinks, sinks ? memory.sink_query : memory.window_query, memory.scores, own);
        }
      }
    }
  }

  // Keys of a block stay in the L1 for all heads of the group.
  void attend_block(
      int64_t pair, int64_t token, const Run& block, bool sinks, const acc_t* query, acc_t* scores,
      const Partial& partial) const {
    constexpr int rows = kDirectRows<acc_t>;
    for (int64_t g = 0; g < group_; g += rows) {
      const acc_t* own = query + g * query_stride_;
      const Partial part = at(partial, g);
      const int64_t head = this->kv_head_of(pair) * group_ + g;
      switch (std::min<int64_t>(rows, group_ - g)) {
        case 1: attend_heads<1>(pair, head, token, block, sinks, own, scores, part); break;
        case 2: attend_heads<2>(pair, head, token, block, sinks, own, scores, part); break;
        case 3: attend_heads<std::min(rows, 3)>(pair, head, token, block, sinks, own, scores, part); break;
        case 4: attend_heads<rows>(pair, head, token, block, sinks, own, scores, part); break;
      }
    }
  }

  template <int kRows>
  void attend_heads(
      int64_t pair, int64_t head, int64_t token, const Run& block, bool sinks, const acc_t* query, acc_t* scores,
      const Partial& partial) const {
    const int count = static_cast<int>(block.count);
    const scalar_t* keys = this->keys_of(pair) + block.slot * call_.head_dim;
    const scalar_t* values = this->values_of(pair) + block.slot * call_.value_dim;
    direct_scores<kRows>(scores, scale_, query, query_stride_, keys, call_.head_dim, count, values, call_.value_dim);
    acc_t factor[kRows];
    for (int r = 0; r < kRows; ++r) {
      acc_t* own = scores + r * kDirectBlock;
      this->adjust_scores(own, count, head + r, token, block.token, sinks);
      factor[r] = update(partial.state[r], own, count);
    }
    direct_sum<kRows>(
        partial.sums, sums_stride_, factor, scores, values, call_.value_dim, count, keys + count * call_.head_dim);
  }

  void combine(int64_t pair, const Partial& partial) const {
    const int64_t row = this->row_of(pair), count = this->tokens_of(row);
    for (int64_t q = 0; q < count * group_; ++q) {
      const int64_t head = this->kv_head_of(pair) * group_ + q % group_;
      const acc_t logit = this->option(call_.sink_logits, head, kMinusInfinity<acc_t>);
      acc_t top = logit;
      for (int64_t s = 0; s < splits_; ++s) top = std::max(top, partial.state[s * queries_ + q].top);
      const acc_t base = top == kMinusInfinity<acc_t> ? 0 : top;
      acc_t total = std::exp(logit - base);
      acc_t* sums = partial.sums + q * sums_stride_;  // those of the first stretch take in the others
      for (int64_t s = 0; s < splits_; ++s) {
        const Partial other = at(partial, s * queries_ + q);
        const acc_t weight = std::exp(other.state->top - base);
        total += weight * other.state->total;
        for (int64_t d = 0; d < sums_stride_; ++d) sums[d] = (s > 0 ? sums[d] : 0) + weight * other.sums[d];
      }
      this->write_out(row, q / group_, head, sums, total);
    }
    this->write_zeros(pair, count, call_.tokens);
  }

  const int64_t splits_;   // stretches of every pair
  const int64_t stretch_;  // slots of a stretch
  const int64_t queries_;  // per pair
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
