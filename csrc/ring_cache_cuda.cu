// The ring operators on CUDA: same results, bit for bit, as ring_cache.cpp except for NaN payloads (compiled without
// fused multiply-add). Checks and launches; the kernels are in ring_cache_kernels.cuh. All work is queued on torch's
// current stream; only rollback_ synchronises.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "argument_checks.h"
#include "operators.h"
#include "require.h"
#include "ring.h"
#include "ring_cache_kernels.cuh"

// Unlike torch's macro, this needs no symbol that only CUDA builds of torch have: the library loads with any torch.
#define SINKATTN_CUDA_CHECK(expression)                                              \
  do {                                                                               \
    const cudaError_t error = (expression);                                          \
    require(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));              \
  } while (0)

namespace sinkattn {

// nvcc names the internal symbols of a file after its first external definition, and in a file that has none after the
// id of its process: no two builds would have the same bytes.
extern const int kNamesInternalSymbols = 1;

namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxBlocks = 65535;  // per grid dimension; kernels loop over the rest

// Blocks for `num_items` items if a block handles `per_block` at a time.
unsigned int num_blocks(int64_t num_items, int64_t per_block) {
  return static_cast<unsigned int>(std::min((num_items + per_block - 1) / per_block, kMaxBlocks));
}

// torch's current stream. The function is looked up at run time: linking libtorch_cuda would keep this library from
// loading with CPU builds of torch.
cudaStream_t current_stream(const Tensor& tensor) {
  using Getter = int32_t (*)(int32_t device, void** stream);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  require(getter, "CUDA: expected a loaded libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  require(getter(tensor.get_device_index(), &stream) == 0, "CUDA: torch returned no current stream");
  return static_cast<cudaStream_t>(stream);
}

// Stride of a dimension; 0 if it has one element, where torch allows any stride.
int64_t stride_or_zero(const Tensor& x, int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; }

template <typename scalar_t>
TokenView<scalar_t> token_view(const Tensor& x) {
  return {
      static_cast<const scalar_t*>(x.const_data_ptr()), stride_or_zero(x, 0), stride_or_zero(x, 1),
      stride_or_zero(x, 2), x.stride(3)};
}

template <typename acc_t>
RotaryTables<acc_t> rotary_tables(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  if (!cos) return {};
  return {
      static_cast<const acc_t*>(cos->const_data_ptr()), static_cast<const acc_t*>(sin->const_data_ptr()),
      stride_or_zero(*cos, 0), stride_or_zero(*cos, 1), cos->stride(2), cos->size(2)};
}

template <typename scalar_t>
dim3 append_grid(const AppendCall<scalar_t>& call, int key_lanes, int value_lanes) {
  return {num_blocks(call.num_items(), kThreads / std::max(key_lanes, value_lanes)), 2};
}

template <typename scalar_t>
void launch_append(const AppendCall<scalar_t>& call, cudaStream_t stream) {
  if (call.num_items() == 0) return;
  const bool vectorized = call.can_vectorize();
  const int key_lanes = call.key_lanes(vectorized), value_lanes = call.value_lanes(vectorized);
  const auto kernel = vectorized ? append_kernel<scalar_t, true> : append_kernel<scalar_t, false>;
  kernel<<<append_grid(call, key_lanes, value_lanes), kThreads, 0, stream>>>(call, key_lanes, value_lanes);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
}

template <typename scalar_t, typename stored_t>
void launch_append(const AppendCall<scalar_t>& call, const EightBitRing<stored_t>& ring, cudaStream_t stream) {
  if (call.num_items() == 0) return;
  const int key_lanes = call.key_lanes(false), value_lanes = call.value_lanes(false);
  append_eight_bit_kernel<<<append_grid(call, key_lanes, value_lanes), kThreads, 0, stream>>>(
      call, ring, key_lanes, value_lanes);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
}

template <typename stored_t>
EightBitRing<stored_t> eight_bit_ring(const Tensor& keys, const Tensor& values, const EightBit& more) {
  return {
      static_cast<stored_t*>(keys.mutable_data_ptr()), static_cast<stored_t*>(values.mutable_data_ptr()),
      static_cast<float*>(more.key_scales->mutable_data_ptr()),
      static_cast<float*>(more.value_scales->mutable_data_ptr())};
}

void append_(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const Tensor& seen,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    int64_t num_sinks, bool interleaved, const std::optional<Tensor>& rows, const std::optional<Tensor>& row_sinks,
    const std::optional<Tensor>& sink_keys, const std::optional<Tensor>& sink_values,
    const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
  const EightBit more{sink_keys, sink_values, key_scales, value_scales};
  const bool is_eight_bit = check_append(keys, values, key, value, cos, sin, num_sinks, more);
  const int64_t batch = key.size(0);
  const RowOptions options = row_options(rows, row_sinks, batch, keys);
  const int64_t* seen_data = int64_data(seen, batch, keys, "seen");
  const int64_t* length_data = lengths ? int64_data(*lengths, batch, keys, "lengths") : nullptr;
  const DeviceGuard guard(keys.get_device_index());
  const cudaStream_t stream = current_stream(keys);
  const RingLayout layout{num_sinks, keys.size(2) - (is_eight_bit ? 0 : num_sinks), 0};
  // With the keys and values that are of the dtype of new tokens.
  const auto call = [&](auto scalar, const Tensor& whole_keys, const Tensor& whole_values) {
    using scalar_t = decltype(scalar);
    return AppendCall<scalar_t>{
        static_cast<scalar_t*>(whole_keys.mutable_data_ptr()), static_cast<scalar_t*>(whole_values.mutable_data_ptr()),
        token_view<scalar_t>(key), token_view<scalar_t>(value), seen_data, length_data,
        rotary_tables<typename Accumulate<scalar_t>::type>(cos, sin), batch, keys.size(1), key.size(2),
        keys.size(3), values.size(3), layout, interleaved, keys.size(0), options.rows, options.row_sinks};
  };
  if (is_eight_bit) {
    require(
        keys.size(3) <= kMaxEightBitDim && values.size(3) <= kMaxEightBitDim,
        "keys, values: expected a head_dim of at most ", kMaxEightBitDim, " with a ring of 8 bits on a GPU");
    THO_DISPATCH_V2(
        key.scalar_type(), "append_", AT_WRAP([&] {
          const auto sinks = call(scalar_t{}, *sink_keys, *sink_values);
          if (keys.scalar_type() == ScalarType::Char) {
            launch_append(sinks, eight_bit_ring<int8_t>(keys, values, more), stream);
          } else {
            launch_append(sinks, eight_bit_ring<Float8>(keys, values, more), stream);
          }
        }),
        ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  } else {
    THO_DISPATCH_V2(
        key.scalar_type(), "append_", AT_WRAP([&] { launch_append(call(scalar_t{}, keys, values), stream); }),
        AT_FLOATING_TYPES, ScalarType::Half, ScalarType::BFloat16);
  }
}

void rollback_(const Tensor& seen, const Tensor& peak, const Tensor& counts, int64_t headroom) {
  const int64_t batch = seen.numel();
  int64_data(seen, batch, seen, "seen");
  int64_data(peak, batch, seen, "peak");
  const int64_t* count_data = int64_data(counts, batch, seen, "counts");
  const DeviceGuard guard(seen.get_device_index());
  const cudaStream_t stream = current_stream(seen);
  const Tensor report = torch::stable::new_empty(seen, {sizeof(RollbackFailure) / sizeof(int64_t)});
  auto* report_data = static_cast<RollbackFailure*>(report.mutable_data_ptr());
  rollback_kernel<<<1, kThreads, 0, stream>>>(
      static_cast<int64_t*>(seen.mutable_data_ptr()), static_cast<int64_t*>(peak.mutable_data_ptr()), count_data,
      batch, headroom, report_data);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
  // Synchronises, so that this call can raise if the rollback is refused.
  RollbackFailure failure;
  SINKATTN_CUDA_CHECK(cudaMemcpyAsync(&failure, report_data, sizeof(failure), cudaMemcpyDeviceToHost, stream));
  SINKATTN_CUDA_CHECK(cudaStreamSynchronize(stream));
  if (failure.row < 0) return;
  require(
      failure.count >= 0 && failure.count <= failure.seen, "rollback: expected 0 to ", failure.seen,
      " tokens in row ", failure.row, ", got ", failure.count);
  const int64_t gone_back = std::max<int64_t>(0, failure.peak - failure.seen);
  require(
      false, "rollback: row ", failure.row, " can roll back ", std::max<int64_t>(0, headroom - gone_back),
      " tokens more (headroom ", headroom, "), got ", failure.count);
}

int64_t row_bytes(const Tensor& cache) { return cache.size(1) * cache.size(2) * cache.size(3) * cache.element_size(); }

void reorder_(const Tensor& keys, const Tensor& values, const Tensor& source) {
  check_cache(keys, values);
  const int64_t batch = keys.size(0);
  const int64_t* source_data = int64_data(source, batch, keys, "source");
  if (keys.numel() == 0 && values.numel() == 0) return;
  const DeviceGuard guard(keys.get_device_index());
  const cudaStream_t stream = current_stream(keys);
  constexpr int64_t kNumbers = sizeof(RowMove) / sizeof(int64_t);
  const int64_t room = max_row_moves(batch);
  const Tensor plan = torch::stable::new_empty(source, {kNumbers * room + 1 + batch});
  auto* plan_data = static_cast<int64_t*>(plan.mutable_data_ptr());
  auto* moves = reinterpret_cast<RowMove*>(plan_data);
  int64_t *num_moves = plan_data + kNumbers * room, *num_readers = num_moves + 1;
  plan_kernel<<<1, kThreads, 0, stream>>>(source_data, batch, num_readers, moves, num_moves);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
  for (const Tensor* cache : {&keys, &values}) {
    void* data = cache->mutable_data_ptr();
    const int64_t bytes = row_bytes(*cache);
    if (bytes == 0) continue;
    with_widest_unit(address(data) | bytes, [&](auto unit) {
      using Unit = decltype(unit);
      const int64_t row_units = bytes / sizeof(Unit);
      move_rows_kernel<<<num_blocks(row_units, kThreads), kThreads, 0, stream>>>(
          static_cast<Unit*>(data), moves, num_moves, row_units);
    });
    SINKATTN_CUDA_CHECK(cudaGetLastError());
  }
}

void reset_(const Tensor& keys, const Tensor& values, const Tensor& rows) {
  check_cache(keys, values);
  const int64_t batch = keys.size(0), count = rows.numel();
  const int64_t* row_data = int64_data(rows, count, keys, "rows");
  const DeviceGuard guard(keys.get_device_index());
  for (const Tensor* cache : {&keys, &values}) {
    void* data = cache->mutable_data_ptr();
    const int64_t bytes = row_bytes(*cache);
    if (count == 0 || bytes == 0) continue;
    with_widest_unit(address(data) | bytes, [&](auto unit) {
      using Unit = decltype(unit);
      const int64_t row_units = bytes / sizeof(Unit);
      const unsigned int across = num_blocks(row_units, kThreads);
      const dim3 grid(across, num_blocks(count, (across * count + kMaxBlocks - 1) / kMaxBlocks));
      zero_rows_kernel<<<grid, kThreads, 0, current_stream(keys)>>>(
          static_cast<Unit*>(data), row_data, count, batch, row_units);
    });
    SINKATTN_CUDA_CHECK(cudaGetLastError());
  }
}

std::tuple<Tensor, Tensor> linearise(
    const Tensor& keys, const Tensor& values, const Tensor& seen, int64_t num_sinks, int64_t window) {
  check_cache(keys, values);
  const int64_t batch = keys.size(0), kv_heads = keys.size(1), slots = keys.size(2), length = num_sinks + window;
  check_layout(slots, num_sinks, window);
  const int64_t* seen_data = int64_data(seen, batch, keys, "seen");
  const DeviceGuard guard(keys.get_device_index());
  const RingLayout layout{num_sinks, window, slots - length};
  const auto linearised = [&](const Tensor& cache) {
    Tensor out = torch::stable::new_empty(cache, {batch, kv_heads, length, cache.size(3)});
    if (out.numel() == 0) return out;
    void* to = out.mutable_data_ptr();
    const void* from = cache.const_data_ptr();
    const int64_t bytes = cache.size(3) * cache.element_size();
    with_widest_unit(address(to) | address(from) | bytes, [&](auto unit) {
      using Unit = decltype(unit);
      const int64_t units = bytes / sizeof(Unit);
      const int lanes = lanes_for(units);
      linearise_kernel<<<num_blocks(batch * kv_heads * length, kThreads / lanes), kThreads, 0, current_stream(keys)>>>(
          static_cast<Unit*>(to), static_cast<const Unit*>(from), seen_data, batch, kv_heads, units, layout, lanes);
    });
    SINKATTN_CUDA_CHECK(cudaGetLastError());
    return out;
  };
  return {linearised(keys), linearised(values)};
}

}  // namespace
}  // namespace sinkattn

STABLE_TORCH_LIBRARY_IMPL(SINKATTN_OPERATORS, CUDA, m) {
  m.impl("append_", TORCH_BOX(&sinkattn::append_));
  m.impl("rollback_", TORCH_BOX(&sinkattn::rollback_));
  m.impl("reorder_", TORCH_BOX(&sinkattn::reorder_));
  m.impl("reset_", TORCH_BOX(&sinkattn::reset_));
  m.impl("linearise", TORCH_BOX(&sinkattn::linearise));
}
