// The ring operators on the CPU: append_, rollback_, reorder_, reset_, linearise.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "argument_checks.h"
#include "operators.h"
#include "quantise.h"
#include "require.h"
#include "ring.h"
#include "rotary.h"
#include "row_moves.h"

namespace sinkattn {
namespace {

constexpr int64_t kGrainElements = 16384;  // with fewer elements, a second thread costs more than it saves

int64_t grain_size(int64_t elements_per_item) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_item));
}

// Keys or values of a cache, by KV row and slot.
template <typename scalar_t>
class Slots {
 public:
  // `sinks` and `scales`: of a ring of 8 bits.
  Slots(const Tensor& cache, const std::optional<Tensor>& sinks, const std::optional<Tensor>& scales, bool are_keys)
      : num_slots_(cache.size(2)), dim_(cache.size(3)), are_keys_(are_keys) {
    const Tensor& whole = sinks ? *sinks : cache;
    whole_ = static_cast<scalar_t*>(whole.mutable_data_ptr());
    num_whole_ = whole.size(2);
    if (!scales) return;
    ring_ = cache.mutable_data_ptr();
    scales_ = static_cast<float*>(scales->mutable_data_ptr());
    is_int8_ = cache.scalar_type() == ScalarType::Char;
  }

  // Writes the vector of a token: visit(emit) calls emit(d, element) for all of its elements. `buffer` has room for it.
  template <typename Visit>
  void write(int64_t kv_row, int64_t slot, float* buffer, const Visit& visit) const {
    if (slot < num_whole_) {
      scalar_t* to = whole_ + (kv_row * num_whole_ + slot) * dim_;
      return visit([=](int64_t d, scalar_t x) { to[d] = x; });
    }
    visit([=](int64_t d, scalar_t x) { buffer[d] = static_cast<float>(x); });
    if (are_keys_) hadamard(buffer, dim_);
    const int64_t target = kv_row * num_slots_ + slot - num_whole_;
    scales_[target] = is_int8_ ? quantise(static_cast<int8_t*>(ring_) + target * dim_, buffer, 1, dim_)
                               : quantise(static_cast<Float8*>(ring_) + target * dim_, buffer, 1, dim_);
  }

 private:
  scalar_t* whole_;  // slots in the dtype of new tokens: all, or beside a ring of 8 bits those of the sinks
  void* ring_ = nullptr;
  float* scales_ = nullptr;
  int64_t num_whole_, num_slots_, dim_;
  bool are_keys_, is_int8_ = false;
};

template <typename scalar_t>
void append_rows(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const int64_t* seen,
    const int64_t* lengths, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    const RingLayout& layout, bool interleaved, const RowOptions& options, const EightBit& more) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const int64_t kv_heads = keys.size(1), tokens = key.size(2);
  const int64_t key_dim = keys.size(3), value_dim = values.size(3);
  const Slots<scalar_t> key_slots(keys, more.sink_keys, more.key_scales, true);
  const Slots<scalar_t> value_slots(values, more.sink_values, more.value_scales, false);
  const auto* key_data = static_cast<const scalar_t*>(key.const_data_ptr());
  const auto* value_data = static_cast<const scalar_t*>(value.const_data_ptr());
  const acc_t* cos_data = cos ? static_cast<const acc_t*>(cos->const_data_ptr()) : nullptr;
  const acc_t* sin_data = sin ? static_cast<const acc_t*>(sin->const_data_ptr()) : nullptr;
  const int64_t pairs = cos ? cos->size(2) : 0;

  const int64_t max_written = std::min(tokens, layout.slots());
  torch::stable::parallel_for(
      0, key.size(0) * kv_heads, grain_size(max_written * (key_dim + value_dim)), [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(std::max(key_dim, value_dim));
        for (int64_t kv_row = begin; kv_row < end; ++kv_row) {
          const int64_t row = kv_row / kv_heads, head = kv_row % kv_heads;
          Run runs[RingLayout::kMaxRuns];
          const int64_t sinks = options.row_sinks ? options.row_sinks[row] : layout.num_sinks;
          const int64_t cache_kv_row = (options.rows ? options.rows[row] : row) * kv_heads + head;
          const int n = layout.of_row(sinks, 0).write_runs(seen[row], lengths ? lengths[row] : tokens, runs);
          for (int r = 0; r < n; ++r) {
            for (int64_t i = 0; i < runs[r].count; ++i) {
              const int64_t token = runs[r].token + i, slot = runs[r].slot + i;
              key_slots.write(cache_kv_row, slot, buffer.data(), [&](const auto& emit) {
                for_each_rotated<scalar_t>(
                    key_data + row * key.stride(0) + head * key.stride(1) + token * key.stride(2), key.stride(3),
                    key_dim, pairs, cos ? cos_data + row * cos->stride(0) + token * cos->stride(1) : nullptr,
                    sin ? sin_data + row * sin->stride(0) + token * sin->stride(1) : nullptr,
                    cos ? cos->stride(2) : 0, interleaved, emit);
              });
              const scalar_t* from =
                  value_data + row * value.stride(0) + head * value.stride(1) + token * value.stride(2);
              value_slots.write(cache_kv_row, slot, buffer.data(), [&](const auto& emit) {
                for (int64_t d = 0; d < value_dim; ++d) emit(d, from[d * value.stride(3)]);
              });
            }
          }
        }
      });
}

