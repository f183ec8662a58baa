"""State that all layers of a `SinkCache` share. Terms such as column, stream and token mask: `sinkattn.hf.cache`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sinkattn.hf.cache.id_history import UNKNOWN_ID, IdHistory
from sinkattn.hf.cache.stream_file import SavedStreams
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import CacheDtype, RingKVCache

# Fields that the next call or `generate` needs.
SAVED_COUNTS = ("num_columns", "peak_columns")
SAVED_FLAGS = ("only_ids", "generate_interrupted", "can_prefill_again")


@dataclass
class SharedCacheState:
    """How far the streams are, the forward and the `generate` call in progress, and what the next call has to know."""

    layout: RingLayout
    """Ring layout of the layers with full attention."""
    history: IdHistory
    """Ids that the streams were fed."""
    cache_dtype: CacheDtype | None = None
    """Of tokens that are not sinks in the rings; None for the dtype of the model."""
    counter_ring: RingKVCache | None = None
    """Ring that owns ``seen``, the token counters that all rings share; None without any ring yet."""
    num_rows: int | None = None
    """Rows of every ring; None: those of the first forward."""
    num_columns: int = 0
    """Columns fed so far, padding included. Without padding, the host's copy of ``seen``."""
    peak_columns: int = 0
    """Largest number of columns ever written to the rings, by failed forwards too; a rollback does not lower it."""
    unusable_reason: str | None = None
    """Error message if the streams cannot continue."""

    model_ids: Tensor | None = None
    """Ids passed to the whole model, for its decoder's next forward, which may get embeddings only."""
    only_ids: bool = True
    """Whether the model never got inputs that ids do not describe, such as images."""
    forward_ids: Tensor | None = None
    """Ids of the forward in progress; None if unknown."""
    num_new_tokens: int = 0
    """Columns of the forward in progress; 0 between forwards."""
    compiled_seq_length: int | None = None
    """What `get_seq_length` returns within a compiled decode step; None outside."""

    in_generate: bool = False
    """Whether `generate` is running; it makes the mask of past columns itself."""
    pending_update: Callable[[], None] | None = None
    """Brings the cache to where the prompt of `generate` continues it; called by the first forward."""
    generate_offset: int | None = None
    """Subtracted from `num_columns` by `get_seq_length` while `generate` runs: columns before those of its own ids.

    None outside of `generate` and for a new stream.
    """
    generate_interrupted: bool = False
    """Whether the last `generate` has run its first forward, but did not finish."""
    fed_ahead: tuple[Tensor, Tensor] | None = None
    """All ids of the running `generate`, and True where the stream has the id already, ``[batch, columns]`` each.

    Set while columns are fed that only some rows lack.
    """
    ended_rows: Tensor | None = None
    """Rows that have ended and get padding from `generate`: bool ``[batch]``."""
    unfed_padding: tuple[Tensor, int] | None = None
    """Rows whose last id returned by `generate`, not fed yet, is padding: bool ``[batch]``; and the padding id."""
    last_prompt_span: Tensor | None = None
    """Token numbers in each stream where the last prompt of `generate` begins and ends: int64 ``[batch, 2]``, CPU."""
    can_prefill_again: bool = True
    """Whether `generate` may reset streams that cannot continue, and prefill all of its ids again."""

    @property
    def counters(self) -> RingKVCache:
        """`counter_ring`, after the first forward."""
        if self.counter_ring is None:
            raise RuntimeError("cache: expected streams that have tokens, got a cache without any")
        return self.counter_ring

    def set_tokens(self, seen: int, peak: int) -> None:
        """Count as many tokens in every row, ``peak`` of them once written; the caller has written them."""
        self.num_columns, self.peak_columns = seen, peak
        if self.counter_ring is not None:
            self.counter_ring.set_seen(seen, peak)

    def check_past_mask(self, past: Tensor) -> None:
        """Raise ValueError if a mask of past columns, ``[batch, columns]``, is not the one that they were fed with.

        Only recorded columns are compared, because the mask may be as long as the stream.
        """
        if self.in_generate or past.shape[1] != self.num_columns or not self.num_columns:
            return
        begin = self.history.oldest_column
        past = past[:, begin:] != 0
        token_mask = self.history.token_mask(begin, self.num_columns)
        if token_mask is not None and not torch.equal(token_mask, past):
            row, column = (token_mask != past).nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask: expected {int(token_mask[row, column])} in row {row}, column {begin + column}, as "
                f"when that column was fed, got {int(past[row, column])}"
            )

    def renumber_columns(self, column: int, ids: Tensor, fed: Tensor) -> None:
        """Number columns as the ids of `generate`, which are fed from ``column`` on.

        Args:
            column: the next column; every row has its tokens before it.
            ids: int64 ``[batch, columns]``, all ids of `generate`.
            fed: bool ``[batch, columns]``, ids that the streams have already; some rows may have more than others.
        """
        device = self.history.device
        ids, fed = ids.to(device), fed.to(device)
        self.history.renumber_columns(ids[:, :column], fed[:, :column])
        self.num_columns = column
        self.peak_columns = max(self.peak_columns, column)
        if fed[:, column:].any():
            self.fed_ahead = (ids, fed)

    def count_columns_ahead(self) -> None:
        """Count columns of `fed_ahead` that `generate` ended before feeding, as padding in rows without their token."""
        if self.fed_ahead is not None:
            (ids, fed), self.fed_ahead, begin = self.fed_ahead, None, self.num_columns
            end = int(fed.any(dim=0).nonzero()[-1]) + 1
            if begin < end:
                self.history.record_columns(begin, ids[:, begin:end], fed[:, begin:end])
                self.num_columns = end
                self.peak_columns = max(self.peak_columns, end)

    def mark_unusable(self, reason: str, column: int, ids: Tensor, token_mask: Tensor) -> None:
        """Refuse forwards until `generate` is given all ids of the streams.

        The columns from ``column`` on are recorded as these ids, ``[batch, columns]``, without being in the rings, so
        that `generate` can match its ids with them.
        """
        device = self.history.device
        self.unusable_reason = reason
        self.history.record_columns(column, ids.to(device), token_mask.to(device))
        self.num_columns = column + ids.shape[1]

    def note_ended_rows(self, rows: Tensor, last_ids: Tensor) -> None:
        """Note the rows, bool ``[batch]``, that ended early, so that padding is their last id: ``[batch]``."""
        if rows.any():
            self.unfed_padding = (rows, int(last_ids[rows][0]))

    def commit_columns(self, token_mask: Tensor | None, seen: Tensor) -> None:
        """Count the columns of the forward in progress, which ends, and record their ids.

        token_mask: bool ``[batch, tokens]``, None without padding. seen: int64 ``[batch]``, tokens of each row before.
        """
        already_fed, column_index = None, None
        ids, tokens, begin = self.forward_ids, self.num_new_tokens, self.num_columns
        if ids is None:
            ids = torch.full((len(seen), tokens), UNKNOWN_ID, device=seen.device)
        if token_mask is not None and self.fed_ahead is not None:
            already_fed = self.fed_ahead[1][:, begin : begin + tokens]
            already_fed = functional.pad(already_fed, (0, tokens - already_fed.shape[1]))
        if torch.compiler.is_dynamo_compiling() and tokens <= self.history.capacity:
            column_index = seen[0] + torch.arange(tokens, device=seen.device)
        self.history.record(begin, seen, ids, token_mask, already_fed=already_fed, column_index=column_index)
        self.num_columns += tokens
        self.peak_columns = max(self.peak_columns, self.num_columns)
        self.num_new_tokens, self.forward_ids, self.unfed_padding = 0, None, None

    def note_rollback(self, counts: int | Tensor) -> None:
        """Note that the last ``counts`` tokens of each row, int64 ``[batch]``, were rolled back."""
        if self.unfed_padding is not None:
            rows, padding_id = self.unfed_padding
            self.unfed_padding = (rows & (torch.as_tensor(counts, device=rows.device) == 0), padding_id)

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was, in all per-row state but the rings."""
        self.history.take_rows(index)
        if self.last_prompt_span is not None:
            self.last_prompt_span = self.last_prompt_span[index.to(self.last_prompt_span.device)]
        if self.unfed_padding is not None:
            rows, padding_id = self.unfed_padding
            self.unfed_padding = rows[index.to(rows.device)], padding_id

    def check_between_calls(self) -> None:
        """Raise RuntimeError in the middle of a forward or of `generate`."""
        if self.num_new_tokens or self.in_generate:
            call = "generate" if self.in_generate else "a forward"
            raise RuntimeError(f"cache: is in the middle of {call}, in this thread or another; save it afterwards")

    def state_tensors(self) -> dict[str, Tensor]:
        """What `SinkCache.save` saves of this state, rows first."""
        tensors = {f"history.{name}": x for name, x in self.history.state_tensors().items()}
        if self.counter_ring is not None:
            tensors |= {"seen": self.counter_ring.seen, "peak": self.counter_ring.peak}
        if self.last_prompt_span is not None:
            tensors["last_prompt_span"] = self.last_prompt_span
        if self.unfed_padding is not None:
            tensors["unfed_padding"] = self.unfed_padding[0]
        return tensors

    def state_fields(self) -> dict[str, Any]:
        """What it saves besides tensors. The rest of the state is None or False between two calls."""
        fields = {name: getattr(self, name) for name in (*SAVED_COUNTS, *SAVED_FLAGS, "unusable_reason")}
        padding_id = None if self.unfed_padding is None else self.unfed_padding[1]
        return {**fields, "padding_id": padding_id, "history": self.history.state_fields()}

    def load_fields(self, saved: SavedStreams) -> None:
        """Replace the fields by those that were saved."""
        for name in SAVED_COUNTS:
            setattr(self, name, saved.count(name))
        for name in SAVED_FLAGS:
            setattr(self, name, saved.field(name, bool))
        self.unusable_reason = saved.field("unusable_reason", (str, NoneType))

    def load_tensors(self, saved: SavedStreams) -> None:
        """Replace per-row state by what was saved; `counters` get their rows before the keys and values of any ring."""
        self.history.load_state(saved.part("history"))
        device = self.history.device
        if "last_prompt_span" in saved:
            self.last_prompt_span = saved.tensor("last_prompt_span", (2,), torch.int64, torch.device("cpu"))
        if "unfed_padding" in saved:
            rows = saved.tensor("unfed_padding", (), torch.bool, device)
            self.unfed_padding = rows, saved.field("padding_id", int)
        ring = self.counter_ring
        if ring is None:
            return
        seen, peak = (saved.tensor(name, (), torch.int64, device) for name in ("seen", "peak"))
        # Slots follow from the counters, so they must be possible ones.
        for name, count in (("seen", seen), ("peak", peak)):
            if not ((count >= 0) & (count <= self.peak_columns)).all():
                raise ValueError(f"path: {name}: expected 0 to {self.peak_columns} tokens, got {count.tolist()}")
        ring.replace(ring.tensors, seen, peak)

    def clear(self) -> None:
        """Forget all streams."""
        self.history.clear()
        self.num_columns = self.peak_columns = 0
        self.only_ids = self.can_prefill_again = True
        self.generate_interrupted = False
        self.fed_ahead = self.unusable_reason = self.unfed_padding = self.last_prompt_span = self.model_ids = None
