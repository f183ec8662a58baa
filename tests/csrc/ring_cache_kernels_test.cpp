// Tests the CUDA kernels of the ring operators on the host, bit for bit, against plain loops over tokens, rows and
// elements. Every buffer ends with its last element, and memory that must not be written is compared, too. These tests
// do not cover a GPU's rounding, memory model or speed.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <new>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_emulation.h"
#include "dtypes.h"
#include "ring_cache_kernels.cuh"
#include "testing.h"

using sinkattn::BFloat16;
using sinkattn::Half;
using sinkattn::kThreads;
using sinkattn::RingLayout;

namespace {

constexpr int64_t kSmallest = std::numeric_limits<int64_t>::min(), kLargest = std::numeric_limits<int64_t>::max();

// Number of the kernel run, which selects the grid and the order of its threads.
unsigned int run_number = 0;

uint32_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

int64_t random_below(int64_t n) { return random_bits() % n; }

// Memory of exactly shift + count elements, filled with random numbers or bits; data() skips the first `shift`.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t shift = 0) : count_(shift + count), shift_(shift), memory_(allocate(count_)) {
    for (int64_t i = 0; i < count_; ++i) {
      if constexpr (std::is_integral_v<T>) memory_[i] = static_cast<T>(random_bits());
      else memory_[i] = static_cast<T>(static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-30f);
    }
  }
  Buffer(const Buffer& other) : count_(other.count_), shift_(other.shift_), memory_(allocate(count_)) {
    std::memcpy(memory_, other.memory_, count_ * sizeof(T));
  }
  ~Buffer() { ::operator delete(memory_, kAlignment); }

  T* data() { return memory_ + shift_; }
  const T* data() const { return memory_ + shift_; }

  bool operator==(const Buffer& other) const {
    return count_ == other.count_ && std::memcmp(memory_, other.memory_, count_ * sizeof(T)) == 0;
  }

 private:
  static constexpr std::align_val_t kAlignment{16};
  static T* allocate(int64_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kAlignment)); }

  const int64_t count_, shift_;
  T* const memory_;
};

Buffer<int64_t> numbers(const std::vector<int64_t>& values) {
  Buffer<int64_t> buffer(values.size());
  std::copy(values.begin(), values.end(), buffer.data());
  return buffer;
}

template <typename Kernel>
void run(unsigned int down, const Kernel& kernel) {
  ++run_number;
  emulation::run(1 + run_number % 3, down, kThreads, run_number % 2, kernel);
}

// Values of `seen`: around all boundaries of the layout, large ones, and values out of range.
std::vector<int64_t> all_seen(const RingLayout& layout) {
  const int64_t sinks = layout.num_sinks, full = layout.slots(), one = 1;
  return {0,         sinks > 0 ? sinks - 1 : 0, sinks,   sinks + layout.window - 1, full - 1,
          full,      full + 3,                  1000000, 1000000000,                one << 31,
          one << 40, kSmallest,                 -1,      sinkattn::kMaxTokens - 1,  kLargest};
}

// append_

enum Order {
  kContiguous, kTransposed, kFused, kExpanded, kOneNumber, kSpaced, kOddRows, kOddHeads, kOddTokens, kShifted
};

// A [n0, n1, n2, n3] tensor; its memory ends with its last element.
template <typename T>
class Input {
 public:
  Input(Order order, int64_t n0, int64_t n1, int64_t n2, int64_t n3)
      : view(strides(order, n1, n2, n3)), buffer(extent(view, n0, n1, n2, n3), order == kShifted) {
    view.data = buffer.data();
  }
  Input(const Input&) = delete;

  T at(int64_t r, int64_t h, int64_t t, int64_t d) const {
    return view.data[r * view.row_stride + h * view.head_stride + t * view.token_stride + d * view.element_stride];
  }

  sinkattn::TokenView<T> view;
  const Buffer<T> buffer;

