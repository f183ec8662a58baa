// Tests the gradients of the CPU attention kernel, on every instruction set that this processor has, against plain
// loops in fp64. All memory that must not be read holds NaN, and every buffer ends with its last element, so that the address
// sanitizer detects accesses beyond it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "attention_reference.h"
#include "instruction_sets.h"
#include "testing.h"
#include "thread_workers.h"

using namespace reference;
using sinkattn::AttentionCall;
using sinkattn::AttentionGradients;
using sinkattn::StridedView;

namespace {

struct BackwardCase {
  const char* name;
  sinkattn::RingLayout layout;
  int64_t heads, kv_heads, head_dim, value_dim, pairs, tokens, groups;
  std::vector<int64_t> seen, lengths;
  int options = 0;

  bool has(Option option) const { return options & option; }
};

// [n0, n1, n2, n3], contiguous, of one type; elements are functions of their index.
template <typename T>
struct Array {
  int64_t sizes[4];
  std::vector<T> data;

  Array(int64_t n0, int64_t n1, int64_t n2, int64_t n3, double fill = kNaN)
      : sizes{n0, n1, n2, n3}, data(n0 * n1 * n2 * n3, round_to<T>(fill)) {}

  T& at(int64_t i, int64_t j, int64_t k, int64_t l) {
    return data[((i * sizes[1] + j) * sizes[2] + k) * sizes[3] + l];
  }
  double get(int64_t i, int64_t j, int64_t k, int64_t l) { return to_double(at(i, j, k, l)); }
  StridedView view() const {
    return {data.data(), {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1}};
  }
};

template <typename scalar_t>
class Test {
  using acc_t = Acc<scalar_t>;
  using Vectors = std::vector<double>;

 public:
  explicit Test(const BackwardCase& c)
      : c_(c),
        batch_(static_cast<int64_t>(c.seen.size())),
        past_(*std::max_element(c.seen.begin(), c.seen.end()) > 0 ? c.layout.num_sinks + c.layout.window : 0),
        query_(batch_, c.heads, c.tokens, c.head_dim),
        key_(batch_, c.kv_heads, c.tokens, c.head_dim),
        value_(batch_, c.kv_heads, c.tokens, c.value_dim),
        gradient_(batch_, c.heads, c.tokens, c.value_dim),
        out_(batch_, c.heads, c.tokens, c.value_dim),
        past_keys_(batch_, c.kv_heads, past_, c.head_dim),
        past_values_(batch_, c.kv_heads, past_, c.value_dim),
        cos_(2, batch_, c.tokens, c.pairs),
        sin_(2, batch_, c.tokens, c.pairs) {
    for (int64_t row = 0; row < batch_; ++row) fill(row);
  }

  void run() {
    for (int64_t row = 0; row < batch_; ++row) expect(row, 0);
    for (int set = 0; set < sinkattn::kNumInstructionSets; ++set) {
      if (!sinkattn::kInstructionSets[set].available()) continue;
      current_case = std::string(c_.name) + ", " + kType<scalar_t>.name + ", " + sinkattn::kInstructionSets[set].name;
      const Results one = gradients(set, 1), four = gradients(set, 4);
      for (int n = 0; n < 4; ++n) CHECK(error(n, one) <= 1);
      CHECK(same(one, four));
    }
    // The tolerance must reveal a window that is one token too long.
    if (std::is_same_v<scalar_t, float> && c_.tokens > 2) {
      for (int64_t row = 0; row < batch_; ++row) expect(row, 1);
      const Results got = gradients(sinkattn::kNumInstructionSets - 1, 1);
      bool longer = false;
      for (int64_t row = 0; row < batch_; ++row) {
        longer |= c_.seen[row] + c_.lengths[row] > c_.layout.num_sinks + c_.layout.window;
      }
      if (longer) CHECK(std::max(error(0, got), error(2, got)) > 10);
    }
  }

 private:
  struct Results {
    Array<scalar_t> dquery, dkey, dvalue;
    std::vector<acc_t> dlogits;
  };

  double scale() const { return 3.7 / std::sqrt(c_.head_dim); }
  double softcap() const { return c_.has(kSoftcap) ? 1.5 : 0; }

