// Ring ops on CUDA: the twin of ring_cache.cpp, bit for bit (compiled without fused multiply-add, NaN payloads aside).
//
// Everything is queued on the current stream and the host waits for nothing, rollback_ excepted. So what the CPU
// refuses for the content of a device tensor is here made harmless on the device: `lengths` are clamped to
// 0..tokens, `seen` to 0..2^61, a row number out of range in `source` or `rows` is left out.
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

#include "arguments.h"
#include "check.h"
#include "ring.h"
#include "rotary.h"

// torch's own macro needs a symbol that only CUDA builds of torch have; with this one the library loads in any torch.
#define SINKATTN_CUDA_CHECK(expression)                                              \
  do {                                                                               \
    const cudaError_t error = (expression);                                          \
    require(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));              \
  } while (0)

namespace sinkattn {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block; each moves one vector at a time
constexpr int kThreads = kWarp * kWarps;
constexpr int64_t kMaxBlocks = int64_t{1} << 16;  // loops stride over the grid, so any limit is right

// Blocks for `items` of which one block does `per_block` at a time.
unsigned int blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned int>(std::min((items + per_block - 1) / per_block, kMaxBlocks));
}

// torch's current stream. The getter is looked up in the library that torch has loaded, because linking against it
// would keep this one from loading where torch has no CUDA.
cudaStream_t current_stream(const Tensor& tensor) {
  using Getter = int32_t (*)(int32_t device, void** stream);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  require(getter, "CUDA: this torch has no CUDA");
  void* stream = nullptr;
  require(getter(tensor.get_device_index(), &stream) == 0, "CUDA: torch names no current stream");
  return static_cast<cudaStream_t>(stream);
}

__device__ int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// A [batch, heads, tokens, dim] tensor of any strides; all strides are in elements.
template <typename scalar_t>
struct NewTokens {
  const scalar_t* data;
  int64_t row, head, token, element;

  explicit NewTokens(const Tensor& x)
      : data(static_cast<const scalar_t*>(x.const_data_ptr())),
        row(x.stride(0)),
        head(x.stride(1)),
        token(x.stride(2)),
        element(x.stride(3)) {}
};

// Rotary tables [batch, tokens, pairs]; no pairs when keys are written as they are.
template <typename acc_t>
struct Tables {
  const acc_t* cos = nullptr;
  const acc_t* sin = nullptr;
  int64_t row = 0, token = 0, pair = 0, pairs = 0;

  Tables(const std::optional<Tensor>& cos_table, const std::optional<Tensor>& sin_table) {
    if (!cos_table) return;
    cos = static_cast<const acc_t*>(cos_table->const_data_ptr());
    sin = static_cast<const acc_t*>(sin_table->const_data_ptr());
    row = cos_table->stride(0);
    token = cos_table->stride(1);
    pair = cos_table->stride(2);
    pairs = cos_table->size(2);
  }
};

struct Sizes {
  int64_t batch, heads, tokens, key_dim, value_dim;
};

// One warp writes one token of one head: item = (row * heads + head) * written + i, token i of those that stay.
template <typename scalar_t, typename acc_t>
__global__ void append_kernel(
    scalar_t* keys, scalar_t* values, NewTokens<scalar_t> key, NewTokens<scalar_t> value, const int64_t* seen,
    const int64_t* lengths, Tables<acc_t> tables, Sizes sizes, RingLayout layout, int64_t written, bool interleaved) {
  const int64_t items = sizes.batch * sizes.heads * written;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.y; item < items; item += step) {
    int64_t i = item % written;
    const int64_t vector = item / written;
    const int64_t row = vector / sizes.heads, head = vector % sizes.heads;
    const int64_t before = clamp(seen[row], 0, kMaxTokens);
    const int64_t count = lengths ? clamp(lengths[row], 0, sizes.tokens) : sizes.tokens;
    Run runs[RingLayout::kMaxRuns];
    const int n = layout.write_runs(before, count, runs);
    int r = 0;
    for (; r < n && i >= runs[r].count; ++r) i -= runs[r].count;
    if (r == n) continue;  // a row that brings fewer tokens than another
    const int64_t token = runs[r].token + i;
    const int64_t target = vector * layout.slots() + runs[r].slot + i;
    const int64_t table = row * tables.row + token * tables.token;
    rotate_vector<scalar_t>(
        keys + target * sizes.key_dim, key.data + row * key.row + head * key.head + token * key.token, key.element,
        sizes.key_dim, tables.pairs, tables.cos + table, tables.sin + table, tables.pair, interleaved, threadIdx.x,
        kWarp);
    const scalar_t* from = value.data + row * value.row + head * value.head + token * value.token;
    scalar_t* to = values + target * sizes.value_dim;
    for (int64_t d = threadIdx.x; d < sizes.value_dim; d += kWarp) to[d] = from[d * value.element];
  }
}