 private:
  static sinkattn::TokenView<T> strides(Order order, int64_t heads, int64_t tokens, int64_t dim) {
    const auto padded = [](int64_t x) { return (x + 15) / 16 * 16; };
    const int64_t token = padded(dim) + (order == kOddTokens);
    const int64_t head = padded(tokens * token) + (order == kOddHeads);
    const int64_t row = padded(heads * head) + (order == kOddRows);
    switch (order) {
      case kTransposed: return {nullptr, tokens * heads * dim, dim, heads * dim, 1};
      case kFused: return {nullptr, tokens * 3 * heads * dim, dim, 3 * heads * dim, 1};
      case kExpanded: return {nullptr, 0, 0, dim, 1};
      case kOneNumber: return {nullptr, 0, 0, 0, 0};
      case kSpaced: return {nullptr, heads * tokens * dim * 2, tokens * dim * 2, dim * 2, 2};
      case kOddRows:
      case kOddHeads:
      case kOddTokens: return {nullptr, row, head, token, 1};
      default: return {nullptr, heads * tokens * dim, tokens * dim, dim, 1};
    }
  }

  static int64_t extent(const sinkattn::TokenView<T>& by, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    if (n3 == 0) return 0;
    return (n0 - 1) * by.row_stride + (n1 - 1) * by.head_stride + (n2 - 1) * by.token_stride +
           (n3 - 1) * by.element_stride + 1;
  }
};

// Memory layout of all tensors. If `aligned`, only the sizes can prevent vectorized accesses.
struct Placement {
  const char* name;
  Order key, value, table;
  int64_t keys_shift, values_shift;
  bool aligned;
};
constexpr Placement kPlacements[] = {
    {"contiguous", kContiguous, kContiguous, kContiguous, 0, 0, true},
    {"transposed", kTransposed, kTransposed, kTransposed, 0, 0, true},
    {"of one projection", kFused, kFused, kFused, 0, 0, true},
    {"expanded", kExpanded, kExpanded, kExpanded, 0, 0, true},
    {"one number", kOneNumber, kOneNumber, kOneNumber, 0, 0, false},
    {"gaps", kSpaced, kSpaced, kSpaced, 0, 0, false},
    {"key rows odd", kOddRows, kContiguous, kContiguous, 0, 0, false},
    {"key heads odd", kOddHeads, kContiguous, kContiguous, 0, 0, false},
    {"key tokens odd", kOddTokens, kContiguous, kContiguous, 0, 0, false},
    {"value rows odd", kContiguous, kOddRows, kContiguous, 0, 0, false},
    {"table rows odd", kContiguous, kContiguous, kOddRows, 0, 0, false},
    {"table tokens odd", kContiguous, kContiguous, kOddTokens, 0, 0, false},
    {"all shifted", kShifted, kShifted, kShifted, 1, 1, false},
    {"keys shifted", kContiguous, kContiguous, kContiguous, 1, 0, false},
    {"values shifted", kContiguous, kContiguous, kContiguous, 0, 1, false},
    {"key shifted", kShifted, kContiguous, kContiguous, 0, 0, false},
    {"value shifted", kContiguous, kShifted, kContiguous, 0, 0, false},
    {"tables shifted", kContiguous, kContiguous, kShifted, 0, 0, false},
    {"tables with gaps", kContiguous, kContiguous, kSpaced, 0, 0, false},
};

struct Shape {
  int64_t key_dim, value_dim, pairs;
  bool interleaved;
};

template <typename scalar_t>
class AppendTest {
 public:
  using acc_t = typename sinkattn::Accumulate<scalar_t>::type;

