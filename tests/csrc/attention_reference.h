// Expected attention outputs in plain fp64: for each query, gathers its visible keys and rotates them at their ranks.
// Independent of the kernel: no ring, no rotation at stream positions, but for keys that are held in 8 bits, which are
// rounded after that rotation. Included by attention_test.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "attention.h"
#include "dtypes.h"
#include "eight_bit_reference.h"
#include "rotary.h"

namespace reference {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// `rounding` is the largest relative error of rounding to the type.
struct Type {
  sinkattn::CacheType type;
  const char* name;
  double rounding;
};
template <typename scalar_t>
constexpr Type kType{};
template <>
constexpr Type kType<float>{sinkattn::CacheType::kFloat, "fp32", 0x1p-24};
template <>
constexpr Type kType<double>{sinkattn::CacheType::kDouble, "fp64", 0x1p-53};
template <>
constexpr Type kType<sinkattn::Half>{sinkattn::CacheType::kHalf, "fp16", 0x1p-11};
template <>
constexpr Type kType<sinkattn::BFloat16>{sinkattn::CacheType::kBFloat16, "bf16", 0x1p-8};

// Type of accumulation.
template <typename scalar_t>
using Acc = typename sinkattn::Accumulate<scalar_t>::type;

template <typename scalar_t>
scalar_t round_to(double x) {
  return static_cast<scalar_t>(static_cast<Acc<scalar_t>>(x));
}

template <typename scalar_t>
double to_double(scalar_t x) {
  return static_cast<double>(static_cast<Acc<scalar_t>>(x));
}

enum Option {
  kInterleaved = 1,
  kSoftcap = 2,
  kAlibi = 4,
  kSinkLogits = 8,
  kGaps = 16,           // inputs with permuted strides, and NaN between all elements
  kNonFinite = 32,      // some inputs are NaN or infinite
  kAllBitPatterns = 64  // values run through all bit patterns of a 16-bit type, or all numbers of the ring's 8 bits
};

using Call = std::vector<int64_t>;  // new tokens of each row, or one number for all rows

struct Case {
  const char* name;
  sinkattn::RingLayout layout;
  int64_t heads, kv_heads, head_dim, value_dim, pairs;
  std::vector<int64_t> seen;  // of each row, before the first call
  std::vector<Call> calls;
  int options = 0;
  std::vector<int64_t> rows = {};       // cache row of each row, in a cache of one row more; empty: the same row
  std::vector<int64_t> row_sinks = {};  // of each row; empty: those of the layout
  std::vector<Call> begins = {};        // of each row, in each call; empty: 0
  sinkattn::RingType ring = sinkattn::RingType::kWhole;

  bool is_eight_bit() const { return ring != sinkattn::RingType::kWhole; }
  bool has(Option option) const { return options & option; }
  int64_t batch() const { return static_cast<int64_t>(seen.size()); }
  int64_t cache_rows() const { return batch() + !rows.empty(); }
  int64_t cache_row(int64_t row) const { return rows.empty() ? row : rows[row]; }
  sinkattn::RingLayout layout_of(int64_t row, int64_t call) const {
    return layout.of_row(
        row_sinks.empty() ? layout.num_sinks : row_sinks[row], begins.empty() ? 0 : begins[call][row]);
  }
  double scale() const { return 3.7 / std::sqrt(head_dim); }  // gives scores of about 1
  double softcap() const { return has(kSoftcap) ? 1.5 : 0; }
};

// Pseudorandom number in [-1, 1), uniform, a function of the arguments.
inline double uniform(std::initializer_list<int64_t> arguments) {
  uint64_t x = 0;
  for (const int64_t argument : arguments) {
    x = (x ^ static_cast<uint64_t>(argument)) * 0x9e3779b97f4a7c15u + 1;
    x ^= x >> 29;
  }
  return static_cast<double>((x * 0xbf58476d1ce4e5b9u) >> 11) * 0x1p-52 - 1;
}

inline double sink_logit(int64_t head) { return head % 3 == 1 ? -kInfinity : 1 + uniform({head}); }
inline double alibi_slope(int64_t head) { return 0.4 * std::pow(0.25, head); }

// Rounded to so few bits that position * frequency is exact at all positions tested.
inline double frequency(int64_t pair, int64_t pairs) {
  return std::round(std::pow(1e4, -static_cast<double>(pair) / pairs) * 0x1p16) * 0x1p-16;
}

// Cosines and sines of all pairs at a position.
struct RotaryTable {
  std::vector<double> cos, sin;
};

enum Kind { kQuery, kKey, kValue };

// A deliberate error: tokens added to the window, positions added to the sinks, tokens not rounded to 8 bits.
struct Defect {
  int64_t window, sinks;
  bool whole;
};

// Expected output of a call, in the layout of AttentionCall::out, and the tolerance of each element.
struct Expected {
  std::vector<double> out, tolerance;
};

// Queries, keys and values of the streams of a case, rounded to the type of the cache, and attention over them.
template <typename scalar_t>
class ReferenceStreams {
 public:
  explicit ReferenceStreams(const Case& c) : c_(c), end_(c.seen) {
    for (const Call& call : c.calls) {
      for (int64_t row = 0; row < c.batch(); ++row) end_[row] += call.size() == 1 ? call[0] : call[row];
    }
    for (int64_t row = 0; row < c.batch(); ++row) {
      // Keeps one token more than the first query sees, for the defect of a window that is too long.
      skipped_.push_back(std::max<int64_t>(0, c.seen[row] - c.layout.window - c.layout.num_sinks));
      for (const Kind kind : {kQuery, kKey, kValue}) {
        std::vector<double> elements;
        elements.reserve((end_[row] - skipped_[row]) * heads(kind) * dim(kind));
        for (int64_t i = 0; i < end_[row] - skipped_[row]; ++i) {
          const int64_t token = i < c.layout.num_sinks ? i : i + skipped_[row];
          for (int64_t head = 0; head < heads(kind); ++head) {
            for (int64_t d = 0; d < dim(kind); ++d) elements.push_back(element(kind, row, head, token, d));
          }
        }
        elements_.push_back(std::move(elements));
      }
    }
  }

