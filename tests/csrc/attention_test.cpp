// Tests the CPU attention kernel of every instruction set that this processor has against attention_reference.h. All
// memory that must not be read holds NaN, also in the cache, and every buffer ends with its last element, so that the
// address sanitizer detects accesses beyond it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "attention_reference.h"
#include "instruction_sets.h"
#include "testing.h"
#include "thread_workers.h"

using namespace reference;
using sinkattn::CacheType;
using sinkattn::InstructionSet;
using sinkattn::RingType;

namespace {

// Error in units of the tolerance. NaN must be NaN, and infinity the same infinity.
double error(double expected, double tolerance, double got) {
  if (std::isnan(expected)) return std::isnan(got) ? 0 : kInfinity;
  return expected == got ? 0 : std::abs(got - expected) / tolerance;
}

template <typename scalar_t>
void check_close(const Expected& expected, const std::vector<scalar_t>& got) {
  CHECK(expected.out.size() == got.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (error(expected.out[i], expected.tolerance[i], to_double(got[i])) <= 1) continue;
    current_case += ", element " + std::to_string(i) + ": expected " + std::to_string(expected.out[i]) +
                    " to within " + std::to_string(expected.tolerance[i]) + ", got " +
                    std::to_string(to_double(got[i]));
    CHECK(false);
  }
}

template <typename scalar_t>
std::vector<scalar_t> round_to(const std::vector<double>& elements) {
  std::vector<scalar_t> all;
  for (const double x : elements) all.push_back(reference::round_to<scalar_t>(x));
  return all;
}

// A 4-dimensional tensor; its memory ends with its last element.
template <typename T>
struct Buffer {
  std::vector<T> data;
  sinkattn::StridedView view;

  template <typename Element>
  Buffer(int64_t n0, int64_t n1, int64_t n2, int64_t n3, bool gaps, const Element& element) {
    const int64_t sizes[4] = {n0, n1, n2, n3};
    int64_t stride = gaps ? 2 : 1, last = 0;
    for (const int dim : {3, gaps ? 1 : 2, gaps ? 2 : 1, 0}) {
      view.stride[dim] = stride;
      last += (sizes[dim] - 1) * stride;
      stride = stride * sizes[dim] + (gaps ? 1 : 0);
    }
    if (n3 == 0) return;  // no rotation
    data.assign(last + 1, reference::round_to<T>(kNaN));
    view.data = data.data();
    for (int64_t i = 0; i < n0; ++i) {
      for (int64_t j = 0; j < n1; ++j) {
        for (int64_t k = 0; k < n2; ++k) {
          T* to = data.data() + i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
          for (int64_t d = 0; d < n3; ++d) to[d * view.stride[3]] = reference::round_to<T>(element(i, j, k, d));
        }
      }
    }
  }
  Buffer(Buffer&&) = default;
};

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// The slots of a ring of 8 bits, of keys or values.
struct HeldSlots {
  std::vector<uint8_t> codes;
  std::vector<float> scales;

  bool operator==(const HeldSlots& other) const {
    return same_bits(codes, other.codes) && same_bits(scales, other.scales);
  }
};

constexpr const char* kRingNames[] = {"", ", ring of int8", ", ring of float8"};

template <typename scalar_t>
class Test {
 public:
  explicit Test(const Case& c)
      : c_(c),
        name_(std::string(c.name) + ", " + kType<scalar_t>.name + kRingNames[static_cast<int>(c.ring)]),
        streams_(c) {}

  void run() {
    prepare();
    check_tolerance_reveals_defects();
    for (int set = 0; set < sinkattn::kNumInstructionSets; ++set) {
      const InstructionSet& chosen = sinkattn::kInstructionSets[set];
      if (!chosen.available()) continue;
      const Results one_worker = run(chosen, 1), four_workers = run(chosen, 4);
      for (size_t n = 0; n < expected_.size(); ++n) {
        const std::string part = n < prepared_.size() ? "call " + std::to_string(n) : "cache";
        current_case = name_ + ", " + chosen.name + ", " + part;
        check_close(expected_[n], one_worker.whole[n]);
        CHECK(same_bits(one_worker.whole[n], four_workers.whole[n]));
      }
      if (!c_.is_eight_bit()) continue;
      CHECK(one_worker.keys == held(kKey, streams_.end()) && one_worker.values == held(kValue, streams_.end()));
      CHECK(one_worker.keys == four_workers.keys && one_worker.values == four_workers.values);
    }
  }

