// Argument checks of the operators of every device, included by attention.cpp, ring_cache.cpp and ring_cache_cuda.cu.
// They keep direct calls of the operators from accessing memory outside of the tensors. The public Python functions
// (sinkattn/ops/checks.py) give more detailed messages.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "require.h"
#include "ring.h"

namespace sinkattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_device(const Tensor& tensor, const Tensor& cache, const char* name) {
  require(
      tensor.is_cuda() == cache.is_cuda() && tensor.get_device_index() == cache.get_device_index(), name,
      ": expected to be on the device of the cache");
}

inline void check_cache(const Tensor& keys, const Tensor& values) {
  require(
      keys.dim() == 4 && values.dim() == 4, "keys, values: expected 4 dimensions, got ", keys.dim(), " and ",
      values.dim());
  require(keys.is_contiguous() && values.is_contiguous(), "keys, values: expected contiguous tensors");
  require(keys.scalar_type() == values.scalar_type(), "keys, values: expected the same dtype");
  for (int64_t dim = 0; dim < 3; ++dim) {
    require(keys.size(dim) == values.size(dim), "keys, values: expected the same batch, kv_heads and slots");
  }
  check_device(values, keys, "values");
}

// Checks that a tensor holds `count` contiguous int64 elements on the device of the cache; returns their address.
inline const int64_t* int64_data(const Tensor& tensor, int64_t count, const Tensor& cache, const char* name) {
  require(
      tensor.dim() == 1 && tensor.size(0) == count && tensor.scalar_type() == ScalarType::Long &&
          tensor.is_contiguous(),
      name, ": expected a contiguous int64 tensor of ", count, " elements");
  check_device(tensor, cache, name);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// Checks the contents of `seen` and `lengths` on the CPU. Call it before parallel_for, which loses exception messages.
inline void check_seen_and_lengths(const int64_t* seen, const int64_t* lengths, int64_t batch, int64_t tokens) {
  for (int64_t row = 0; row < batch; ++row) {
    require(seen[row] >= 0 && seen[row] <= kMaxTokens, "seen: expected 0 to 2^61, got ", seen[row], " in row ", row);
    require(
        !lengths || (lengths[row] >= 0 && lengths[row] <= tokens), "lengths: expected 0 to ", tokens, ", got ",
        lengths ? lengths[row] : 0, " in row ", row);
  }
}

// Which row of the cache, and how many sinks, each row of a call has: addresses of optional int64 tensors.
struct RowOptions {
  const int64_t* rows;
  const int64_t* row_sinks;
};

inline RowOptions row_options(
    const std::optional<Tensor>& rows, const std::optional<Tensor>& row_sinks, int64_t batch, const Tensor& keys) {
  require(
      rows || batch == keys.size(0), "key: expected the batch of the cache (", keys.size(0), ") without rows, got ",
      batch);
  return {
      rows ? int64_data(*rows, batch, keys, "rows") : nullptr,
      row_sinks ? int64_data(*row_sinks, batch, keys, "row_sinks") : nullptr};
}

// Checks the contents of both on the CPU.
inline void check_row_options(const RowOptions& options, int64_t batch, int64_t cache_rows, int64_t num_sinks) {
  std::vector<bool> taken(options.rows ? cache_rows : 0);
  for (int64_t i = 0; options.rows && i < batch; ++i) {
    const int64_t row = options.rows[i];
    require(row >= 0 && row < cache_rows, "rows: expected 0 to ", cache_rows - 1, ", got ", row, " in row ", i);
    require(!taken[row], "rows: expected different rows, got ", row, " twice");
    taken[row] = true;
  }
  for (int64_t i = 0; options.row_sinks && i < batch; ++i) {
    const int64_t sinks = options.row_sinks[i];
    require(
        sinks >= 0 && sinks <= num_sinks, "row_sinks: expected 0 to ", num_sinks, ", got ", sinks, " in row ", i);
  }
}

// What a ring of 8 bits has beside keys and values, which are then the ring alone; any other ring has none of it.
struct __attribute__((visibility("hidden"))) EightBit {  // as Tensor is
  const std::optional<Tensor>&sink_keys, &sink_values, &key_scales, &value_scales;
};

// Checks a contiguous part of a cache of the shape [rows and kv_heads of keys, slots, dim].
inline void check_part(
    const Tensor& part, const Tensor& keys, int64_t slots, int64_t dim, ScalarType dtype, const char* name) {
  check_device(part, keys, name);
  require(
      part.dim() == 4 && part.size(0) == keys.size(0) && part.size(1) == keys.size(1) && part.size(2) == slots &&
          part.size(3) == dim && part.scalar_type() == dtype && part.is_contiguous(),
      name, ": expected a contiguous tensor of the rows and kv_heads of keys, ", slots, " slots and ", dim,
      " elements, of the dtype of key, or float32 scales");
}

// Checks all parts of a cache and returns whether its ring is of 8 bits. `dtype` is that of new tokens.
inline bool check_parts(
    const Tensor& keys, const Tensor& values, int64_t num_sinks, const EightBit& more, ScalarType dtype) {
  check_cache(keys, values);
  const ScalarType stored = keys.scalar_type();
  const bool is_eight_bit = stored == ScalarType::Char || stored == ScalarType::Float8_e4m3fn;
  for (const std::optional<Tensor>* part : {&more.sink_keys, &more.sink_values, &more.key_scales, &more.value_scales}) {
    require(
        part->has_value() == is_eight_bit, "sink_keys, sink_values, key_scales, value_scales: expected all of them "
        "beside keys of int8 or float8_e4m3fn, none beside others");
  }
  const int64_t slots = keys.size(2);
  if (!is_eight_bit) {
    require(num_sinks >= 0 && num_sinks < slots, "num_sinks: expected 0 to ", slots - 1, ", got ", num_sinks);
    return false;
  }
  require(slots > 0 && num_sinks >= 0, "num_sinks: expected 0 or more, and a slot in keys, got ", num_sinks);
  require(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "key, value: expected dtype float32, float16 or bfloat16 with a ring of 8 bits");
  check_part(*more.sink_keys, keys, num_sinks, keys.size(3), dtype, "sink_keys");
  check_part(*more.sink_values, keys, num_sinks, values.size(3), dtype, "sink_values");
  check_part(*more.key_scales, keys, slots, 1, ScalarType::Float, "key_scales");
  check_part(*more.value_scales, keys, slots, 1, ScalarType::Float, "value_scales");
  return true;
}

// `dtype`: of new tokens.
inline void check_new_tokens(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, ScalarType dtype) {
  check_cache(keys, values);
  check_device(key, keys, "key");
  check_device(value, keys, "value");
  require(
      key.dim() == 4 && value.dim() == 4, "key, value: expected 4 dimensions, got ", key.dim(), " and ", value.dim());
  const int64_t batch = key.size(0), tokens = key.size(2);
  require(
      key.size(1) == keys.size(1) && key.size(3) == keys.size(3) && value.size(0) == batch &&
          value.size(1) == keys.size(1) && value.size(2) == tokens && value.size(3) == values.size(3),
      "key, value: expected the kv_heads and head_dim of the cache, and the same batch and number of tokens");
  require(
      key.scalar_type() == dtype && value.scalar_type() == dtype, "key, value: expected the dtype of the cache");
}

// Returns whether the ring is of 8 bits.
inline bool check_new_tokens(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, int64_t num_sinks,
    const EightBit& more) {
  const bool is_eight_bit = check_parts(keys, values, num_sinks, more, key.scalar_type());
  check_new_tokens(keys, values, key, value, is_eight_bit ? key.scalar_type() : keys.scalar_type());
  return is_eight_bit;
}

// Dtype of accumulation, rotary tables, sink logits and ALiBi slopes.
inline ScalarType acc_dtype(const Tensor& keys) {
  return keys.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rotary tables: [batch, tokens, pairs], or [2, batch, tokens, pairs] if `leading` is 1.
inline void check_tables(
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const Tensor& key, const Tensor& keys,
    int64_t leading) {
  require(cos.has_value() == sin.has_value(), "cos, sin: expected both or none");
  if (!cos) return;
  check_device(*cos, keys, "cos");
  check_device(*sin, keys, "sin");
  const int64_t dims = leading + 3;
  require(
      cos->dim() == dims && sin->dim() == dims && (leading == 0 || cos->size(0) == 2) &&
          cos->size(leading) == key.size(0) && cos->size(leading + 1) == key.size(2) &&
          2 * cos->size(leading + 2) <= keys.size(3) && cos->scalar_type() == acc_dtype(keys) &&
          sin->scalar_type() == acc_dtype(keys),
      "cos, sin: expected ", leading ? "[2, batch, tokens, pairs]" : "[batch, tokens, pairs]",
      " in fp32 (fp64 for an fp64 cache)");
  for (int64_t dim = 0; dim < dims; ++dim) {
    require(
        cos->size(dim) == sin->size(dim) && cos->stride(dim) == sin->stride(dim),
        "cos, sin: expected the same sizes and strides");
  }
}

// Returns whether the ring is of 8 bits.
inline bool check_append(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, int64_t num_sinks, const EightBit& more) {
  const bool is_eight_bit = check_new_tokens(keys, values, key, value, num_sinks, more);
  check_tables(cos, sin, key, keys, 0);
  return is_eight_bit;
}

inline void check_query(const Tensor& query, const Tensor& key, const Tensor& keys) {
  check_device(query, keys, "query");
  require(
      query.dim() == 4 && query.size(0) == key.size(0) && query.size(2) == key.size(2) &&
          query.size(3) == keys.size(3) && keys.size(1) > 0 && query.size(1) > 0 && query.size(1) % keys.size(1) == 0,
      "query: expected the batch, tokens and head_dim of key, and heads a multiple of kv_heads");
  require(query.scalar_type() == key.scalar_type(), "query: expected the dtype of key");
}

// Address of an optional tensor with one element per query head, or null.
inline const void* per_head_data(
    const std::optional<Tensor>& option, const Tensor& query, const Tensor& keys, const char* name) {
  if (!option) return nullptr;
  check_device(*option, keys, name);
  require(
      option->dim() == 1 && option->size(0) == query.size(1) && option->scalar_type() == acc_dtype(keys) &&
          option->is_contiguous(),
      name, ": expected a contiguous tensor of ", query.size(1), " elements in fp32 (fp64 for an fp64 cache)");
  return option->const_data_ptr();
}

// `slots`: of sinks and ring.
inline void check_layout(int64_t slots, int64_t num_sinks, int64_t window) {
  require(
      num_sinks >= 0 && window >= 1 && window <= slots && num_sinks <= slots - window,
      "num_sinks, window: expected num_sinks >= 0, window >= 1 and num_sinks + window <= ", slots, " slots, got ",
      num_sinks, " and ", window);
}

}  // namespace sinkattn