template <typename scalar_t>
void append_rows(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const int64_t* seen,
    const int64_t* lengths, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    const RingLayout& layout, bool interleaved) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const Sizes sizes{keys.size(0), keys.size(1), key.size(2), keys.size(3), values.size(3)};
  const int64_t written = std::min(sizes.tokens, layout.slots());
  const int64_t items = sizes.batch * sizes.heads * written;
  if (items == 0) return;
  append_kernel<scalar_t, acc_t><<<blocks(items, kWarps), dim3(kWarp, kWarps), 0, current_stream(keys)>>>(
      static_cast<scalar_t*>(keys.mutable_data_ptr()), static_cast<scalar_t*>(values.mutable_data_ptr()),
      NewTokens<scalar_t>(key), NewTokens<scalar_t>(value), seen, lengths, Tables<acc_t>(cos, sin), sizes, layout,
      written, interleaved);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
}

void append_(
    const Tensor& keys, const Tensor& values, const Tensor& key, const Tensor& value, const Tensor& seen,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    int64_t num_sinks, bool interleaved) {
  check_append(keys, values, key, value, cos, sin, num_sinks);
  const int64_t batch = keys.size(0);
  const int64_t* seen_data = counters(seen, batch, keys, "seen");
  const int64_t* length_data = lengths ? counters(*lengths, batch, keys, "lengths") : nullptr;
  const DeviceGuard guard(keys.get_device_index());
  const RingLayout layout{num_sinks, keys.size(2) - num_sinks, 0};
  THO_DISPATCH_V2(
      keys.scalar_type(), "append_", AT_WRAP([&] {
        append_rows<scalar_t>(keys, values, key, value, seen_data, length_data, cos, sin, layout, interleaved);
      }),
      AT_FLOATING_TYPES, ScalarType::Half, ScalarType::BFloat16);
}

// The first row that cannot go back as far as it is asked to, and why; row is -1 when every row can.
struct Refusal {
  int64_t row, count, seen, peak;
};

// One block, so that no row changes before every row is known to be able to. The arithmetic is that of ring_cache.cpp.
__global__ void rollback_kernel(
    int64_t* seen, int64_t* peak, const int64_t* counts, int64_t batch, int64_t headroom, Refusal* refusal) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = batch;
  __syncthreads();
  for (int64_t row = threadIdx.x; row < batch; row += kThreads) {
    const int64_t count = counts[row];
    const int64_t peak_now = peak[row] > seen[row] ? peak[row] : seen[row];
    const bool possible = count >= 0 && count <= seen[row];
    // What was rolled back before still has its slots, so it counts until as much is appended again.
    const bool kept = count == 0 || peak_now - (seen[row] - count) <= headroom;
    if (!(possible && kept)) atomicMin(&first, static_cast<unsigned long long>(row));
  }
  __syncthreads();
  const int64_t refused = first;
  if (refused < batch) {
    if (threadIdx.x == 0) *refusal = Refusal{refused, counts[refused], seen[refused], peak[refused]};
    return;
  }
  if (threadIdx.x == 0) *refusal = Refusal{-1, 0, 0, 0};
  for (int64_t row = threadIdx.x; row < batch; row += kThreads) {
    if (seen[row] > peak[row]) peak[row] = seen[row];
    seen[row] -= counts[row];
  }
}