  int64_t heads(Kind kind) const { return kind == kQuery ? c_.heads : c_.kv_heads; }
  int64_t dim(Kind kind) const { return kind == kValue ? c_.value_dim : c_.head_dim; }

  // Tokens seen by each row after all calls.
  const std::vector<int64_t>& end() const { return end_; }

  // The vector of one head of one token, before rotation.
  const double* at(Kind kind, int64_t row, int64_t head, int64_t token) const {
    const int64_t i = token < c_.layout.num_sinks ? token : token - skipped_[row];
    return &elements_[3 * row + kind][(i * heads(kind) + head) * dim(kind)];
  }

  const RotaryTable& rotary_table(int64_t position) {
    RotaryTable& table = rotary_tables_[position];
    for (int64_t i = static_cast<int64_t>(table.cos.size()); i < c_.pairs; ++i) {
      const double angle = static_cast<double>(position) * frequency(i, c_.pairs);
      table.cos.push_back(std::cos(angle));
      table.sin.push_back(std::sin(angle));
    }
    return table;
  }

  void rotate(double* out, const double* in, int64_t position) {
    std::copy(in, in + c_.head_dim, out);
    const RotaryTable& table = rotary_table(position);
    for (int64_t i = 0; i < c_.pairs; ++i) {
      const int64_t a = c_.has(kInterleaved) ? 2 * i : i, b = c_.has(kInterleaved) ? a + 1 : i + c_.pairs;
      out[a] = in[a] * table.cos[i] - in[b] * table.sin[i];
      out[b] = in[a] * table.sin[i] + in[b] * table.cos[i];
    }
  }

  // A new key or value as the ring holds it; keys are rotated in the kernel's way before.
  const Held& held(Kind kind, int64_t row, int64_t head, int64_t token) {
    const auto [entry, is_new] = held_.try_emplace({kind, row, head, token});
    if (!is_new) return entry->second;
    std::vector<scalar_t> x;
    for (int64_t d = 0; d < dim(kind); ++d) x.push_back(round_to<scalar_t>(at(kind, row, head, token)[d]));
    if (kind == kKey) {
      std::vector<Acc<scalar_t>> cos, sin;
      for (const double c : rotary_table(token).cos) cos.push_back(static_cast<Acc<scalar_t>>(c));
      for (const double s : rotary_table(token).sin) sin.push_back(static_cast<Acc<scalar_t>>(s));
      const std::vector<scalar_t> in = x;
      sinkattn::rotate_vector<scalar_t>(
          x.data(), in.data(), 1, c_.head_dim, c_.pairs, cos.data(), sin.data(), 1, c_.has(kInterleaved));
    }
    std::vector<float> rounded;
    for (const scalar_t element : x) rounded.push_back(static_cast<float>(element));
    return entry->second = hold(c_.ring, rounded, kind == kKey);
  }

  // Expected output of a call of `tokens` tokens after `seen`; each row has `lengths` new tokens, the rest is padding.
  Expected attend(
      int64_t call, const std::vector<int64_t>& seen, const std::vector<int64_t>& lengths, int64_t tokens,
      const Defect& defect = {0, 0, false}) {
    Expected expected;
    expected.out.resize(c_.batch() * tokens * c_.heads * c_.value_dim);  // zeros, exact for padding
    expected.tolerance.resize(expected.out.size());
    for (int64_t row = 0; row < c_.batch(); ++row) {
      for (int64_t i = 0; i < lengths[row]; ++i) {
        const int64_t at = (row * tokens + i) * c_.heads * c_.value_dim;
        attend_token(&expected.out[at], &expected.tolerance[at], row, c_.layout_of(row, call), seen[row] + i, defect);
      }
    }
    return expected;
  }