  AppendTest(
      const Shape& shape, const Placement& placement, const RingLayout& layout, int64_t tokens, bool ragged,
      bool of_rows)
      : shape_(shape),
        placement_(placement),
        layout_(layout),
        tokens_(tokens),
        seen_(all_seen(layout)),
        batch_(seen_.size()),
        cache_rows_(batch_ + of_rows),
        key_(placement.key, batch_, kHeads, tokens, shape.key_dim),
        value_(placement.value, batch_, kHeads, tokens, shape.value_dim),
        cos_(placement.table, batch_, 1, tokens, std::max<int64_t>(1, shape.pairs)),
        sin_(placement.table, batch_, 1, tokens, std::max<int64_t>(1, shape.pairs)),
        keys_(cache_rows_ * kHeads * layout.slots() * shape.key_dim, placement.keys_shift),
        values_(cache_rows_ * kHeads * layout.slots() * shape.value_dim, placement.values_shift) {
    for (int64_t row = 0; row < batch_ && ragged; ++row) lengths_.push_back(random_below(tokens + 3) - 1);
    for (int64_t row = 0; row < batch_ && of_rows; ++row) {
      rows_.push_back(batch_ - row);
      row_sinks_.push_back(random_below(layout.num_sinks + 3) - 1);
    }
    if (of_rows) rows_[0] = -1, rows_[1] = cache_rows_;  // out of range: skipped
  }

  void run() {
    const auto expected = expected_cache();
    const bool vectorized = call(keys_, values_).can_vectorize();
    if (placement_.aligned) CHECK(vectorized == sizes_fit());
    else if (placement_.key != kContiguous || placement_.value != kContiguous) CHECK(!vectorized);
    else if (placement_.keys_shift || placement_.values_shift) CHECK(!vectorized);
    check<false>(expected.first, expected.second);
    if (vectorized) check<true>(expected.first, expected.second);
    num_vectorized += vectorized;
  }

  // With a ring of 8 bits: of what the cache would hold otherwise, sinks are the same, and the others rounded.
  template <typename stored_t>
  void run_eight_bit() {
    const auto whole = expected_cache();
    const int64_t rows = cache_rows_ * kHeads, sinks = layout_.num_sinks, ring = layout_.ring();
    Buffer<scalar_t> sink_keys(rows * sinks * shape_.key_dim), sink_values(rows * sinks * shape_.value_dim);
    Buffer<int8_t> keys(rows * ring * shape_.key_dim), values(rows * ring * shape_.value_dim);
    Buffer<float> key_scales(rows * ring), value_scales(rows * ring);
    auto expected = std::make_tuple(sink_keys, sink_values, keys, values, key_scales, value_scales);
    const auto put = [&](const Buffer<scalar_t>& from, auto& to_sinks, auto& to_ring, auto& scales, int64_t kv_row,
                         int64_t slot, int64_t dim) {
      const scalar_t* x = from.data() + (kv_row * layout_.slots() + slot) * dim;
      const int64_t at = kv_row * ring + slot - sinks;
      if (slot < sinks) {
        std::copy(x, x + dim, to_sinks.data() + (kv_row * sinks + slot) * dim);
        return;
      }
      std::vector<float> wide;
      for (int64_t d = 0; d < dim; ++d) wide.push_back(static_cast<float>(x[d]));
      if (&from == &whole.first) sinkattn::hadamard(wide.data(), dim);
      scales.data()[at] =
          sinkattn::quantise(reinterpret_cast<stored_t*>(to_ring.data()) + at * dim, wide.data(), 1, dim);
    };
    for_each_written([&](int64_t, int64_t, int64_t, int64_t kv_row, int64_t slot) {
      auto& [to_sink_keys, to_sink_values, to_keys, to_values, to_key_scales, to_value_scales] = expected;
      put(whole.first, to_sink_keys, to_keys, to_key_scales, kv_row, slot, shape_.key_dim);
      put(whole.second, to_sink_values, to_values, to_value_scales, kv_row, slot, shape_.value_dim);
    });
    current_case = case_name() + ", ring of 8 bits";
    const auto appended = call(sink_keys, sink_values);
    const sinkattn::EightBitRing<stored_t> held{
        reinterpret_cast<stored_t*>(keys.data()), reinterpret_cast<stored_t*>(values.data()), key_scales.data(),
        value_scales.data()};
    const int key_lanes = appended.key_lanes(false), value_lanes = appended.value_lanes(false);
    emulation::run_blocks(1 + ++run_number % 2, 2, kThreads, [&] {
      sinkattn::append_eight_bit_kernel<scalar_t, stored_t>(appended, held, key_lanes, value_lanes);
    });
    CHECK(std::tie(sink_keys, sink_values, keys, values, key_scales, value_scales) == expected);
  }