void rollback_(const Tensor& seen, const Tensor& peak, const Tensor& counts, int64_t headroom) {
  const int64_t batch = seen.numel();
  counters(seen, batch, seen, "seen");
  counters(peak, batch, seen, "peak");
  const int64_t* count_data = counters(counts, batch, seen, "counts");
  const DeviceGuard guard(seen.get_device_index());
  const cudaStream_t stream = current_stream(seen);
  const Tensor report = torch::stable::new_empty(seen, {sizeof(Refusal) / sizeof(int64_t)});
  auto* report_data = static_cast<Refusal*>(report.mutable_data_ptr());
  rollback_kernel<<<1, kThreads, 0, stream>>>(
      static_cast<int64_t*>(seen.mutable_data_ptr()), static_cast<int64_t*>(peak.mutable_data_ptr()), count_data,
      batch, headroom, report_data);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
  // The one wait for the device: a rollback that goes too far has to be refused here and now, not later or never.
  Refusal refusal;
  SINKATTN_CUDA_CHECK(cudaMemcpyAsync(&refusal, report_data, sizeof(refusal), cudaMemcpyDeviceToHost, stream));
  SINKATTN_CUDA_CHECK(cudaStreamSynchronize(stream));
  if (refusal.row < 0) return;
  require(
      refusal.count >= 0 && refusal.count <= refusal.seen, "rollback: expected 0 to ", refusal.seen,
      " tokens in row ", refusal.row, ", got ", refusal.count);
  const int64_t gone_back = std::max<int64_t>(0, refusal.peak - refusal.seen);
  require(
      false, "rollback: row ", refusal.row, " can go back ", std::max<int64_t>(0, headroom - gone_back),
      " tokens more (headroom ", headroom, "), got ", refusal.count);
}

// Copies rows that change place: row source[row] of `from` (gather) or the row itself. A row out of range stays.
template <typename scalar_t>
__global__ void move_rows_kernel(
    scalar_t* to, const scalar_t* from, const int64_t* source, int64_t batch, int64_t row_elements, bool gather) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < batch * row_elements; i += step) {
    const int64_t row = i / row_elements, wanted = source[row];
    if (wanted == row || wanted < 0 || wanted >= batch) continue;
    to[i] = from[gather ? wanted * row_elements + i % row_elements : i];
  }
}

// The CPU orders the moves so that one spare row is enough. Here `source` is on the device and its cycles are not
// known without waiting for it, so the rows that move are gathered into a second cache and copied back.
template <typename scalar_t>
void move_rows(const Tensor& cache, const int64_t* source) {
  const int64_t batch = cache.size(0), elements = cache.numel();
  if (elements == 0) return;
  const Tensor moved = torch::stable::new_empty(cache, cache.sizes());
  auto* cache_data = static_cast<scalar_t*>(cache.mutable_data_ptr());
  auto* moved_data = static_cast<scalar_t*>(moved.mutable_data_ptr());
  const auto move = [&](scalar_t* to, const scalar_t* from, bool gather) {
    move_rows_kernel<scalar_t><<<blocks(elements, kThreads), kThreads, 0, current_stream(cache)>>>(
        to, from, source, batch, elements / batch, gather);
    SINKATTN_CUDA_CHECK(cudaGetLastError());
  };
  move(moved_data, cache_data, true);
  move(cache_data, moved_data, false);
}

void reorder_(const Tensor& keys, const Tensor& values, const Tensor& source) {
  check_cache(keys, values);
  const int64_t* source_data = counters(source, keys.size(0), keys, "source");
  const DeviceGuard guard(keys.get_device_index());
  for (const Tensor* cache : {&keys, &values}) {
    THO_DISPATCH_V2(
        cache->scalar_type(), "reorder_", AT_WRAP([&] { move_rows<scalar_t>(*cache, source_data); }),
        AT_FLOATING_TYPES, ScalarType::Half, ScalarType::BFloat16);
  }
}

// Rows out of range are left out.
template <typename scalar_t>
__global__ void zero_rows_kernel(
    scalar_t* cache, const int64_t* rows, int64_t count, int64_t batch, int64_t row_elements) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count * row_elements; i += step) {
    const int64_t row = rows[i / row_elements];
    if (row >= 0 && row < batch) cache[row * row_elements + i % row_elements] = scalar_t(0.0f);
  }
}

