// Order in which rows can be copied so that row[i] = old row[source[i]] holds in place. No torch, no allocation; usable
// on host and device.
#pragma once

#include <cstdint>

#include "ring.h"

namespace sinkattn {

// One copy of a row; kSpareRow stands for one row of spare memory. A device loads it in one access.
struct alignas(16) RowMove {
  int64_t to;
  int64_t from;
};
constexpr int64_t kSpareRow = -1;

// Moves of `count` rows: one for each row, and one more for each cycle, which has two rows or more.
SINKATTN_HOST_DEVICE constexpr int64_t max_row_moves(int64_t count) { return count + count / 2; }

// Fills `moves`, which has room for max_row_moves(count), and returns how many there are; `readers` is working memory
// for `count` numbers. Copies nothing for a row that stays; a row whose source is no row stays.
//
// A row is overwritten only when no other row still waits for its old content; what is left then are cycles, and each
// is opened by saving one row. So whatever is read is what the rows held at first: a read may be done before any of the
// moves that precede it.
SINKATTN_HOST_DEVICE inline int64_t plan_row_moves(
    const int64_t* source, int64_t count, int64_t* readers, RowMove* moves) {
  constexpr int64_t kMoved = -1;
  // A row that stays reads itself, so it never runs out of readers.
  const auto from = [&](int64_t row) { return source[row] >= 0 && source[row] < count ? source[row] : row; };
  int64_t n = 0;
  const auto move = [&](int64_t to, int64_t content) {
    moves[n++] = RowMove{to, content};
    readers[to] = kMoved;
  };
  for (int64_t row = 0; row < count; ++row) readers[row] = 0;
  for (int64_t row = 0; row < count; ++row) ++readers[from(row)];
  for (int64_t first = 0; first < count; ++first) {
    for (int64_t row = first; readers[row] == 0;) {
      const int64_t next = from(row);
      move(row, next);
      --readers[next];
      row = next;
    }
  }
  for (int64_t first = 0; first < count; ++first) {
    if (readers[first] == kMoved || from(first) == first) continue;
    moves[n++] = RowMove{kSpareRow, first};
    int64_t row = first;
    for (; from(row) != first; row = from(row)) move(row, from(row));
    move(row, kSpareRow);
  }
  return n;
}

}  // namespace sinkattn
