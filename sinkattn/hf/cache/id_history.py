"""Records the ids that a cache was fed: a prefix and the most recent ids of each stream, in constant memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.stream_file import SavedStreams

# Tokens at the start of each stream whose ids are never dropped.
MAX_PREFIX_IDS = 64

# Recorded for a token that came as an embedding, and for padding without an id of its own.
UNKNOWN_ID = torch.iinfo(torch.int64).min
UNKNOWN_PADDING_ID = UNKNOWN_ID + 1
INT32_MIN = torch.iinfo(torch.int32).min


class IdHistory:
    """Ids by token number, per stream, and ids by column, per row.

    Columns are recorded separately only once a row has padding; until then token and column numbers are equal. A column
    that was padding for a row holds ``~id``, which is negative, for the ``id`` in its place.

    Args:
        capacity: number of recent tokens and columns to keep.

    Attributes:
        prefix_ids: int64 ``[batch, MAX_PREFIX_IDS + 1]``, ids of the first tokens; None before anything was fed.
        recent_ids: int64 ``[batch, capacity + 1]``, token n at index ``n % capacity``. The last index of this and of
            ``prefix_ids`` is a dummy that masked writes go to.
        column_ids: int64 ``[batch, capacity]``, column c at index ``c % capacity``; None while no row had padding.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.prefix_ids: Tensor | None = None
        self.recent_ids: Tensor | None = None
        self.column_ids: Tensor | None = None
        self._peak_columns = 0
        """Largest number of columns recorded so far; a rollback does not lower it."""
        self._peak_tokens: Tensor | None = None
        """The same for the tokens of each row, int64 ``[batch]``; None while it equals ``_peak_columns``."""

    @property
    def has_padding(self) -> bool:
        """Whether token and column numbers may differ in some row."""
        return self.column_ids is not None

    @property
    def oldest_column(self) -> int:
        """First column that is still recorded."""
        return max(0, self._peak_columns - self.capacity)

    @property
    def device(self) -> torch.device:
        """Device of the ids; something must have been recorded."""
        return self._recorded()[0].device

    def _recorded(self) -> tuple[Tensor, Tensor]:
        """``prefix_ids`` and ``recent_ids``; something must have been recorded."""
        if self.prefix_ids is None or self.recent_ids is None:
            raise RuntimeError("IdHistory: expected recorded ids, got an empty history")
        return self.prefix_ids, self.recent_ids

    def record(
        self,
        begin: int,
        seen: Tensor,
        ids: Tensor,
        token_mask: Tensor | None = None,
        *,
        already_fed: Tensor | None = None,
        column_index: Tensor | None = None,
    ) -> None:
        """Record the ids of new columns.

        Args:
            begin: first of these columns.
            seen: int64 ``[batch]``, tokens of each row before them.
            ids: int64 ``[batch, tokens]``, `UNKNOWN_ID` where unknown.
            token_mask: bool ``[batch, tokens]``, the tokens that are new to the row's stream; all of them if None.
            already_fed: bool ``[batch, tokens]``, the tokens outside ``token_mask`` that the stream already has. The
                rest of the columns is padding.
            column_index: int64 ``[tokens]``, the column numbers on the device, at most ``capacity`` of them. Used under
                torch.compile, which would guard on ``begin`` and recompile; ignored once there is padding.
        """
        tokens = ids.shape[1]
        prefix_ids, recent_ids = self.prefix_ids, self.recent_ids
        if prefix_ids is None or recent_ids is None:
            # Not inference tensors, even under torch.inference_mode(): later forwards may run outside of it.
            with torch.inference_mode(False):
                prefix_ids, recent_ids = (
                    torch.zeros(len(ids), size + 1, dtype=torch.int64, device=ids.device)
                    for size in (MAX_PREFIX_IDS, self.capacity)
                )
            self.prefix_ids, self.recent_ids = prefix_ids, recent_ids
        if token_mask is None and not self.has_padding:
            if column_index is not None:
                prefix_ids.index_copy_(1, column_index.clamp(max=MAX_PREFIX_IDS), ids)
                recent_ids.index_copy_(1, column_index % self.capacity, ids)
            else:
                if begin < MAX_PREFIX_IDS:
                    prefix_ids[:, begin : min(begin + tokens, MAX_PREFIX_IDS)] = ids[:, : MAX_PREFIX_IDS - begin]
                self._write_ring(recent_ids, begin, ids)
        else:
            if token_mask is None:
                token_mask = torch.ones_like(ids, dtype=torch.bool)
            self._record_tokens(prefix_ids, recent_ids, seen, ids, token_mask)
            self.record_columns(begin, ids, token_mask if already_fed is None else token_mask | already_fed)
        self._peak_columns = max(self._peak_columns, begin + tokens)

    def _record_tokens(
        self, prefix_ids: Tensor, recent_ids: Tensor, seen: Tensor, ids: Tensor, token_mask: Tensor
    ) -> None:
        _, peak_tokens = self._separate_columns()
        rank = token_mask.cumsum(dim=1) - 1
        number, count = seen.unsqueeze(1) + rank, token_mask.sum(dim=1)
        is_recent = token_mask & (rank >= count.unsqueeze(1) - self.capacity)
        is_prefix = token_mask & (number < MAX_PREFIX_IDS)
        recent_ids.scatter_(1, torch.where(is_recent, number % self.capacity, self.capacity), ids)
        prefix_ids.scatter_(1, torch.where(is_prefix, number, MAX_PREFIX_IDS), ids)
        self._peak_tokens = torch.maximum(peak_tokens, seen + count)

    def _separate_columns(self) -> tuple[Tensor, Tensor]:
        """Record columns apart from tokens from now on. Returns ``column_ids`` and ``_peak_tokens``."""
        column_ids, peak_tokens = self.column_ids, self._peak_tokens
        if column_ids is None or peak_tokens is None:
            _, recent_ids = self._recorded()
            with torch.inference_mode(False):
                column_ids = recent_ids[:, : self.capacity].clone()
                peak_tokens = torch.full((len(recent_ids),), self._peak_columns, device=recent_ids.device)
            self.column_ids, self._peak_tokens = column_ids, peak_tokens
        return column_ids, peak_tokens

    def record_columns(self, begin: int, ids: Tensor, token_mask: Tensor) -> None:
        """Record only the columns from ``begin`` on; their tokens must be recorded already.

        ids int64, token_mask bool ``[batch, columns]``, False for padding.
        """
        column_ids, _ = self._separate_columns()
        padding = torch.where(ids < 0, UNKNOWN_PADDING_ID, ~ids)
        self._write_ring(column_ids, begin, torch.where(token_mask, ids, padding))
        self._peak_columns = max(self._peak_columns, begin + ids.shape[1])

    def renumber_columns(self, ids: Tensor, token_mask: Tensor) -> None:
        """Replace the recorded columns by these, int64 and bool ``[batch, columns]``, which hold the same tokens."""
        if self.has_padding or not token_mask.all():
            self._separate_columns()
            self._peak_columns = 0
            self.record_columns(0, ids, token_mask)

    def _write_ring(self, ring: Tensor, begin: int, ids: Tensor) -> None:
        tokens = ids.shape[1]
        if tokens > self.capacity:
            begin, tokens, ids = begin + tokens - self.capacity, self.capacity, ids[:, -self.capacity :]
        index = begin % self.capacity
        if index + tokens <= self.capacity:
            ring.narrow(1, index, tokens).copy_(ids)
        else:
            until_end = self.capacity - index
            ring[:, index : self.capacity] = ids[:, :until_end]
            ring[:, : tokens - until_end] = ids[:, until_end:]

    def known_tokens(self, seen: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Numbers and ids of the recorded tokens of each row, int64 ``[n]`` each, on the CPU.

        seen: tokens of each row.
        """
        prefix, recent = (ids.cpu() for ids in self._recorded())
        peaks = [self._peak_columns] * len(seen) if self._peak_tokens is None else self._peak_tokens.tolist()
        rows = []
        for row, (count, peak) in enumerate(zip(seen, peaks, strict=True)):
            prefix_end = min(MAX_PREFIX_IDS, count)
            numbers = torch.arange(max(prefix_end, peak - self.capacity), max(prefix_end, count))
            ids = torch.cat((prefix[row, :prefix_end], recent[row, numbers % self.capacity]))
            rows.append((torch.cat((torch.arange(prefix_end), numbers)), ids))
        return rows

    def known_columns(self, end: int) -> Tensor:
        """Ids of the columns from `oldest_column` to ``end`` of a batch with padding: int64 ``[batch, n]``, on CPU."""
        assert self.column_ids is not None  # the batch has padding
        return self.column_ids.cpu()[:, torch.arange(self.oldest_column, max(self.oldest_column, end)) % self.capacity]

    def token_mask(self, begin: int, end: int) -> Tensor | None:
        """Token mask of the columns from ``begin`` to ``end``: bool ``[batch, end - begin]``.

        None if some of them are no longer recorded.
        """
        if begin < self.oldest_column:
            return None
        if self.column_ids is None:
            prefix_ids, _ = self._recorded()
            return torch.ones(len(prefix_ids), end - begin, dtype=torch.bool, device=prefix_ids.device)
        columns = torch.arange(begin, end, device=self.column_ids.device)
        return is_token(self.column_ids[:, columns % self.capacity])

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was; the number of rows may change."""
        if self.prefix_ids is None or self.recent_ids is None:
            return
        index = index.to(self.prefix_ids.device)
        with torch.inference_mode(False):
            self.prefix_ids, self.recent_ids = self.prefix_ids[index], self.recent_ids[index]
            if self.column_ids is not None and self._peak_tokens is not None:
                self.column_ids, self._peak_tokens = self.column_ids[index], self._peak_tokens[index]

    def state_tensors(self) -> dict[str, Tensor]:
        """What `SinkCache.save` saves of the history, rows first."""
        tensors = {
            "prefix_ids": self.prefix_ids,
            "recent_ids": self.recent_ids,
            "column_ids": self.column_ids,
        }
        saved = {name: _to_int32(x) for name, x in tensors.items() if x is not None}
        return saved if self._peak_tokens is None else {**saved, "peak_tokens": self._peak_tokens}

    def state_fields(self) -> dict[str, Any]:
        """What it saves besides tensors."""
        return {"peak_columns": self._peak_columns}

    def load_state(self, saved: SavedStreams) -> None:
        """Replace what is recorded by what was saved."""
        prefix_ids, recent_ids = self._recorded()
        device = recent_ids.device
        self.prefix_ids, self.recent_ids = (
            _from_int32(saved.tensor(name, (x.shape[1],), torch.int32, device))
            for name, x in (("prefix_ids", prefix_ids), ("recent_ids", recent_ids))
        )
        if "column_ids" in saved:
            self.column_ids = _from_int32(saved.tensor("column_ids", (self.capacity,), torch.int32, device))
            self._peak_tokens = saved.tensor("peak_tokens", (), torch.int64, device)
        self._peak_columns = saved.count("peak_columns")


def _to_int32(ids: Tensor) -> Tensor:
    """Recorded ids in half of the bytes; those that stand for an unknown id become the least two of int32."""
    return torch.where(ids <= UNKNOWN_PADDING_ID, ids - UNKNOWN_ID + INT32_MIN, ids).to(torch.int32)


def _from_int32(ids: Tensor) -> Tensor:
    ids = ids.to(torch.int64)
    return torch.where(ids <= INT32_MIN + 1, ids - INT32_MIN + UNKNOWN_ID, ids)


def is_token(column_ids: Tensor) -> Tensor:
    """Whether recorded columns hold tokens, not padding: bool of the same shape."""
    return (column_ids >= 0) | (column_ids == UNKNOWN_ID)


def common_prefix_length(numbers: Tensor, known_ids: Tensor, seen: int, ids: Tensor) -> int:
    """Length of the prefix that a stream and ``ids`` have in common.

    Tokens that are not recorded are assumed to be equal. `UNKNOWN_ID` differs from every id.

    Args:
        numbers, known_ids: int64 ``[n]``, numbers, ascending, and ids of the recorded tokens of the stream.
        seen: tokens of the stream.
        ids: int64 ``[tokens]``.
    """
    within = numbers < len(ids)
    different = (ids[numbers[within]] != known_ids[within]).nonzero()
    return int(numbers[within][different[0, 0]]) if len(different) else min(seen, len(ids))