  void fill(int64_t row) {
    const auto random = [&](Array<scalar_t>& array, int64_t kind, int64_t count) {
      for (int64_t j = 0; j < array.sizes[1]; ++j) {
        for (int64_t k = 0; k < count; ++k) {
          for (int64_t l = 0; l < array.sizes[3]; ++l) {
            array.at(row, j, k, l) = round_to<scalar_t>(uniform({kind, row, j, k, l}));
          }
        }
      }
    };
    random(query_, 0, c_.lengths[row]);
    random(key_, 1, c_.lengths[row]);
    random(value_, 2, c_.lengths[row]);
    random(gradient_, 3, c_.lengths[row]);
    random(past_keys_, 4, std::min(past_, c_.seen[row]));
    random(past_values_, 5, std::min(past_, c_.seen[row]));
    for (int64_t i = 0; i < c_.lengths[row]; ++i) {
      for (int64_t table = 0; table < 2; ++table) {
        const int64_t token = c_.seen[row] + i, position = table ? c_.layout.position(token) : token;
        for (int64_t pair = 0; pair < c_.pairs; ++pair) {
          const double angle = static_cast<double>(position) * frequency(pair, c_.pairs);
          cos_.at(table, row, i, pair) = static_cast<acc_t>(std::cos(angle));
          sin_.at(table, row, i, pair) = static_cast<acc_t>(std::sin(angle));
        }
      }
    }
  }

  Vectors rotated(const Vectors& x, int64_t table, int64_t row, int64_t i, double sign) {
    Vectors out = x;
    for (int64_t pair = 0; pair < c_.pairs; ++pair) {
      const int64_t a = c_.has(kInterleaved) ? 2 * pair : pair, b = c_.has(kInterleaved) ? a + 1 : pair + c_.pairs;
      const double cos = cos_.get(table, row, i, pair), sin = sign * sin_.get(table, row, i, pair);
      out[a] = x[a] * cos - x[b] * sin;
      out[b] = x[a] * sin + x[b] * cos;
    }
    return out;
  }

  Vectors vector(Array<scalar_t>& array, int64_t row, int64_t head, int64_t i) {
    Vectors out;
    for (int64_t d = 0; d < array.sizes[3]; ++d) out.push_back(array.get(row, head, i, d));
    return out;
  }

