// Order in which rows can be copied so that row[i] = old row[source[i]] holds in place. No torch.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace sinkattn {

// One copy of a row; kSpareRow stands for one row of spare memory.
struct RowMove {
  int64_t to;
  int64_t from;
};
constexpr int64_t kSpareRow = -1;

// A row is overwritten only when no other row still waits for its old content; what is left then are cycles, and
// each is opened by saving one row. Copies nothing for a row that stays. Needs 0 <= source[i] < count.
inline std::vector<RowMove> plan_row_moves(const int64_t* source, int64_t count) {
  std::vector<int64_t> readers(count, 0);
  std::vector<bool> done(count, false);
  for (int64_t row = 0; row < count; ++row) {
    if (source[row] == row) {
      done[row] = true;
    } else {
      ++readers[source[row]];
    }
  }
  std::vector<RowMove> moves;
  const auto follow = [&](int64_t row) {
    while (!done[row] && readers[row] == 0) {
      moves.push_back({row, source[row]});
      done[row] = true;
      row = source[row];
      --readers[row];
    }
  };
  for (int64_t row = 0; row < count; ++row) follow(row);
  for (int64_t row = 0; row < count; ++row) {
    if (done[row]) continue;
    moves.push_back({kSpareRow, row});
    int64_t to = row;
    for (; source[to] != row; to = source[to]) {
      moves.push_back({to, source[to]});
      done[to] = true;
    }
    moves.push_back({to, kSpareRow});
    done[to] = true;
  }
  return moves;
}

}  // namespace sinkattn
