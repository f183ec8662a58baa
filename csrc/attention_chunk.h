// Many queries per key: rows x heads x blocks of queries are dealt out to the threads. Blocks of keys and values are
// packed into a small buffer that stays in the processor's cache while all queries of an item use it; blocks that no
// query of a tile sees are skipped.
//
// New keys and values go to a buffer first. Queries attend to what was in the ring before and to the buffer, then the
// buffer goes to the ring: right for any number of tokens, longer than the ring or not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention_chunk_microkernel.h"
#include "attention_base.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kChunkTokens = 512;         // tokens taken at once...
constexpr int64_t kBufferBytes = 32 << 20;    // ...fewer for many rows, so that the buffer stays about as large
constexpr int64_t kMinChunkTokens = 64;

template <typename scalar_t>
class Chunk : AttentionRows<scalar_t> {
  using Base = AttentionRows<scalar_t>;
  using typename Base::acc_t, typename Base::Interval;
  using Base::call_, Base::layout_, Base::threads_, Base::pairs_, Base::group_, Base::query_stride_,
      Base::sums_stride_, Base::scale_;
  using Matrix = Packed<scalar_t>;
  using element = typename Matrix::element;

 public:
  Chunk(const AttentionCall& call, Workers& threads) : Base(call, threads) {}

  void run() {
    const int64_t step = std::clamp(kBufferBytes / std::max<int64_t>(1, this->cache_bytes(1)), kMinChunkTokens, kChunkTokens);
    for (start_ = 0; start_ < call_.tokens; start_ += step) {
      count_ = std::min(step, call_.tokens - start_);
      attend_chunk();
    }
  }

 private:
  struct Scratch {
    element *window_query, *sink_query, *keys, *values;
    acc_t *rotated, *sums, *scores;
    Softmax<acc_t>* state;
  };

  // Tokens of the chunk that a row really brings.
  int64_t counted(int64_t row) const { return std::clamp<int64_t>(this->tokens_of(row) - start_, 0, count_); }

  // Buffered keys and values of a pair, rotated and rounded as in the cache.
  scalar_t* new_keys_of(int64_t pair) const { return new_keys_ + pair * count_ * call_.head_dim; }
  scalar_t* new_values_of(int64_t pair) const { return new_values_ + pair * count_ * call_.value_dim; }

  void attend_chunk() {
    const int64_t item_tokens = std::clamp<int64_t>(Matrix::kItemRows / group_, 1, count_);
    const int64_t blocks = (count_ + item_tokens - 1) / item_tokens, items = pairs_ * blocks;
    const int64_t rows = round_up(item_tokens * group_, Matrix::kRows);
    const int64_t workers = this->workers_for(items, this->cache_bytes(16 * count_));
    const int64_t query_elements = rows * Matrix::query_size(call_.head_dim);
    const int64_t keys_elements = Matrix::keys_size(call_.head_dim);
    const int64_t values_elements = Matrix::values_size(call_.value_dim);
    const int64_t scratch_bytes =
        2 * Arena::bytes<element>(query_elements) + Arena::bytes<element>(keys_elements) +
        Arena::bytes<element>(values_elements) + Arena::bytes<acc_t>(3 * query_stride_) +
        Arena::bytes<acc_t>(rows * sums_stride_) + Arena::bytes<acc_t>(Matrix::kRows * Matrix::kKeys) +
        Arena::bytes<Softmax<acc_t>>(rows);
    Arena arena{threads_.workspace(
        workers * scratch_bytes + Arena::bytes<scalar_t>(pairs_ * count_ * call_.head_dim) +
        Arena::bytes<scalar_t>(pairs_ * count_ * call_.value_dim))};
    new_keys_ = arena.take<scalar_t>(pairs_ * count_ * call_.head_dim);
    new_values_ = arena.take<scalar_t>(pairs_ * count_ * call_.value_dim);

    for_each(threads_, workers, pairs_, [&](int64_t pair, int64_t) { fill_buffer(pair); });
    for_each(threads_, workers, items, [&](int64_t item, int64_t worker) {
      Arena own{arena.next + worker * scratch_bytes};
      Scratch memory;
      memory.window_query = own.take<element>(query_elements);
      memory.sink_query = own.take<element>(query_elements);
      memory.keys = own.take<element>(keys_elements);
      memory.values = own.take<element>(values_elements);
      memory.rotated = own.take<acc_t>(3 * query_stride_);
      memory.sums = own.take<acc_t>(rows * sums_stride_);
      memory.scores = own.take<acc_t>(Matrix::kRows * Matrix::kKeys);
      memory.state = own.take<Softmax<acc_t>>(rows);
      const int64_t pair = item / blocks, first = item % blocks * item_tokens;
      const int64_t end = std::min(first + item_tokens, count_);
      const int64_t counted_end = std::min(end, counted(this->row_of(pair)));
      if (first < counted_end) attend(pair, first, counted_end, memory);
      this->write_zeros(pair, start_ + std::max(first, counted_end), start_ + end);
    });
    for_each(threads_, workers, pairs_, [&](int64_t pair, int64_t) { empty_buffer(pair); });
  }