template <typename scalar_t>
void zero_rows(const Tensor& cache, const int64_t* rows, int64_t count) {
  if (count == 0 || cache.numel() == 0) return;
  const int64_t batch = cache.size(0), row_elements = cache.numel() / batch;
  zero_rows_kernel<scalar_t><<<blocks(count * row_elements, kThreads), kThreads, 0, current_stream(cache)>>>(
      static_cast<scalar_t*>(cache.mutable_data_ptr()), rows, count, batch, row_elements);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
}

void reset_(const Tensor& keys, const Tensor& values, const Tensor& rows) {
  check_cache(keys, values);
  const int64_t count = rows.numel();
  const int64_t* row_data = counters(rows, count, keys, "rows");
  const DeviceGuard guard(keys.get_device_index());
  for (const Tensor* cache : {&keys, &values}) {
    THO_DISPATCH_V2(
        cache->scalar_type(), "reset_", AT_WRAP([&] { zero_rows<scalar_t>(*cache, row_data, count); }),
        AT_FLOATING_TYPES, ScalarType::Half, ScalarType::BFloat16);
  }
}

// One warp writes one vector of the copy: item = (row * heads + head) * length + i.
template <typename scalar_t>
__global__ void linearise_kernel(
    scalar_t* to, const scalar_t* from, const int64_t* seen, int64_t batch, int64_t heads, int64_t dim,
    RingLayout layout) {
  const int64_t length = layout.num_sinks + layout.window;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.y; item < batch * heads * length; item += step) {
    const int64_t vector = item / length, i = item % length;
    const int64_t count = seen[vector / heads] < 0 ? 0 : seen[vector / heads];
    const int64_t sinks = count < layout.num_sinks ? count : layout.num_sinks;
    const int64_t recent = count - sinks < layout.window ? count - sinks : layout.window;
    const int64_t token = i < sinks ? i : count - recent + (i - sinks);
    const bool held = i < sinks + recent;
    const scalar_t* source = from + (vector * layout.slots() + (held ? layout.slot(token) : 0)) * dim;
    for (int64_t d = threadIdx.x; d < dim; d += kWarp) to[item * dim + d] = held ? source[d] : scalar_t(0.0f);
  }
}

template <typename scalar_t>
void linearise_rows(const Tensor& out, const Tensor& cache, const int64_t* seen, const RingLayout& layout) {
  if (out.numel() == 0) return;
  const int64_t items = out.size(0) * out.size(1) * out.size(2);
  linearise_kernel<scalar_t><<<blocks(items, kWarps), dim3(kWarp, kWarps), 0, current_stream(cache)>>>(
      static_cast<scalar_t*>(out.mutable_data_ptr()), static_cast<const scalar_t*>(cache.const_data_ptr()), seen,
      out.size(0), out.size(1), out.size(3), layout);
  SINKATTN_CUDA_CHECK(cudaGetLastError());
}

std::tuple<Tensor, Tensor> linearise(
    const Tensor& keys, const Tensor& values, const Tensor& seen, int64_t num_sinks, int64_t window) {
  check_layout(keys, values, num_sinks, window);
  const int64_t batch = keys.size(0), heads = keys.size(1), slots = keys.size(2);
  const int64_t* seen_data = counters(seen, batch, keys, "seen");
  const DeviceGuard guard(keys.get_device_index());
  const RingLayout layout{num_sinks, window, slots - num_sinks - window};
  const auto ordered = [&](const Tensor& cache) {
    Tensor out = torch::stable::new_empty(cache, {batch, heads, num_sinks + window, cache.size(3)});
    THO_DISPATCH_V2(
        cache.scalar_type(), "linearise", AT_WRAP([&] { linearise_rows<scalar_t>(out, cache, seen_data, layout); }),
        AT_FLOATING_TYPES, ScalarType::Half, ScalarType::BFloat16);
    return out;
  };
  return {ordered(keys), ordered(values)};
}

}  // namespace
}  // namespace sinkattn

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CUDA, m) {
  m.impl("append_", TORCH_BOX(&sinkattn::append_));
  m.impl("rollback_", TORCH_BOX(&sinkattn::rollback_));
  m.impl("reorder_", TORCH_BOX(&sinkattn::reorder_));
  m.impl("reset_", TORCH_BOX(&sinkattn::reset_));
  m.impl("linearise", TORCH_BOX(&sinkattn::linearise));
}
