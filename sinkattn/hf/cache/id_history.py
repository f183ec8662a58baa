"""Which ids the streams of a cache were fed: the first and the most recent tokens of each, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens at the start of a stream that are kept for ever.
FIRST = 64


# In place of the id of a token that came as an embedding, and of padding that has none.
UNKNOWN = torch.iinfo(torch.int64).min


UNKNOWN_PADDING = UNKNOWN + 1


class IdHistory:
    """Ids of the tokens of each stream, and of the columns of the batch: what a place of ``input_ids`` brought.

    Both are the same while no row had padding. A column says where a row had padding: there it holds ``~id``, a
    negative number, for the ``id`` that the row was fed in vain.

    Args:
        capacity: most recent tokens and columns to keep.

    Attributes:
        first: int64 ``[batch, FIRST + 1]`` the first tokens; None before anything was fed.
        recent: int64 ``[batch, capacity + 1]``, token n in place ``n % capacity``. The last place of both is for what
            is to be written nowhere.
        columns: int64 ``[batch, capacity]``, column c in place ``c % capacity``; None while no row had padding.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.first: Tensor | None = None
        self.recent: Tensor | None = None
        self.columns: Tensor | None = None
        self._end = 0  # the furthest column that was written
        self._ends: Tensor | None = None  # and token, of each row, if that is another

    @property
    def padded(self) -> bool:
        """Whether tokens and columns of some row may have different numbers."""
        return self.columns is not None

    @property
    def oldest(self) -> int:
        """The oldest column that is kept."""
        return max(0, self._end - self.capacity)

    def record(
        self,
        begin: int,
        seen: Tensor,
        ids: Tensor,
        present: Tensor | None = None,
        *,
        before: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        """Note what columns from ``begin`` on brought.

        Args:
            begin: number of the first.
            seen: int64 ``[batch]`` tokens that rows had before.
            ids: int64 ``[batch, tokens]``, ``UNKNOWN`` where nobody has them.
            present: bool ``[batch, tokens]`` which are no padding; all if None.
            before: bool ``[batch, tokens]`` which of the others are tokens that the row has had already.
            index: int64 ``[tokens]`` numbers of the columns on the device, up to ``capacity``: in a graph that is
                traced, a number on the host would have to be read, or the graph made anew. Without padding.
        """
        tokens = ids.shape[1]
        if self.first is None:
            # Not inference tensors, even if made under torch.inference_mode(): a stream may go on outside of it.
            with torch.inference_mode(False):
                self.first, self.recent = (
                    torch.zeros(len(ids), size + 1, dtype=torch.int64, device=ids.device)
                    for size in (FIRST, self.capacity)
                )
        if present is None and not self.padded:
            if index is not None:
                self.first.index_copy_(1, index.clamp(max=FIRST), ids)
                self.recent.index_copy_(1, index % self.capacity, ids)
            else:
                if begin < FIRST:
                    self.first[:, begin : min(begin + tokens, FIRST)] = ids[:, : FIRST - begin]
                self._write(self.recent, begin, ids)
        else:
            if present is None:
                present = torch.ones_like(ids, dtype=torch.bool)
            self._record_tokens(seen, ids, present)
            self.record_columns(begin, ids, present if before is None else present | before)
        self._end = max(self._end, begin + tokens)

    def _record_tokens(self, seen: Tensor, ids: Tensor, present: Tensor) -> None:
        self._tell_apart()
        rank = present.cumsum(dim=1) - 1
        number, count = seen.unsqueeze(1) + rank, present.sum(dim=1)
        kept = present & (rank >= count.unsqueeze(1) - self.capacity)
        self.recent.scatter_(1, torch.where(kept, number % self.capacity, self.capacity), ids)
        self.first.scatter_(1, torch.where(present & (number < FIRST), number, FIRST), ids)
        self._ends = torch.maximum(self._ends, seen + count)

    def _tell_apart(self) -> None:
        # From now on tokens and columns may have different numbers.
        if self.columns is None:
            with torch.inference_mode(False):
                self.columns = self.recent[:, : self.capacity].clone()
                self._ends = torch.full((len(self.first),), self._end, device=self.first.device)

    def record_columns(self, begin: int, ids: Tensor, present: Tensor) -> None:
        """Note where columns from ``begin`` on have padding, if their tokens are known already."""
        self._tell_apart()
        padding = torch.where(ids < 0, UNKNOWN_PADDING, ~ids)  # whatever stands there
        self._write(self.columns, begin, torch.where(present, ids, padding))
        self._end = max(self._end, begin + ids.shape[1])

    def renumber_columns(self, ids: Tensor, present: Tensor) -> None:
        """Number columns anew: the tokens of the streams are those that are ``present`` here, ``[batch, columns]``."""
        if self.padded or not present.all():
            self._tell_apart()
            self._end = 0
            self.record_columns(0, ids, present)

    def _write(self, to: Tensor, begin: int, ids: Tensor) -> None:
        tokens = ids.shape[1]
        if tokens > self.capacity:
            begin, tokens, ids = begin + tokens - self.capacity, self.capacity, ids[:, -self.capacity :]
        place = begin % self.capacity
        if place + tokens <= self.capacity:
            to.narrow(1, place, tokens).copy_(ids)
        else:
            until_end = self.capacity - place
            to[:, place : self.capacity] = ids[:, :until_end]
            to[:, : tokens - until_end] = ids[:, until_end:]

    def known_tokens(self, seen: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Which tokens of rows that have ``seen`` so many are known, and their ids: int64 ``[n]`` each, on the CPU."""
        first, recent = self.first.cpu(), self.recent.cpu()
        ends = [self._end] * len(seen) if self._ends is None else self._ends.tolist()
        rows = []
        for row, (count, end) in enumerate(zip(seen, ends, strict=True)):
            begin = min(FIRST, count)
            numbers = torch.arange(max(begin, end - self.capacity), max(begin, count))
            ids = torch.cat((first[row, :begin], recent[row, numbers % self.capacity]))
            rows.append((torch.cat((torch.arange(begin), numbers)), ids))
        return rows

    def known_columns(self, end: int) -> Tensor:
        """What columns `oldest` to ``end`` of a padded batch brought: int64 ``[batch, n]``, on the CPU."""
        return self.columns.cpu()[:, torch.arange(self.oldest, max(self.oldest, end)) % self.capacity]

    def present(self, begin: int, end: int) -> Tensor | None:
        """Which rows had a token in columns ``begin`` to ``end``: bool ``[batch, end - begin]``.

        None if not all of them are kept any more.
        """
        if begin < self.oldest:
            return None
        if not self.padded:
            return torch.ones(len(self.first), end - begin, dtype=torch.bool, device=self.first.device)
        columns = torch.arange(begin, end, device=self.columns.device)
        return is_token(self.columns[:, columns % self.capacity])

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was; there may be another number of rows then."""
        if self.first is not None:
            index = index.to(self.first.device)
            with torch.inference_mode(False):
                self.first, self.recent = self.first[index], self.recent[index]
                if self.padded:
                    self.columns, self._ends = self.columns[index], self._ends[index]


def is_token(ids: Tensor) -> Tensor:
    """Which columns hold tokens, as opposed to padding: bool of the same shape."""
    return (ids >= 0) | (ids == UNKNOWN)


def common_tokens(numbers: Tensor, known: Tensor, seen: int, ids: Tensor) -> int:
    """How many of the first tokens of a stream are those of ``ids``.

    Those that are not known are taken for the same.

    Args:
        numbers, known: int64 ``[n]`` which tokens of the stream are known, ascending, and their ids.
        seen: tokens of the stream.
        ids: int64 ``[tokens]``.
    """
    within = numbers < len(ids)
    different = (ids[numbers[within]] != known[within]).nonzero()
    return int(numbers[within][different[0, 0]]) if len(different) else min(seen, len(ids))