  void fill_buffer(int64_t pair) const {
    const int64_t row = this->row_of(pair), seen = call_.seen[row] + start_, count = counted(row);
    for (int64_t i = 0; i < count; ++i) {
      this->write_key(new_keys_of(pair) + i * call_.head_dim, pair, start_ + i);
      this->write_value(new_values_of(pair) + i * call_.value_dim, pair, start_ + i);
    }
    // Sinks are never evicted, so they are written before anything attends.
    if (seen < layout_.num_sinks) write_slots(pair, {0, seen, std::min(count, layout_.num_sinks - seen)});
  }

  void empty_buffer(int64_t pair) const {
    const int64_t row = this->row_of(pair);
    Run runs[RingLayout::kMaxRuns];
    const int n = layout_.write_runs(call_.seen[row] + start_, counted(row), runs);
    for (int r = 0; r < n; ++r) write_slots(pair, runs[r]);
  }

  void write_slots(int64_t pair, const Run& run) const {
    std::copy_n(
        new_keys_of(pair) + run.token * call_.head_dim, run.count * call_.head_dim,
        this->keys_of(pair) + run.slot * call_.head_dim);
    std::copy_n(
        new_values_of(pair) + run.token * call_.value_dim, run.count * call_.value_dim,
        this->values_of(pair) + run.slot * call_.value_dim);
  }

  // The queries of tokens [first, end) of the chunk. Row q of an item is head q % group_ of token first + q / group_.
  void attend(int64_t pair, int64_t first, int64_t end, const Scratch& memory) const {
    const typename Matrix::Session session{};
    const int64_t row = this->row_of(pair), seen = call_.seen[row] + start_, rows = (end - first) * group_;
    const int64_t padded = round_up(rows, Matrix::kRows), size = Matrix::query_size(call_.head_dim);
    acc_t* const window = memory.rotated;
    acc_t* const sink = window + query_stride_;
    for (int64_t q = 0; q < rows; ++q) {
      this->rotate_query(
          window, sink, sink + query_stride_, row, this->kv_head_of(pair) * group_ + q % group_,
          start_ + first + q / group_);
      Matrix::pack_query(memory.window_query + q * size, window, call_.head_dim, scale_);
      Matrix::pack_query(memory.sink_query + q * size, sink, call_.head_dim, scale_);
    }
    // What fills up the last tile sees nothing.
    std::fill(memory.window_query + rows * size, memory.window_query + padded * size, element{});
    std::fill(memory.sink_query + rows * size, memory.sink_query + padded * size, element{});
    std::fill(memory.state, memory.state + padded, Softmax<acc_t>{kMinusInfinity<acc_t>, 0});
    std::fill(memory.sums, memory.sums + padded * sums_stride_, acc_t{0});

    const Queries queries{seen + first, rows, this->kv_head_of(pair) * group_};
    const int64_t stop = seen + end, sinks = std::min(stop, layout_.num_sinks);
    attend_run(queries, {0, 0, sinks}, true, this->keys_of(pair), this->values_of(pair), stop, memory);
    Run runs[RingLayout::kMaxRuns];
    const int n = layout_.held_runs(seen, runs);
    for (int r = 0; r < n; ++r) {
      if (runs[r].slot < layout_.num_sinks) continue;
      attend_run(
          queries, runs[r], false, this->keys_of(pair) + runs[r].slot * call_.head_dim,
          this->values_of(pair) + runs[r].slot * call_.value_dim, stop, memory);
    }
    const int64_t skip = std::clamp<int64_t>(layout_.num_sinks - seen, 0, end);
    attend_run(
        queries, {seen + skip, 0, end - skip}, false, new_keys_of(pair) + skip * call_.head_dim,
        new_values_of(pair) + skip * call_.value_dim, stop, memory);

    for (int64_t q = 0; q < rows; ++q) {
      acc_t* sums = memory.sums + q * sums_stride_;
      const int64_t head = queries.head + q % group_;
      if (call_.sink_logits) {
        const acc_t factor = add_logit(memory.state[q], this->option(call_.sink_logits, head, 0));
        for (int64_t d = 0; d < call_.value_dim; ++d) sums[d] *= factor;
      }
      this->write_out(row, start_ + first + q / group_, head, sums, memory.state[q].total);
    }
  }