 private:
  double element(Kind kind, int64_t row, int64_t head, int64_t token, int64_t d) const {
    const int64_t since = token - c_.seen[row];
    if (c_.has(kNonFinite)) {
      if (kind == kValue && since == 9) return -kInfinity;
      if (since == (kind == kValue ? 5 : kind == kQuery ? 13 : 30)) return kNaN;
    }
    if (c_.has(kAllBitPatterns) && kind == kValue && c_.is_eight_bit()) {
      const int magnitude = std::min<int>(d % 128, largest_code(c_.ring));
      return (d < 128 ? 1 : -1) * magnitude_of_code(c_.ring, magnitude);
    }
    if constexpr (sizeof(scalar_t) == 2) {
      if (c_.has(kAllBitPatterns) && kind == kValue) {
        scalar_t x;
        x.bits = static_cast<uint16_t>((token * c_.kv_heads + head) * c_.value_dim + d);
        return to_double(x);
      }
    }
    return to_double(round_to<scalar_t>(uniform({kind, row, head, token, d})));
  }

  // All heads of one token.
  void attend_token(
      double* out, double* tolerance, int64_t row, const sinkattn::RingLayout& layout, int64_t token,
      const Defect& defect) {
    const int64_t sinks = layout.num_sinks, window = layout.window + defect.window;
    std::vector<int64_t> visible;
    for (int64_t u = 0; u < std::min(sinks, token + 1); ++u) visible.push_back(u);
    for (int64_t u = std::max({sinks, token - window + 1, layout.begin}); u <= token; ++u) visible.push_back(u);
    const int64_t count = static_cast<int64_t>(visible.size()), group = c_.heads / c_.kv_heads;
    const auto position = [&](int64_t rank) { return rank + (visible[rank] < sinks ? defect.sinks : 0); };
    const auto is_held = [&](int64_t rank) { return c_.is_eight_bit() && !defect.whole && visible[rank] >= sinks; };
    std::vector<double> keys(count * c_.head_dim), query(c_.head_dim), late_query(c_.head_dim), weights(count);
    for (int64_t head = 0; head < c_.heads; ++head, out += c_.value_dim, tolerance += c_.value_dim) {
      for (int64_t j = 0; j < count && head % group == 0; ++j) {
        double* key = &keys[j * c_.head_dim];
        if (is_held(j)) {
          const Held& now = held(kKey, row, head / group, visible[j]);
          std::copy(now.values.begin(), now.values.end(), key);
        } else {
          rotate(key, at(kKey, row, head / group, visible[j]), position(j));
        }
      }
      rotate(query.data(), at(kQuery, row, head, token), count - 1);
      if (c_.is_eight_bit()) rotate(late_query.data(), at(kQuery, row, head, token), token);
      double top = c_.has(kSinkLogits) ? sink_logit(head) : -kInfinity;
      for (int64_t j = 0; j < count; ++j) {
        const double *q = is_held(j) ? late_query.data() : query.data(), *key = &keys[j * c_.head_dim];
        double score = 0;
        for (int64_t d = 0; d < c_.head_dim; ++d) score += q[d] * key[d];
        score *= c_.scale();
        if (c_.has(kSoftcap)) score = c_.softcap() * std::tanh(score / c_.softcap());
        if (c_.has(kAlibi)) score -= alibi_slope(head) * static_cast<double>(count - 1 - position(j));
        weights[j] = score;
        top = std::max(top, score);
      }
      double total = c_.has(kSinkLogits) ? std::exp(sink_logit(head) - top) : 0, squares = 0;
      for (double& weight : weights) {
        weight = std::exp(weight - top);
        total += weight;
        squares += weight * weight;
      }
      for (int64_t j = 0; j < count; ++j) {
        const double* value = at(kValue, row, head / group, visible[j]);
        if (is_held(j)) value = held(kValue, row, head / group, visible[j]).values.data();
        const double weight = weights[j] / total;
        for (int64_t d = 0; d < c_.value_dim; ++d) out[d] += weight * value[d];
      }
      for (int64_t d = 0; d < c_.value_dim; ++d) {
        // The output is rounded once. Every key was rounded, which changes its score, and so its weight, by about half
        // a rounding, independently of the others: hence the root of the sum of squares, times five as a margin. Sums
        // of some hundred numbers of size 1 add a few roundings in the type of accumulation. If only one key is
        // visible, its value is the exact output.
        tolerance[d] = kType<scalar_t>.rounding * (std::abs(out[d]) + 2.5 * std::sqrt(squares) / total) +
                       32 * kType<Acc<scalar_t>>.rounding;
        const bool exact = !is_held(0) || c_.has(kAllBitPatterns);  // whose scale is 1
        if (count == 1 && exact && !c_.has(kSinkLogits)) tolerance[d] = 0;
      }
    }
  }

  const Case& c_;
  std::vector<int64_t> end_, skipped_;         // skipped: tokens between sinks and window that no query sees
  std::vector<std::vector<double>> elements_;  // [row, kind][token, head, element]
  std::map<int64_t, RotaryTable> rotary_tables_;
  std::map<std::array<int64_t, 4>, Held> held_;  // by kind, row, head, token
};

}  // namespace reference