  static inline int64_t num_vectorized = 0;  // cases with vectorized accesses

 private:
  static constexpr int64_t kHeads = 2;

  bool sizes_fit() const {
    const int64_t n = 16 / sizeof(scalar_t);
    if (shape_.key_dim % n || shape_.value_dim % n) return false;
    return shape_.pairs % (shape_.interleaved ? n / 2 : n) == 0;
  }

  sinkattn::AppendCall<scalar_t> call(Buffer<scalar_t>& keys, Buffer<scalar_t>& values) const {
    sinkattn::RotaryTables<acc_t> tables{};
    if (shape_.pairs > 0) {
      const auto& view = cos_.view;
      tables = {view.data, sin_.view.data, view.row_stride, view.token_stride, view.element_stride, shape_.pairs};
    }
    return {
        keys.data(), values.data(), key_.view, value_.view, seen_.data(), lengths_.empty() ? nullptr : lengths_.data(),
        tables, batch_, kHeads, tokens_, shape_.key_dim, shape_.value_dim, layout_, shape_.interleaved, cache_rows_,
        rows_.empty() ? nullptr : rows_.data(), row_sinks_.empty() ? nullptr : row_sinks_.data()};
  }

  // Calls put(row, head, i, KV row of the cache, slot) for each token that is written, later ones last.
  template <typename Put>
  void for_each_written(const Put& put) const {
    for (int64_t row = 0; row < batch_; ++row) {
      const int64_t seen = std::clamp<int64_t>(seen_[row], 0, int64_t{1} << 61);
      const int64_t count = lengths_.empty() ? tokens_ : std::clamp<int64_t>(lengths_[row], 0, tokens_);
      const int64_t cache_row = rows_.empty() ? row : rows_[row], most = layout_.num_sinks;
      if (cache_row < 0 || cache_row >= cache_rows_) continue;
      const int64_t sinks = row_sinks_.empty() ? most : std::clamp<int64_t>(row_sinks_[row], 0, most);
      for (int64_t head = 0; head < kHeads; ++head) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t token = seen + i;
          const int64_t slot = token < sinks ? token : most + (token - sinks) % layout_.ring();
          put(row, head, i, cache_row * kHeads + head, slot);
        }
      }
    }
  }

  // The expected cache: keys and values.
  std::pair<Buffer<scalar_t>, Buffer<scalar_t>> expected_cache() const {
    auto all = std::make_pair(keys_, values_);
    for_each_written([&](int64_t row, int64_t head, int64_t i, int64_t kv_row, int64_t slot) {
      const int64_t target = kv_row * layout_.slots() + slot;
      scalar_t* key = all.first.data() + target * shape_.key_dim;
      for (int64_t d = 0; d < shape_.key_dim; ++d) key[d] = key_.at(row, head, i, d);
      for (int64_t pair = 0; pair < shape_.pairs; ++pair) {
        const int64_t a = shape_.interleaved ? 2 * pair : pair;
        const int64_t b = shape_.interleaved ? 2 * pair + 1 : pair + shape_.pairs;
        const acc_t x = static_cast<acc_t>(key[a]), y = static_cast<acc_t>(key[b]);
        const acc_t cos = cos_.at(row, 0, i, pair), sin = sin_.at(row, 0, i, pair);
        const acc_t xc = x * cos, ys = y * sin, yc = y * cos, xs = x * sin;
        key[a] = static_cast<scalar_t>(xc - ys);
        key[b] = static_cast<scalar_t>(yc + xs);
      }
      for (int64_t d = 0; d < shape_.value_dim; ++d) {
        all.second.data()[target * shape_.value_dim + d] = value_.at(row, head, i, d);
      }
    });
    return all;
  }

  std::string case_name() const {
    return std::string("append, ") + placement_.name + ", " + std::to_string(sizeof(scalar_t)) + " bytes, dims " +
           std::to_string(shape_.key_dim) + " " + std::to_string(shape_.value_dim) + ", pairs " +
           std::to_string(shape_.pairs) + (shape_.interleaved ? " interleaved" : "") + ", tokens " +
           std::to_string(tokens_);
  }

  template <bool vectorized>
  void check(const Buffer<scalar_t>& expected_keys, const Buffer<scalar_t>& expected_values) const {
    current_case = case_name() + (vectorized ? ", vectorized" : "");
    Buffer<scalar_t> keys = keys_, values = values_;
    const auto key = key_.buffer, value = value_.buffer;
    const auto appended = call(keys, values);
    const int key_lanes = appended.key_lanes(vectorized), value_lanes = appended.value_lanes(vectorized);
    ::run(2, [&] { sinkattn::append_kernel<scalar_t, vectorized>(appended, key_lanes, value_lanes); });
    CHECK(keys == expected_keys);
    CHECK(values == expected_values);
    CHECK(key == key_.buffer && value == value_.buffer);
  }

  const Shape shape_;
  const Placement placement_;
  const RingLayout layout_;
  const int64_t tokens_;
  const std::vector<int64_t> seen_;
  std::vector<int64_t> lengths_, rows_, row_sinks_;
  const int64_t batch_, cache_rows_;
  Input<scalar_t> key_, value_;
  Input<acc_t> cos_, sin_;
  Buffer<scalar_t> keys_, values_;
};

