// Tests ring.h and row_moves.h against plain arrays, token by token, on every small layout.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "ring.h"
#include "row_moves.h"
#include "testing.h"

using sinkattn::RingLayout;
using sinkattn::Run;

namespace {

constexpr int64_t kEmpty = -1;

// Reference implementation: the token in each slot, and a cursor that moves around the ring.
struct Replay {
  int64_t num_sinks, ring_slot;
  std::vector<int64_t> occupant;
  int64_t next_token = 0;
  int64_t cursor = 0;

  explicit Replay(const RingLayout& layout)
      : num_sinks(layout.num_sinks), ring_slot(num_sinks + layout.unused), occupant(layout.slots(), kEmpty) {}

  // A stream that has filled its ring `wraps` times: every slot holds a token, the cursor is at the start of the ring.
  Replay(const RingLayout& layout, int64_t wraps) : Replay(layout) {
    const int64_t ring = layout.ring();
    next_token = num_sinks + wraps * ring;
    for (int64_t s = 0; s < num_sinks; ++s) occupant[s] = s;
    for (int64_t r = 0; r < ring; ++r) occupant[ring_slot + r] = next_token - ring + r;
  }

  // Writes the next token and returns its slot.
  int64_t write() {
    int64_t slot = next_token;
    if (next_token >= num_sinks) {
      slot = ring_slot + cursor;
      ++cursor;
      if (slot + 1 == static_cast<int64_t>(occupant.size())) cursor = 0;
    }
    occupant[slot] = next_token++;
    return slot;
  }
};

void check_tokens(const RingLayout& layout, Replay replay, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = replay.next_token;
    const int64_t slot = replay.write();
    CHECK(layout.slot(token) == slot);

    int64_t visible = 0, window_begin = token + 1;
    for (int64_t s = 0; s < layout.slots(); ++s) {
      const int64_t held = replay.occupant[s];
      const bool in_window = held >= layout.begin && token - held < layout.window;
      const bool sees = held != kEmpty && (held < layout.num_sinks || in_window);
      CHECK(layout.visible(token, s) == sees);
      if (sees) ++visible;
      if (held >= layout.num_sinks) {
        CHECK(layout.age(token, s) == token - held);
        if (sees && held < window_begin) window_begin = held;
      }
    }
    CHECK(layout.window_begin(token) == window_begin);
    CHECK(layout.position(token) == visible - 1);
  }
}

void check_write_runs(const RingLayout& layout, const Replay& before, int64_t count) {
  Replay after = before;
  for (int64_t i = 0; i < count; ++i) after.write();

  Run runs[RingLayout::kMaxRuns];
  const int n = layout.write_runs(before.next_token, count, runs);
  CHECK(n >= 0 && n <= RingLayout::kMaxRuns);
  std::vector<int64_t> occupant = before.occupant;
  std::vector<bool> written(layout.slots(), false);
  int64_t writes = 0;
  for (int r = 0; r < n; ++r) {
    CHECK(runs[r].count > 0);
    for (int64_t i = 0; i < runs[r].count; ++i) {
      const int64_t slot = runs[r].slot + i, token = runs[r].token + i;
      CHECK(slot >= 0 && slot < layout.slots());
      CHECK(token >= 0 && token < count);
      CHECK(!written[slot]);
      written[slot] = true;
      CHECK(layout.written_token(before.next_token, count, writes++) == token);
      occupant[slot] = before.next_token + token;
    }
  }
  CHECK(occupant == after.occupant);
  for (int64_t i = writes; i < layout.slots() + 2; ++i) {
    CHECK(layout.written_token(before.next_token, count, i) == count);
  }
}

void check_layout(const RingLayout& layout) {
  CHECK(layout.ring() == layout.window + layout.headroom);
  CHECK(layout.slots() == layout.num_sinks + layout.unused + layout.ring());
  const int64_t span = 2 * layout.slots() + 3;

  std::vector<Replay> starts{Replay(layout)};
  for (const int64_t seen : {int64_t{1000000000}, int64_t{1000000000000}, int64_t{1} << 31, int64_t{1} << 40}) {
    starts.push_back(Replay(layout, seen / layout.ring() - 1));
  }
  for (Replay& start : starts) {
    check_tokens(layout, start, span);
    for (int64_t back = 0; back <= 2; ++back) {
      const RingLayout evicted = layout.of_row(layout.num_sinks, std::max<int64_t>(0, start.next_token - back));
      check_tokens(evicted, start, span);
    }
    for (int64_t seen = 0; seen < span; ++seen) {
      for (int64_t count = 0; count < span; ++count) check_write_runs(layout, start, count);
      start.write();
    }
  }
}

// Rows whose entry of `source` is out of range stay.
void check_row_moves(const std::vector<int64_t>& source) {
  const int64_t count = static_cast<int64_t>(source.size());
  std::vector<int64_t> rows(count), num_readers(count, 12345);
  for (int64_t i = 0; i < count; ++i) rows[i] = 100 + i;
  const std::vector<int64_t> before = rows;
  std::vector<sinkattn::RowMove> moves(sinkattn::max_row_moves(count));
  moves.resize(sinkattn::plan_row_moves(source.data(), count, num_readers.data(), moves.data()));
  int64_t spare = 0, saves = 0, copies = 0;
  for (const sinkattn::RowMove& move : moves) {
    CHECK(move.to != move.from);
    const int64_t content = move.from == sinkattn::kSpareRow ? spare : rows[move.from];
    if (move.from != sinkattn::kSpareRow) CHECK(content == before[move.from]);
    if (move.to == sinkattn::kSpareRow) {
      spare = content;
      ++saves;
    } else {
      rows[move.to] = content;
      ++copies;
    }
  }
  int64_t changed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = source[i] >= 0 && source[i] < count ? source[i] : i;
    CHECK(rows[i] == before[from]);
    if (from != i) ++changed;
  }
  CHECK(copies == changed);
  CHECK(2 * saves <= changed);
}

}  // namespace

int main() {
  for (int64_t num_sinks = 0; num_sinks <= 3; ++num_sinks) {
    for (int64_t window = 1; window <= 4; ++window) {
      for (int64_t headroom = 0; headroom <= 3; ++headroom) {
        const RingLayout layout{num_sinks, window, headroom};
        check_layout(layout);
        if (num_sinks > 1) check_layout(layout.of_row(num_sinks - 2, 0));
      }
    }
  }
  for (int64_t count = 0; count <= 5; ++count) {
    int64_t maps = 1;
    for (int64_t i = 0; i < count; ++i) maps *= count + 2;
    for (int64_t map = 0; map < maps; ++map) {
      std::vector<int64_t> source;
      for (int64_t i = 0, rest = map; i < count; ++i, rest /= count + 2) source.push_back(rest % (count + 2) - 1);
      check_row_moves(source);
    }
  }
  std::puts("ok");
}