void append_(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const Tensor& seen,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    int64_t num_sinks, bool interleaved, const std::optional<Tensor>& rows, const std::optional<Tensor>& row_sinks,
    const std::optional<Tensor>& sink_keys, const std::optional<Tensor>& sink_values,
    const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
  const EightBit more{sink_keys, sink_values, key_scales, value_scales};
  const bool is_eight_bit = check_append(keys, values, key, value, cos, sin, num_sinks, more);
  const int64_t batch = key.size(0), tokens = key.size(2);
  const RowOptions options = row_options(rows, row_sinks, batch, keys);
  check_row_options(options, batch, keys.size(0), num_sinks);
  const int64_t* seen_data = int64_data(seen, batch, keys, "seen");
  const int64_t* length_data = lengths ? int64_data(*lengths, batch, keys, "lengths") : nullptr;
  check_seen_and_lengths(seen_data, length_data, batch, tokens);
  const RingLayout layout{num_sinks, keys.size(2) - (is_eight_bit ? 0 : num_sinks), 0};
  THO_DISPATCH_V2(
      key.scalar_type(), "append_", AT_WRAP([&] {
        append_rows<scalar_t>(
            keys, values, key, value, seen_data, length_data, cos, sin, layout, interleaved, options, more);
      }),
      AT_FLOATING_TYPES, ScalarType::Half, ScalarType::BFloat16);
}

void rollback_(const Tensor& seen, const Tensor& peak, const Tensor& counts, int64_t headroom) {
  const int64_t batch = seen.numel();
  int64_data(seen, batch, seen, "seen");
  int64_data(peak, batch, seen, "peak");
  const int64_t* count_data = int64_data(counts, batch, seen, "counts");
  auto* seen_data = static_cast<int64_t*>(seen.mutable_data_ptr());
  auto* peak_data = static_cast<int64_t*>(peak.mutable_data_ptr());
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t count = count_data[row];
    require(
        count >= 0 && count <= seen_data[row], "rollback: expected 0 to ", seen_data[row], " tokens in row ", row,
        ", got ", count);
    // Tokens that were rolled back before have already overwritten older ones: headroom counts from the peak.
    const int64_t new_peak = std::max(peak_data[row], seen_data[row]);
    require(
        count == 0 || new_peak - (seen_data[row] - count) <= headroom, "rollback: row ", row, " can roll back ",
        std::max<int64_t>(0, headroom - (new_peak - seen_data[row])), " tokens more (headroom ", headroom, "), got ",
        count);
  }
  for (int64_t row = 0; row < batch; ++row) {
    peak_data[row] = std::max(peak_data[row], seen_data[row]);
    seen_data[row] -= count_data[row];
  }
}

int64_t row_bytes(const Tensor& cache) { return cache.size(2) * cache.size(3) * cache.element_size(); }