constexpr Shape kShapes[] = {
    {1, 1, 0, false},     {7, 5, 3, false},     {7, 5, 2, true},      {8, 16, 4, false},   {16, 8, 4, true},
    {64, 128, 32, false}, {80, 80, 16, false},  {80, 80, 40, true},   {80, 80, 6, false},  {96, 64, 48, false},
    {128, 128, 0, false}, {128, 128, 64, true}, {128, 96, 64, false}, {256, 256, 8, true}, {256, 7, 128, false},
    {0, 8, 0, false},     {16, 0, 8, false},
};
// Layout and tokens of a call: fewer than the ring has slots, as many, more.
constexpr std::pair<RingLayout, int64_t> kCalls[] = {
    {{3, 5, 2}, 1}, {{0, 5, 0}, 4}, {{2, 4, 1}, 7}, {{1, 1, 0}, 3}, {{4, 3, 2}, 17}};

template <typename scalar_t>
void check_append() {
  for (const Shape& shape : kShapes) {
    for (const Placement& placement : kPlacements) {
      const auto& [layout, tokens] = kCalls[run_number % 5];
      AppendTest<scalar_t>(shape, placement, layout, tokens, random_below(2), random_below(2)).run();
    }
  }
  CHECK(AppendTest<scalar_t>::num_vectorized > 30);
}

// With every third shape: each thread of a block takes a thread of the host.
template <typename scalar_t>
void check_append_eight_bit(size_t first) {
  for (size_t i = first; i < std::size(kShapes); i += 3) {
    const auto& [layout, tokens] = kCalls[run_number % 5];
    const Placement& placement = kPlacements[i % std::size(kPlacements)];
    AppendTest<scalar_t> test(kShapes[i], placement, layout, tokens, random_below(2), random_below(2));
    test.template run_eight_bit<int8_t>();
    test.template run_eight_bit<sinkattn::Float8>();
  }
}

// reorder_