 private:
  // Inputs of one call, for any instruction set.
  struct PreparedCall {
    std::vector<int64_t> seen, lengths;
    const int64_t* begins;
    int64_t tokens;
    bool ragged;
    Buffer<scalar_t> query, key, value;
    Buffer<Acc<scalar_t>> cos, sin;
  };

  PreparedCall prepare_call(int64_t n, const std::vector<int64_t>& seen) {
    const Call& call = c_.calls[n];
    const bool ragged = call.size() > 1, gaps = c_.has(kGaps);
    const std::vector<int64_t> lengths = ragged ? call : Call(c_.batch(), call[0]);
    const int64_t tokens = std::max<int64_t>(1, *std::max_element(lengths.begin(), lengths.end()));
    // Padding is NaN.
    const auto inputs = [&](Kind kind) {
      return Buffer<scalar_t>(
          c_.batch(), streams_.heads(kind), tokens, streams_.dim(kind), gaps,
          [&](int64_t row, int64_t head, int64_t i, int64_t d) {
            return i < lengths[row] ? streams_.at(kind, row, head, seen[row] + i)[d] : kNaN;
          });
    };
    const auto tables = [&](std::vector<double> RotaryTable::*table) {
      return Buffer<Acc<scalar_t>>(
          2, c_.batch(), tokens, c_.pairs, gaps, [&](int64_t relative, int64_t row, int64_t i, int64_t pair) {
            if (i >= lengths[row]) return kNaN;
            const int64_t token = seen[row] + i;
            return (streams_.rotary_table(relative ? c_.layout_of(row, n).position(token) : token).*table)[pair];
          });
    };
    return {seen, lengths, c_.begins.empty() ? nullptr : c_.begins[n].data(), tokens, ragged, inputs(kQuery),
            inputs(kKey), inputs(kValue), tables(&RotaryTable::cos), tables(&RotaryTable::sin)};
  }

  void prepare() {
    std::vector<int64_t> seen = c_.seen;
    for (size_t n = 0; n < c_.calls.size(); ++n) {
      const PreparedCall& now = prepared_.emplace_back(prepare_call(n, seen));
      expected_.push_back(streams_.attend(n, seen, now.lengths, now.tokens));
      for (int64_t row = 0; row < c_.batch(); ++row) seen[row] += now.lengths[row];
    }
    keys_ = round_to<scalar_t>(cached(kKey, c_.seen, 0).out);
    values_ = round_to<scalar_t>(cached(kValue, c_.seen, 0).out);
    // Rotary tables were rounded, and then the keys.
    expected_.push_back(cached(kKey, seen, 2 * kType<scalar_t>.rounding + 4 * kType<Acc<scalar_t>>.rounding));
    expected_.push_back(cached(kValue, seen, 0));
  }

  // The tolerance must reveal the smallest defects: each exceeds it at least tenfold, where it is the largest. That keys
  // and values are rounded to 8 bits shows where they are in fp32 before.
  void check_tolerance_reveals_defects() {
    current_case = name_;
    const auto error_of = [&](const Defect& defect) {
      double max_error = 0;
      for (size_t n = 0; n < prepared_.size(); ++n) {
        const PreparedCall& now = prepared_[n];
        const Expected wrong = streams_.attend(n, now.seen, now.lengths, now.tokens, defect);
        for (size_t i = 0; i < wrong.out.size(); ++i) {
          max_error = std::max(max_error, error(expected_[n].out[i], expected_[n].tolerance[i], wrong.out[i]));
        }
      }
      return max_error;
    };
    const int64_t sinks = c_.layout.num_sinks, end = *std::max_element(streams_.end().begin(), streams_.end().end());
    if (kType<scalar_t>.type == CacheType::kFloat && c_.is_eight_bit() && !c_.has(kAllBitPatterns)) {
      CHECK(error_of({0, 0, true}) > 10);
    }
    if (kType<scalar_t>.type != CacheType::kBFloat16) return;
    if (end > sinks + c_.layout.window) CHECK(error_of({1, 0, false}) > 10);
    if (end > sinks && sinks > 0 && (c_.pairs > 0 || c_.has(kAlibi))) CHECK(error_of({0, 1, false}) > 10);
  }