  // Expected gradients of a row: by query, key, value of [token][head][element], then sink logits. A window that is
  // `longer` is a defect.
  void expect(int64_t row, int64_t longer) {
    const int64_t sizes[] = {c_.heads * c_.head_dim, c_.kv_heads * c_.head_dim, c_.kv_heads * c_.value_dim};
    if (row == 0) {
      expected_.clear();
      for (const int64_t size : sizes) expected_.emplace_back(batch_ * c_.tokens * size, 0.0);
      expected_.emplace_back(c_.heads, 0.0);
    }
    const int64_t sinks = c_.layout.num_sinks, window = c_.layout.window + longer, seen = c_.seen[row];
    const int64_t oldest = std::max(seen - c_.layout.window, sinks), group = c_.heads / c_.kv_heads;
    std::map<std::pair<int64_t, int64_t>, std::pair<Vectors, Vectors>> tokens;  // key and value, by KV head and token
    const auto token = [&](int64_t kv, int64_t u) -> const std::pair<Vectors, Vectors>& {
      std::pair<Vectors, Vectors>& found = tokens[{kv, u}];
      auto& [key, value] = found;
      if (key.empty() && u >= seen) {
        key = rotated(vector(key_, row, kv, u - seen), 0, row, u - seen, 1);
        for (double& x : key) x = to_double(round_to<scalar_t>(x));
        value = vector(value_, row, kv, u - seen);
      } else if (key.empty()) {
        const int64_t index = u < sinks ? u : sinks + u - oldest;
        key = vector(past_keys_, row, kv, index);
        value = vector(past_values_, row, kv, index);
      }
      return found;
    };
    for (int64_t i = 0; i < c_.lengths[row]; ++i) {
      const int64_t t = seen + i;
      std::vector<int64_t> visible;
      for (int64_t u = 0; u < std::min(sinks, t + 1); ++u) visible.push_back(u);
      for (int64_t u = std::max({sinks, t - window + 1, oldest}); u <= t; ++u) visible.push_back(u);
      for (int64_t head = 0; head < c_.heads; ++head) {
        const int64_t kv = head / group;
        const Vectors raw = vector(query_, row, head, i), g = vector(gradient_, row, head, i);
        const Vectors queries[2] = {rotated(raw, 0, row, i, 1), rotated(raw, 1, row, i, 1)};
        std::vector<const double*> keys, values;
        Vectors weights, slopes;
        double top = c_.has(kSinkLogits) ? sink_logit(head) : -kInfinity;
        for (const int64_t u : visible) {
          const auto& [key, value] = token(kv, u);
          keys.push_back(key.data());
          values.push_back(value.data());
          double score = 0;
          for (int64_t d = 0; d < c_.head_dim; ++d) score += queries[u < sinks][d] * keys.back()[d];
          score *= scale();
          slopes.push_back(1);
          if (softcap() != 0) {
            const double capped = std::tanh(score / softcap());
            slopes.back() = 1 - capped * capped;
            score = softcap() * capped;
          }
          const int64_t at = u < sinks ? c_.layout.position(t) : t;
          if (c_.has(kAlibi)) score -= alibi_slope(head) * static_cast<double>(at - u);
          weights.push_back(score);
          top = std::max(top, score);
        }
        double total = c_.has(kSinkLogits) ? std::exp(sink_logit(head) - top) : 0, delta = 0;
        const double extra = total;
        for (double& x : weights) total += x = std::exp(x - top);
        for (int64_t e = 0; e < c_.value_dim; ++e) {
          double out = 0;
          for (size_t j = 0; j < visible.size(); ++j) out += weights[j] / total * values[j][e];
          if (!longer) out_.at(row, head, i, e) = round_to<scalar_t>(out);
          delta += g[e] * out_.get(row, head, i, e);
        }
        expected_[3][head] -= extra / total * delta;
        Vectors dqueries[2] = {Vectors(c_.head_dim), Vectors(c_.head_dim)};
        for (size_t j = 0; j < visible.size(); ++j) {
          const int64_t u = visible[j], weight_token = row * c_.tokens + u - seen;
          const double weight = weights[j] / total;
          double dscore = -delta;
          for (int64_t e = 0; e < c_.value_dim; ++e) dscore += g[e] * values[j][e];
          dscore *= weight * slopes[j] * scale();
          for (int64_t d = 0; d < c_.head_dim; ++d) dqueries[u < sinks][d] += dscore * keys[j][d];
          if (u < seen) continue;
          Vectors dkey;
          for (int64_t d = 0; d < c_.head_dim; ++d) dkey.push_back(dscore * queries[u < sinks][d]);
          dkey = rotated(dkey, 0, row, u - seen, -1);
          double* keys_at = &expected_[1][(weight_token * c_.kv_heads + kv) * c_.head_dim];
          double* values_at = &expected_[2][(weight_token * c_.kv_heads + kv) * c_.value_dim];
          for (int64_t d = 0; d < c_.head_dim; ++d) keys_at[d] += dkey[d];
          for (int64_t e = 0; e < c_.value_dim; ++e) values_at[e] += weight * g[e];
        }
        const Vectors of_window = rotated(dqueries[0], 0, row, i, -1), of_sinks = rotated(dqueries[1], 1, row, i, -1);
        double* to = &expected_[0][((row * c_.tokens + i) * c_.heads + head) * c_.head_dim];
        for (int64_t d = 0; d < c_.head_dim; ++d) to[d] = of_window[d] + of_sinks[d];
      }
    }
  }

  Results gradients(int set, int64_t workers) {
    Results got{
        {batch_, c_.tokens, c_.heads, c_.head_dim},
        {batch_, c_.tokens, c_.kv_heads, c_.head_dim},
        {batch_, c_.tokens, c_.kv_heads, c_.value_dim},
        std::vector<acc_t>(c_.heads, static_cast<acc_t>(kNaN))};
    std::vector<acc_t> logits, slopes;
    for (int64_t head = 0; head < c_.heads; ++head) {
      logits.push_back(static_cast<acc_t>(sink_logit(head)));
      slopes.push_back(static_cast<acc_t>(alibi_slope(head)));
    }
    AttentionGradients call{};
    AttentionCall& forward = call.forward;
    forward = {kType<scalar_t>.type, c_.layout, batch_, c_.heads, c_.kv_heads, c_.tokens, c_.head_dim, c_.value_dim,
               past_keys_.data.data(), past_values_.data.data(), query_.view(), key_.view(), value_.view(),
               c_.seen.data(), c_.lengths.data(), cos_.view(), sin_.view(), c_.pairs, c_.has(kInterleaved), scale(),
               softcap(), c_.has(kSinkLogits) ? logits.data() : nullptr, c_.has(kAlibi) ? slopes.data() : nullptr,
               nullptr};
    Array<scalar_t> new_keys(batch_, c_.kv_heads, c_.tokens, c_.head_dim);
    Array<scalar_t> new_values(batch_, c_.kv_heads, c_.tokens, c_.value_dim);
    call.past = past_;
    call.out = out_.view();
    call.gradient = gradient_.view();
    call.groups = c_.groups;
    const int64_t width = call.padded(c_.head_dim) + call.padded(c_.value_dim);
    Array<acc_t> sums(batch_ * c_.kv_heads, c_.groups, call.sum_rows(), width);
    call.dquery = got.dquery.data.data();
    call.dkey = got.dkey.data.data();
    call.dvalue = got.dvalue.data.data();
    call.dsink_logits = c_.has(kSinkLogits) ? got.dlogits.data() : nullptr;
    call.new_keys = new_keys.data.data();
    call.new_values = new_values.data.data();
    call.sums = sums.data.data();
    ThreadWorkers threads(workers);
    sinkattn::kInstructionSets[set].differentiate(call, threads);
    return got;
  }