void reorder_(const Tensor& keys, const Tensor& values, const Tensor& source) {
  check_cache(keys, values);
  const int64_t batch = keys.size(0), kv_heads = keys.size(1);
  const int64_t* source_data = int64_data(source, batch, keys, "source");
  for (int64_t row = 0; row < batch; ++row) {
    require(
        source_data[row] >= 0 && source_data[row] < batch, "source: expected 0 to ", batch - 1, ", got ",
        source_data[row], " in row ", row);
  }
  std::vector<RowMove> moves(max_row_moves(batch));
  std::vector<int64_t> num_readers(batch);
  moves.resize(plan_row_moves(source_data, batch, num_readers.data(), moves.data()));
  if (moves.empty()) return;
  for (const Tensor* cache : {&keys, &values}) {
    auto* data = static_cast<char*>(cache->mutable_data_ptr());
    const int64_t bytes = row_bytes(*cache);
    torch::stable::parallel_for(0, kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<char> spare(bytes);  // kSpareRow
      for (int64_t head = begin; head < end; ++head) {
        const auto at = [&](int64_t row) {
          return row == kSpareRow ? spare.data() : data + (row * kv_heads + head) * bytes;
        };
        for (const RowMove& move : moves) std::memcpy(at(move.to), at(move.from), bytes);
      }
    });
  }
}

void reset_(const Tensor& keys, const Tensor& values, const Tensor& rows) {
  check_cache(keys, values);
  const int64_t count = rows.numel();
  const int64_t* row_data = int64_data(rows, count, keys, "rows");
  for (int64_t i = 0; i < count; ++i) {
    require(
        row_data[i] >= 0 && row_data[i] < keys.size(0), "rows: expected 0 to ", keys.size(0) - 1, ", got ",
        row_data[i], " in element ", i);
  }
  for (const Tensor* cache : {&keys, &values}) {
    auto* data = static_cast<char*>(cache->mutable_data_ptr());
    const int64_t bytes = keys.size(1) * row_bytes(*cache);
    for (int64_t i = 0; i < count; ++i) std::memset(data + row_data[i] * bytes, 0, bytes);
  }
}

std::tuple<Tensor, Tensor> linearise(
    const Tensor& keys, const Tensor& values, const Tensor& seen, int64_t num_sinks, int64_t window) {
  check_cache(keys, values);
  const int64_t batch = keys.size(0), kv_heads = keys.size(1), slots = keys.size(2);
  check_layout(slots, num_sinks, window);
  const int64_t* seen_data = int64_data(seen, batch, keys, "seen");
  const RingLayout layout{num_sinks, window, slots - num_sinks - window};
  const auto linearised = [&](const Tensor& cache) {
    const int64_t length = num_sinks + window;
    Tensor out = torch::stable::new_zeros(cache, {batch, kv_heads, length, cache.size(3)});
    const auto* from = static_cast<const char*>(cache.const_data_ptr());
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    const int64_t bytes = cache.size(3) * cache.element_size();
    const int64_t grain = grain_size(length * cache.size(3));
    torch::stable::parallel_for(0, batch * kv_heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t kv_row = begin; kv_row < end; ++kv_row) {
        const int64_t count = seen_data[kv_row / kv_heads];
        const int64_t sinks = std::min(count, num_sinks);
        const int64_t recent = std::min(count - sinks, window);
        for (int64_t i = 0; i < sinks + recent; ++i) {
          const int64_t token = i < sinks ? i : count - recent + (i - sinks);
          std::memcpy(to + (kv_row * length + i) * bytes, from + (kv_row * slots + layout.slot(token)) * bytes, bytes);
        }
      }
    });
    return out;
  };
  return {linearised(keys), linearised(values)};
}

}  // namespace
}  // namespace sinkattn

STABLE_TORCH_LIBRARY_IMPL(SINKATTN_OPERATORS, CPU, m) {
  m.impl("append_", TORCH_BOX(&sinkattn::append_));
  m.impl("rollback_", TORCH_BOX(&sinkattn::rollback_));
  m.impl("reorder_", TORCH_BOX(&sinkattn::reorder_));
  m.impl("reset_", TORCH_BOX(&sinkattn::reset_));
  m.impl("linearise", TORCH_BOX(&sinkattn::linearise));
}