  // Calls write(row, layout of the row, token) for the tokens that the cache holds after `end` tokens, but for those
  // from before the first call that are outside the window of that call.
  template <typename Write>
  void for_each_held(const std::vector<int64_t>& end, const Write& write) {
    for (int64_t row = 0; row < c_.batch(); ++row) {
      const sinkattn::RingLayout layout = c_.layout_of(row, 0);
      for (int64_t token = 0; token < std::min(layout.num_sinks, end[row]); ++token) write(row, layout, token);
      const int64_t first = std::max({layout.num_sinks, c_.seen[row] - layout.window + 1, layout.begin});
      for (int64_t token = first; token < end[row]; ++token) write(row, layout, token);
    }
  }

  // Expected cache after `end` tokens, [row, kv_head, slot, element], of sinks alone beside a ring of 8 bits; NaN where
  // nothing was written.
  Expected cached(Kind kind, const std::vector<int64_t>& end, double tolerance) {
    const int64_t slots = c_.is_eight_bit() ? c_.layout.num_sinks : c_.layout.slots(), dim = streams_.dim(kind);
    std::vector<double> cache(c_.cache_rows() * c_.kv_heads * slots * dim, kNaN);
    for_each_held(end, [&](int64_t row, const sinkattn::RingLayout& layout, int64_t token) {
      if (c_.is_eight_bit() && token >= layout.num_sinks) return;
      for (int64_t head = 0; head < c_.kv_heads; ++head) {
        double* to = &cache[((c_.cache_row(row) * c_.kv_heads + head) * slots + layout.slot(token)) * dim];
        const double* from = streams_.at(kind, row, head, token);
        if (kind == kKey) streams_.rotate(to, from, token);
        else std::copy(from, from + dim, to);
      }
    });
    return {cache, std::vector<double>(cache.size(), tolerance)};
  }

  // Expected ring of 8 bits after `end` tokens; the largest numbers, times NaN, where nothing was written.
  HeldSlots held(Kind kind, const std::vector<int64_t>& end) {
    const int64_t slots = c_.layout.ring(), dim = streams_.dim(kind), count = c_.cache_rows() * c_.kv_heads * slots;
    HeldSlots all{std::vector<uint8_t>(count * dim, 0x7f), std::vector<float>(count, static_cast<float>(kNaN))};
    for_each_held(end, [&](int64_t row, const sinkattn::RingLayout& layout, int64_t token) {
      if (token < layout.num_sinks) return;
      for (int64_t head = 0; head < c_.kv_heads; ++head) {
        const Held& now = streams_.held(kind, row, head, token);
        const int64_t slot = (token - layout.num_sinks) % slots;
        const int64_t at = (c_.cache_row(row) * c_.kv_heads + head) * slots + slot;
        all.scales[at] = now.scale;
        std::copy(now.codes.begin(), now.codes.end(), all.codes.begin() + at * dim);
      }
    });
    return all;
  }

  struct Results {
    std::vector<std::vector<scalar_t>> whole;  // output of each call, then keys and values of the cache
    HeldSlots keys, values;                    // of a ring of 8 bits
  };