// Bytes of the access type that with_widest_unit chooses.
int64_t unit_of(int64_t bytes) {
  int64_t size = 0;
  sinkattn::with_widest_unit(bytes, [&](auto unit) { size = sizeof(unit); });
  return size;
}

void check_reorder(const std::vector<int64_t>& source, int64_t row_bytes, int64_t shift) {
  current_case = "reorder, " + std::to_string(row_bytes) + " bytes shifted by " + std::to_string(shift) + ", source";
  for (const int64_t row : source) current_case += " " + std::to_string(row);
  const int64_t batch = static_cast<int64_t>(source.size());
  const Buffer<int64_t> sources = numbers(source);
  Buffer<int64_t> plan(2 * sinkattn::max_row_moves(batch)), num_readers(batch), count(1);
  auto* moves = reinterpret_cast<sinkattn::RowMove*>(plan.data());
  emulation::run_block(
      kThreads, [&] { sinkattn::plan_kernel(sources.data(), batch, num_readers.data(), moves, count.data()); });
  CHECK(sources == numbers(source));

  Buffer<uint8_t> cache(batch * row_bytes, shift);
  const Buffer<uint8_t> before = cache;
  Buffer<uint8_t> expected = cache;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t from = source[row] >= 0 && source[row] < batch ? source[row] : row;
    std::memcpy(expected.data() + row * row_bytes, before.data() + from * row_bytes, row_bytes);
  }
  sinkattn::with_widest_unit(sinkattn::address(cache.data()) | row_bytes, [&](auto unit) {
    using Unit = decltype(unit);
    auto* units = reinterpret_cast<Unit*>(cache.data());
    const int64_t row_units = row_bytes / sizeof(Unit);
    run(1, [&] { sinkattn::move_rows_kernel(units, moves, count.data(), row_units); });
  });
  CHECK(cache == expected);
}

void check_reorders() {
  constexpr int64_t kRowBytes[] = {2, 6, 12, 16, 40, 96, 1000, 16 * 700}, kShifts[] = {0, 2, 4, 8};
  const auto check = [&](const std::vector<int64_t>& source) {
    check_reorder(source, kRowBytes[run_number % 8], kShifts[run_number / 3 % 4]);
  };
  for (const std::vector<int64_t>& source : std::vector<std::vector<int64_t>>{
           {0}, {5}, {0, 1, 2}, {1, 0}, {1, 2, 3, 4, 5, 6, 7, 8, 0}, {2, 2, 2, 2}, {1, 0, 3, 2, 5, 4}, {1, 0, 0, 1},
           {1, 2, 0, 0, 3, 4}, {kLargest, kSmallest, 0, -1, 4, 2}, {3, 4, 0, 1, 2, 2, 9, -1, 7}}) {
    check(source);
  }
  for (int64_t batch = 1; batch <= 9; ++batch) {
    for (int repeat = 0; repeat < 3; ++repeat) {
      std::vector<int64_t> source;
      for (int64_t row = 0; row < batch; ++row) {
        // Only rows in range, then some out of range, then a permutation.
        source.push_back(repeat % 3 == 0 ? random_below(batch) : repeat % 3 == 1 ? random_below(batch + 2) - 1 : row);
        if (repeat % 3 == 2) std::swap(source[row], source[random_below(row + 1)]);
      }
      check(source);
    }
  }
  for (const int64_t batch : {sinkattn::kMaxSharedRows, sinkattn::kMaxSharedRows + 1}) {
    std::vector<int64_t> anything, cycle;
    for (int64_t row = 0; row < batch; ++row) {
      anything.push_back(random_below(batch));
      cycle.push_back((row + 7) % batch);
    }
    check_reorder(anything, 32, 0);
    check_reorder(cycle, 32, 0);
  }
}

// reset_