  // Largest error of one of the four gradients in units of the tolerance; infinite for NaN.
  double error(int which, const Results& got) {
    if (which == 3 && !c_.has(kSinkLogits)) return 0;
    std::vector<double> values;
    if (which == 3) {
      for (const acc_t x : got.dlogits) values.push_back(static_cast<double>(x));
    } else {
      const Array<scalar_t>& array = which == 0 ? got.dquery : which == 1 ? got.dkey : got.dvalue;
      for (const scalar_t x : array.data) values.push_back(to_double(x));
    }
    double largest = 0, worst = 0;
    for (const double x : expected_[which]) largest = std::max(largest, std::abs(x));
    // Sums of products of about this size, in the type of accumulation; the result is rounded once.
    for (size_t i = 0; i < values.size(); ++i) {
      const double want = expected_[which][i];
      const double tolerance = 300 * kType<acc_t>.rounding * largest + 1.01 * kType<scalar_t>.rounding * std::abs(want);
      const double off = std::abs(values[i] - want) / tolerance;
      if (want == values[i]) continue;
      worst = std::isnan(off) ? kInfinity : std::max(worst, off);
    }
    return worst;
  }

  static bool same(const Results& a, const Results& b) {
    const auto equal = [](const auto& x, const auto& y) {
      return std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0;
    };
    return equal(a.dquery.data, b.dquery.data) && equal(a.dkey.data, b.dkey.data) &&
           equal(a.dvalue.data, b.dvalue.data) && equal(a.dlogits, b.dlogits);
  }

  const BackwardCase& c_;
  const int64_t batch_, past_;
  Array<scalar_t> query_, key_, value_, gradient_, out_, past_keys_, past_values_;
  Array<acc_t> cos_, sin_;
  std::vector<Vectors> expected_;
};

}  // namespace

int main() {
  const int64_t late = 1000000;
  const std::vector<BackwardCase> cases{
      // name, layout, heads, kv_heads, head_dim, value_dim, pairs, tokens, groups, seen, lengths, options
      {"a new stream", {4, 12, 0}, 4, 2, 16, 16, 8, 30, 1, {0}, {30}},
      {"one token", {2, 5, 0}, 2, 1, 8, 8, 4, 1, 1, {0, 9}, {1, 1}},
      {"ragged rows", {4, 9, 0}, 6, 2, 40, 24, 10, 25, 3, {0, 3, 4, 13, late}, {25, 7, 0, 20, 25}, kInterleaved},
      {"no sinks, odd sizes", {0, 21, 0}, 3, 1, 7, 5, 3, 100, 2, {50}, {100}, kSinkLogits},
      {"sinks of several blocks", {150, 30, 0}, 2, 2, 8, 8, 4, 200, 4, {0, 70, late}, {200, 200, 200}, kAlibi},
      {"blocks of queries and keys", {3, 150, 0}, 10, 1, 24, 48, 12, 140, 2, {400}, {140}, kSoftcap},
      {"all options", {4, 60, 0}, 6, 2, 16, 16, 0, 90, 2, {0, late}, {90, 33}, kSoftcap | kAlibi | kSinkLogits},
  };
  for (const BackwardCase& c : cases) {
    Test<float>(c).run();
    Test<double>(c).run();
    Test<sinkattn::Half>(c).run();
    Test<sinkattn::BFloat16>(c).run();
  }
  CHECK(ThreadWorkers::max_used == 4);
  std::puts("ok");
}