  struct Queries {
    int64_t token;  // of the first row
    int64_t rows;
    int64_t head;  // of the first row
  };

  // A run of consecutive tokens that lie one behind the other, up to token `stop`.
  void attend_run(
      const Queries& queries, const Run& run, bool sinks, const scalar_t* keys, const scalar_t* values, int64_t stop,
      const Scratch& memory) const {
    const int64_t begin = std::max(run.token, sinks ? 0 : layout_.window_begin(queries.token));
    const int64_t end = std::min(run.token + run.count, stop);
    for (int64_t token = begin; token < end; token += Matrix::kKeys) {
      const int count = static_cast<int>(std::min<int64_t>(Matrix::kKeys, end - token));
      const scalar_t* block_values = values + (token - run.token) * call_.value_dim;
      Matrix::pack_keys(memory.keys, keys + (token - run.token) * call_.head_dim, call_.head_dim, count);
      const bool finite = Matrix::pack_values(memory.values, block_values, call_.value_dim, count);
      for (int64_t q = 0; q < queries.rows; q += Matrix::kRows) {
        attend_tile(queries, q, {token, 0, count}, sinks, finite ? nullptr : block_values, memory);
      }
    }
  }

  // Rows from q on against a packed block; `spoiled` are its values if one of them is no finite number.
  void attend_tile(
      const Queries& queries, int64_t q, const Run& block, bool sinks, const scalar_t* spoiled,
      const Scratch& memory) const {
    Interval seen_here[Matrix::kRows];
    bool any = false, all = true;
    for (int r = 0; r < Matrix::kRows; ++r) {
      seen_here[r] = {0, 0};
      if (q + r < queries.rows) seen_here[r] = this->seen_by(queries.token + (q + r) / group_, block, sinks);
      any |= seen_here[r].count > 0;
      all &= seen_here[r].count == block.count;
    }
    if (!any) return;
    const int count = static_cast<int>(block.count);
    const element* query = (sinks ? memory.sink_query : memory.window_query) + q * Matrix::query_size(call_.head_dim);
    Matrix::scores(memory.scores, scale_, query, memory.keys, call_.head_dim, count);
    acc_t factor[Matrix::kRows];
    for (int r = 0; r < Matrix::kRows; ++r) {
      acc_t* scores = memory.scores + r * Matrix::kKeys;
      const Interval here = seen_here[r];
      if (here.count == 0) {
        std::fill(scores, scores + Matrix::kKeys, acc_t{0});
        factor[r] = 1;
        continue;
      }
      const int64_t head = queries.head + (q + r) % group_, token = queries.token + (q + r) / group_;
      this->adjust_scores(scores, count, head, token, block.token, sinks);
      std::fill(scores, scores + here.first, kMinusInfinity<acc_t>);
      std::fill(scores + here.first + here.count, scores + count, kMinusInfinity<acc_t>);
      factor[r] = update(memory.state[q + r], scores, count);
    }
    acc_t* sums = memory.sums + q * sums_stride_;
    if (!spoiled || all) {
      Matrix::add_values(sums, factor, memory.scores, memory.values, call_.value_dim, count);
    } else {
      add_seen_values(sums, factor, memory.scores, spoiled, seen_here);
    }
  }

  // A hidden value that is no finite number has weight 0, and 0 times that is NaN: hidden values are left out.
  void add_seen_values(
      acc_t* sums, const acc_t* factor, const acc_t* weights, const scalar_t* values,
      const Interval* seen_here) const {
    for (int r = 0; r < Matrix::kRows; ++r, sums += sums_stride_, weights += Matrix::kKeys) {
      for (int64_t d = 0; d < call_.value_dim; ++d) {
        sums[d] *= factor[r];
        for (int64_t j = seen_here[r].first; j < seen_here[r].first + seen_here[r].count; ++j) {
          sums[d] += weights[j] * static_cast<acc_t>(values[j * call_.value_dim + d]);
        }
      }
    }
  }

  int64_t start_ = 0;  // first token of the chunk
  int64_t count_ = 0;  // tokens of the chunk
  scalar_t* new_keys_ = nullptr;
  scalar_t* new_values_ = nullptr;
};

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