void check_reset(const std::vector<int64_t>& rows, int64_t batch, int64_t row_bytes, int64_t shift) {
  current_case = "reset, " + std::to_string(rows.size()) + " rows of " + std::to_string(row_bytes) + " bytes";
  const Buffer<int64_t> list = numbers(rows);
  Buffer<uint8_t> cache(batch * row_bytes, shift);
  Buffer<uint8_t> expected = cache;
  for (const int64_t row : rows) {
    if (row >= 0 && row < batch) std::memset(expected.data() + row * row_bytes, 0, row_bytes);
  }
  sinkattn::with_widest_unit(sinkattn::address(cache.data()) | row_bytes, [&](auto unit) {
    using Unit = decltype(unit);
    auto* units = reinterpret_cast<Unit*>(cache.data());
    const int64_t row_units = row_bytes / sizeof(Unit), count = rows.size();
    // A row listed twice may be zeroed by two blocks at once: harmless, but the thread sanitizer would report it.
    const unsigned int down = std::set<int64_t>(rows.begin(), rows.end()).size() < rows.size() ? 1 : 1 + run_number % 2;
    run(down, [&] { sinkattn::zero_rows_kernel(units, list.data(), count, batch, row_units); });
  });
  CHECK(cache == expected);
}

void check_resets() {
  const std::vector<std::vector<int64_t>> lists{{}, {2}, {0, 4, 4, 0}, {3, 0, 1}, {5, -1, kSmallest, 1, kLargest}};
  for (const int64_t row_bytes : {2, 12, 40, 16 * 500}) {
    for (const int64_t shift : {0, 2, 4, 8}) {
      for (const auto& rows : lists) check_reset(rows, 5, row_bytes, shift);
    }
  }
}

// linearise

void check_linearise(const RingLayout& layout, int64_t heads, int64_t bytes, int64_t shift) {
  current_case = "linearise, vectors of " + std::to_string(bytes) + " bytes shifted by " + std::to_string(shift);
  const Buffer<int64_t> seen = numbers(all_seen(layout));
  const int64_t batch = all_seen(layout).size(), length = layout.num_sinks + layout.window;
  const Buffer<uint8_t> cache(batch * heads * layout.slots() * bytes, shift);
  const Buffer<uint8_t> before = cache;
  Buffer<uint8_t> out(batch * heads * length * bytes, shift);
  Buffer<uint8_t> expected = out;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t count = std::clamp<int64_t>(seen.data()[row], 0, int64_t{1} << 61);
    for (int64_t head = 0; head < heads; ++head) {
      uint8_t* to = expected.data() + (row * heads + head) * length * bytes;
      uint8_t* const end = to + length * bytes;
      const auto put = [&](int64_t token) {
        const int64_t from = (row * heads + head) * layout.slots() + layout.slot(token);
        std::memcpy(to, cache.data() + from * bytes, bytes);
        to += bytes;
      };
      for (int64_t token = 0; token < std::min(count, layout.num_sinks); ++token) put(token);
      for (int64_t token = std::max(layout.num_sinks, count - layout.window); token < count; ++token) put(token);
      std::memset(to, 0, end - to);
    }
  }
  sinkattn::with_widest_unit(sinkattn::address(out.data()) | bytes, [&](auto unit) {
    using Unit = decltype(unit);
    auto* to = reinterpret_cast<Unit*>(out.data());
    const auto* from = reinterpret_cast<const Unit*>(cache.data());
    const int64_t units = bytes / sizeof(Unit);
    const int lanes = sinkattn::lanes_for(units);
    run(1, [&] { sinkattn::linearise_kernel(to, from, seen.data(), batch, heads, units, layout, lanes); });
  });
  CHECK(out == expected);
  CHECK(cache == before);
}

// rollback_