  // Runs all calls on a new cache.
  Results run(const InstructionSet& set, int64_t count) {
    ThreadWorkers threads(count);
    std::vector<scalar_t> keys = keys_, values = values_;
    const bool is_eight_bit = c_.is_eight_bit();
    HeldSlots held_keys, held_values;
    if (is_eight_bit) held_keys = held(kKey, c_.seen), held_values = held(kValue, c_.seen);
    std::vector<Acc<scalar_t>> logits, slopes;
    for (int64_t head = 0; head < c_.heads; ++head) {
      logits.push_back(static_cast<Acc<scalar_t>>(sink_logit(head)));
      slopes.push_back(static_cast<Acc<scalar_t>>(alibi_slope(head)));
    }
    Results results;
    for (size_t n = 0; n < prepared_.size(); ++n) {
      const PreparedCall& now = prepared_[n];
      std::vector<scalar_t> out(expected_[n].out.size(), reference::round_to<scalar_t>(kNaN));
      set.attend(
          {kType<scalar_t>.type, c_.layout, c_.batch(), c_.heads, c_.kv_heads, now.tokens, c_.head_dim, c_.value_dim,
           is_eight_bit ? static_cast<void*>(held_keys.codes.data()) : keys.data(),
           is_eight_bit ? static_cast<void*>(held_values.codes.data()) : values.data(), now.query.view, now.key.view, now.value.view, now.seen.data(),
           now.ragged ? now.lengths.data() : nullptr, now.cos.view, now.sin.view, c_.pairs, c_.has(kInterleaved),
           c_.scale(), c_.softcap(), c_.has(kSinkLogits) ? logits.data() : nullptr,
           c_.has(kAlibi) ? slopes.data() : nullptr, out.data(), c_.rows.empty() ? nullptr : c_.rows.data(),
           c_.row_sinks.empty() ? nullptr : c_.row_sinks.data(), now.begins, c_.ring, keys.data(), values.data(),
           held_keys.scales.data(), held_values.scales.data()},
          threads);
      results.whole.push_back(std::move(out));
    }
    results.whole.push_back(std::move(keys));
    results.whole.push_back(std::move(values));
    results.keys = std::move(held_keys);
    results.values = std::move(held_values);
    return results;
  }

  const Case& c_;
  const std::string name_;
  ReferenceStreams<scalar_t> streams_;
  std::vector<scalar_t> keys_, values_;  // the cache before the first call
  std::vector<PreparedCall> prepared_;
  std::vector<Expected> expected_;  // outputs of all calls, then keys and values of the cache after them
};

}  // namespace

