// Plans an in-place reorder of rows, row[i] = old row[source[i]], as a sequence of copies. No torch, no allocation; for
// host and device.
#pragma once

#include <cstdint>

#include "ring.h"

namespace sinkattn {

// One copy of a row; kSpareRow is a temporary row. Aligned so that a GPU loads it in one access.
struct alignas(16) RowMove {
  int64_t to;
  int64_t from;
};
constexpr int64_t kSpareRow = -1;

// Upper bound on the moves of `count` rows: one per row, and one more per cycle of two or more rows.
SINKATTN_HOST_DEVICE constexpr int64_t max_row_moves(int64_t count) { return count + count / 2; }

// Fills `moves`, which has room for max_row_moves(count), and returns their number. `num_readers` is scratch of `count`
// numbers. Rows that stay are not copied; a row whose source is out of range stays.
//
// A row is overwritten only once no other row still has to read its old content. The rest are cycles, each broken by
// saving one row to the temporary row. So every move reads a row's original content, and reads may be done ahead of
// earlier moves.
SINKATTN_HOST_DEVICE inline int64_t plan_row_moves(
    const int64_t* source, int64_t count, int64_t* num_readers, RowMove* moves) {
  constexpr int64_t kMoved = -1;
  // A row that stays reads itself, so its num_readers never reaches 0.
  const auto from = [&](int64_t row) { return source[row] >= 0 && source[row] < count ? source[row] : row; };
  int64_t n = 0;
  const auto move = [&](int64_t to, int64_t content) {
    moves[n++] = RowMove{to, content};
    num_readers[to] = kMoved;
  };
  for (int64_t row = 0; row < count; ++row) num_readers[row] = 0;
  for (int64_t row = 0; row < count; ++row) ++num_readers[from(row)];
  for (int64_t first = 0; first < count; ++first) {
    for (int64_t row = first; num_readers[row] == 0;) {
      const int64_t next = from(row);
      move(row, next);
      --num_readers[next];
      row = next;
    }
  }
  for (int64_t first = 0; first < count; ++first) {
    if (num_readers[first] == kMoved || from(first) == first) continue;
    moves[n++] = RowMove{kSpareRow, first};
    int64_t row = first;
    for (; from(row) != first; row = from(row)) move(row, from(row));
    move(row, kSpareRow);
  }
  return n;
}

}  // namespace sinkattn