void check_rollback(
    const std::vector<int64_t>& seen, const std::vector<int64_t>& peak, const std::vector<int64_t>& counts,
    int64_t headroom, int64_t refused) {
  current_case = "rollback, row refused: " + std::to_string(refused);
  Buffer<int64_t> seen_now = numbers(seen), peak_now = numbers(peak);
  const Buffer<int64_t> by = numbers(counts);
  sinkattn::RollbackFailure report{-2, 0, 0, 0};
  emulation::run_block(kThreads, [&] {
    sinkattn::rollback_kernel(seen_now.data(), peak_now.data(), by.data(), seen.size(), headroom, &report);
  });
  CHECK(report.row == refused);
  if (refused >= 0) {
    CHECK(report.count == counts[refused]);
    CHECK(report.seen == seen[refused] && report.peak == peak[refused]);
    CHECK(seen_now == numbers(seen) && peak_now == numbers(peak));
    return;
  }
  for (size_t row = 0; row < seen.size(); ++row) {
    CHECK(seen_now.data()[row] == seen[row] - counts[row]);
    CHECK(peak_now.data()[row] == std::max(seen[row], peak[row]));
  }
}

void check_rollbacks() {
  check_rollback({}, {}, {}, 3, -1);
  check_rollback({5, 9}, {0, 9}, {3, 0}, 3, -1);
  check_rollback({5, 9}, {0, 9}, {3, 4}, 3, 1);
  check_rollback({5, 9}, {7, 0}, {2, 4}, 3, 0);   // two were rolled back before
  check_rollback({5, 9}, {50, 9}, {0, 1}, 3, -1);  // the first row is not rolled back
  check_rollback({5, 2}, {5, 2}, {-1, 3}, 9, 0);
  check_rollback({5, 2}, {5, 2}, {1, 3}, 9, 1);
  check_rollback({kLargest / 4, 2}, {0, 2}, {8, 2}, 8, -1);
  const int64_t batch = 3 * kThreads + 5;
  const std::vector<int64_t> seen(batch, 100), peak(batch, 101);
  std::vector<int64_t> counts(batch, 7);
  check_rollback(seen, peak, counts, 8, -1);
  counts[kThreads + 4] = counts[batch - 1] = counts[2 * kThreads] = 8;
  check_rollback(seen, peak, counts, 8, kThreads + 4);
}

// Host code that sizes the launches.
void check_launch_sizes() {
  current_case = "launch sizes";
  const int64_t bytes[] = {0, 16, 24, 20, 6, 7, 4096, 4098}, units[] = {16, 16, 8, 4, 2, 1, 16, 2};
  for (int i = 0; i < 8; ++i) CHECK(unit_of(bytes[i]) == units[i]);
  const int64_t vectors[] = {0, 1, 2, 3, 8, 10, 16, 17, 33, 1000}, lanes[] = {1, 1, 2, 4, 8, 16, 16, 32, 32, 32};
  for (int i = 0; i < 10; ++i) CHECK(sinkattn::lanes_for(vectors[i]) == lanes[i]);
}

// Buffers that differ in one byte compare as different.
void check_buffer_comparison() {
  current_case = "buffer comparison";
  Buffer<uint8_t> one(33, 2);
  const Buffer<uint8_t> other = one;
  CHECK(one == other);
  for (const int64_t at : {-2, 0, 32}) {
    one.data()[at] ^= 1;
    CHECK(!(one == other));
    one.data()[at] ^= 1;
  }
}

}  // namespace

int main() {
  check_buffer_comparison();
  check_launch_sizes();
  check_append<float>();
  check_append<double>();
  check_append<Half>();
  check_append<BFloat16>();
  check_append_eight_bit<float>(0);
  check_append_eight_bit<Half>(1);
  check_append_eight_bit<BFloat16>(2);
  check_reorders();
  check_resets();
  for (const RingLayout& layout : {RingLayout{3, 5, 2}, RingLayout{0, 6, 0}, RingLayout{2, 1, 4}}) {
    for (const int64_t bytes : {2, 14, 20, 24, 32, 160, 192, 256, 512, 1024}) {
      for (const int64_t shift : {0, 2, 4, 8}) check_linearise(layout, 3, bytes, shift);
    }
  }
  check_rollbacks();
  std::puts("ok");
}