int main() {
  const std::vector<Call> decode_steps(50, {1});
  const int64_t late = 1000000000;
  const std::vector<Case> cases{
      // name, layout, heads, kv_heads, head_dim, value_dim, pairs, seen, calls, options
      {"decoding over several wraps", {4, 12, 0}, 4, 2, 16, 16, 8, {0}, decode_steps},
      {"no sinks, odd sizes", {0, 5, 2}, 3, 1, 7, 5, 3, {0, 7}, decode_steps, kInterleaved | kGaps},
      {"a window of one", {2, 1, 0}, 2, 2, 8, 24, 0, {0}, {{1}, {1}, {1}, {9}, {1}}, kAlibi},
      {"ragged rows", {4, 9, 3}, 5, 1, 40, 40, 10, {0, 3, 4, 12, 13, late},
       {{1}, {4}, {4, 0, 3, 2, 1, 4}, {0, 0, 0, 0, 0, 0}, {0, 1, 0, 1, 1, 1}, {30, 0, 29, 1, 7, 13}, {1}}},
      {"chunks shorter than the ring", {4, 24, 8}, 8, 1, 64, 64, 32, {0, 30, late}, {{20}, {14}, {1}, {31}}, kSoftcap},
      {"chunks longer than the ring", {3, 10, 0}, 2, 2, 80, 48, 40, {2, 13}, {{37}, {50}, {1}, {11}},
       kInterleaved | kSinkLogits | kGaps},
      {"more tokens than a chunk", {4, 60, 0}, 1, 1, 8, 8, 4, {0, 59}, {{600, 300}, {1}, {520, 0}}},
      {"a window longer than a chunk", {2, 520, 3}, 1, 1, 8, 4, 2, {late}, {{530}, {1}}, kSinkLogits},
      {"appended first, in blocks", {4, 30, 40}, 8, 1, 128, 32, 64, {5, late}, {{41}, {3}, {2}, {41}}, kGaps},
      {"wide heads", {2, 6, 1}, 4, 1, 256, 256, 128, {0}, {{1}, {2}, {1}, {20}}, kSoftcap | kSinkLogits},
      {"values wider than keys", {2, 40, 5}, 4, 2, 16, 256, 8, {0, 60}, {{1}, {5}, {15}}},
      {"keys wider than values", {2, 40, 5}, 4, 1, 256, 3, 16, {0, 60}, {{1}, {5}, {15}}, kInterleaved},
      {"many slots", {4, 800, 20}, 6, 2, 64, 64, 32, {late, 300}, {{1}, {2}, {0, 1}, {1}}, kSinkLogits},
      {"many rows and heads", {2, 20, 0}, 200, 100, 16, 16, 8, {0, 90}, {{1}, {1}, {9}}, kGaps},
      {"all options", {4, 260, 6}, 6, 2, 16, 16, 0, {0, late}, {{1}, {7}, {40}, {1}, {6}},
       kSoftcap | kAlibi | kSinkLogits},
      {"rows of a cache, decoding", {4, 9, 2}, 4, 2, 16, 16, 8, {0, 30, late}, {{1, 1, 1}, {2, 3, 1}, {1}, {1}}, kAlibi,
       {3, 0, 1}, {2, 4, 0}, {{0, 25, 0}, {0, 28, late}, {1, 28, late}, {4, 34, late + 3}}},
      {"rows of a cache, in chunks", {4, 9, 2}, 4, 2, 16, 16, 8, {0, 30, late}, {{20, 3, 9}, {30}, {5, 0, 17}}, kAlibi,
       {2, 3, 0}, {1, 4, 0}, {{0, 25, late}, {18, 29, late}, {48, 40, late + 39}}},
      {"fewer sinks than a split has slots", {600, 40, 0}, 2, 1, 8, 8, 4, {30, late}, {{1}, {20}, {1}}, 0, {},
       {3, 600}},
      {"NaN and infinity, decoding", {3, 7, 2}, 4, 2, 16, 16, 8, {4, late}, decode_steps, kNonFinite},
      {"NaN and infinity, several tokens", {3, 7, 8}, 4, 2, 16, 16, 8, {4, late},
       {{9}, {4}, {3}, {7}, {2}, {9}, {5}, {6}, {8}, {1}, {9}}, kNonFinite},
      {"NaN and infinity, several tokens of rows", {4, 30, 8}, 4, 2, 24, 40, 12, {0, 33, 20, late},
       {{9, 2, 4, 5}, {1, 9, 9, 8}, {0, 3, 5, 2}, {9, 9, 9, 9}, {4, 4, 4, 4}, {9, 9, 9, 9}}, kNonFinite | kAlibi,
       {4, 0, 1, 3}, {2, 4, 0, 3},
       {{0, 0, 20, late - 20}, {0, 4, 20, late - 20}, {9, 40, 20, late - 20}, {9, 40, 30, late - 5},
        {9, 42, 30, late - 5}, {10, 50, 30, late}}},
      {"NaN and infinity, in a chunk", {3, 7, 2}, 4, 2, 16, 16, 8, {4, late}, {{160}}, kNonFinite},
      {"all bit patterns, decoding", {0, 1, 0}, 256, 256, 1, 256, 0, {0}, {{1}}, kAllBitPatterns},
      {"all bit patterns, in a chunk", {0, 1, 0}, 1, 1, 1, 256, 0, {0}, {{256}}, kAllBitPatterns},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    Test<float>(c).run();
    Test<double>(c).run();
    Test<sinkattn::Half>(c).run();
    Test<sinkattn::BFloat16>(c).run();
    for (const RingType ring : {RingType::kInt8, RingType::kFloat8}) {
      Case eight_bit = c;
      eight_bit.ring = ring;
      switch ((i + static_cast<size_t>(ring)) % 3) {  // every dtype with every ring, but not in every case
        case 0: Test<float>(eight_bit).run(); break;
        case 1: Test<sinkattn::Half>(eight_bit).run(); break;
        case 2: Test<sinkattn::BFloat16>(eight_bit).run(); break;
      }
    }
  }
  CHECK(ThreadWorkers::max_used == 4);
  std::puts("ok");
}
