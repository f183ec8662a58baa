"""State that all layers of a `SinkCache` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sinkattn.hf.cache.id_history import UNKNOWN, IdHistory
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache


@dataclass
class SharedCacheState:
    """What the layers of a cache share."""

    layout: RingLayout
    """Of the layers with full attention."""
    history: IdHistory
    """Ids that the streams were fed."""
    tokens_seen: int = 0
    """Columns that every row was fed, padding included: without any, the host's copy of the ring's `seen`."""
    peak: int = 0
    """The most columns that were ever written, whether they count or not."""
    ring: RingKVCache | None = None
    """The ring whose counters all layers use."""
    model_ids: Tensor | None = None
    """Ids that the whole model was given in the forward under way, for a decoder that gets embeddings."""
    only_ids: bool = True
    """The model was never given anything that ids do not say, like pictures."""
    forward_ids: Tensor | None = None
    """Ids of the forward under way; None if nobody has them."""
    num_new_tokens: int | None = None
    """Columns of the forward under way; None between forwards."""
    unusable_reason: str | None = None
    """Why the streams cannot go on, as a message."""
    can_replay: bool = True
    """Streams that cannot go on can be fed anew."""
    in_generate: bool = False
    """`generate` runs: masks of past columns are its own."""
    interrupted: bool = False
    """The last `generate` has begun, and did not come to its end."""
    generate_start: int | None = None
    """Column from which `generate`, which may know the new ones alone, counts; None if that is the stream's own."""
    pending_plan: Callable[[], None] | None = None
    """What the first forward of `generate` has to do first."""
    ended_rows: Tensor | None = None
    """Rows that `generate` feeds padding because they have ended: bool ``[batch]``."""
    unfed_padding: tuple[Tensor, int] | None = None
    """Rows whose last returned id, not fed yet, is such padding, bool ``[batch]``; and the id of padding."""
    already_fed: tuple[Tensor, Tensor] | None = None
    """All ids that `generate` has, and which are tokens of the streams already, ``[batch, columns]`` each."""
    last_given: Tensor | None = None
    """Tokens of every row before and after what `generate` was last given, int64 ``[batch, 2]``, on the device."""

    def check_past_mask(self, past: Tensor) -> None:
        """Check the part of a mask, ``[batch, columns]``, that is about columns which the streams have been fed.

        Of those in sight, for the mask may be as long as the stream. Raises ValueError.
        """
        if self.in_generate or past.shape[1] != self.tokens_seen or not self.tokens_seen:
            return
        begin = self.history.oldest
        past = past[:, begin:] != 0
        present = self.history.present(begin, self.tokens_seen)
        if not torch.equal(present, past):
            row, column = (present != past).nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask: expected {int(present[row, column])} in row {row} at token {begin + column} of the "
                f"past, as it was fed, got {int(past[row, column])}"
            )

    def continue_at(self, column: int, ids: Tensor, fed: Tensor) -> None:
        """Count columns as `generate` does: what it feeds begins with ``column``.

        ids int64, fed bool ``[batch, tokens]``: all ids that it has, and which are tokens of the streams already. Some
        rows may be further than others.
        """
        device = self.history.first.device
        ids, fed = ids.to(device), fed.to(device)
        self.history.renumber_columns(ids[:, :column], fed[:, :column])
        self.tokens_seen = column
        self.peak = max(self.peak, column)
        if fed[:, column:].any():
            self.already_fed = (ids, fed)

    def catch_up(self) -> None:
        """Count the columns in which some rows are further than others, if what was to be fed there never came."""
        if self.already_fed is not None:
            (ids, fed), self.already_fed, begin = self.already_fed, None, self.tokens_seen
            end = int(fed.any(dim=0).nonzero()[-1]) + 1
            if begin < end:
                self.history.record_columns(begin, ids[:, begin:end], fed[:, begin:end])
                self.tokens_seen = end
                self.peak = max(self.peak, end)

    def mark_unusable(self, why: str, column: int, ids: Tensor, present: Tensor) -> None:
        """Let no stream go on until `generate` is given all of them; columns from ``column`` on are as given here.

        ids, present: ``[batch, tokens]`` ids, and which are no padding.
        """
        device = self.history.first.device
        self.unusable_reason = why
        self.history.record_columns(column, ids.to(device), present.to(device))
        self.tokens_seen = column + ids.shape[1]

    def note_ended(self, rows: Tensor, last: Tensor) -> None:
        """Note which rows ended before others, bool ``[batch]``, and so were given padding as their ``last`` id."""
        if rows.any():
            self.unfed_padding = (rows, int(last[rows][0]))

    def count_columns(self, token_mask: Tensor | None, seen: Tensor) -> None:
        """Count the columns of the forward that ends, and note their ids.

        token_mask: bool ``[batch, tokens]``, False for padding; None without padding. seen: int64 ``[batch]`` tokens of
        each row before.
        """
        before, index = None, None
        ids, tokens, begin = self.forward_ids, self.num_new_tokens, self.tokens_seen
        if ids is None:
            ids = torch.full((len(seen), tokens), UNKNOWN, device=seen.device)
        if token_mask is not None and self.already_fed is not None:
            before = self.already_fed[1][:, begin : begin + tokens]
            before = functional.pad(before, (0, tokens - before.shape[1]))
        if torch.compiler.is_dynamo_compiling() and tokens <= self.history.capacity:
            index = seen[0] + torch.arange(tokens, device=seen.device)
        self.history.record(begin, seen, ids, token_mask, before=before, index=index)
        self.tokens_seen += tokens
        self.peak = max(self.peak, self.tokens_seen)
        self.num_new_tokens = self.forward_ids = self.unfed_padding = None

    def note_rolled_back(self, counts: int | Tensor) -> None:
        """Note that the last ``counts`` tokens of each row, int64 ``[batch]``, were rolled back."""
        if self.unfed_padding is not None:
            rows, last = self.unfed_padding
            self.unfed_padding = (rows & (torch.as_tensor(counts, device=rows.device) == 0), last)

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was, in all that is noted of rows."""
        self.history.take_rows(index)
        if self.last_given is not None:
            self.last_given = self.last_given[index.to(self.last_given.device)]
        if self.unfed_padding is not None:
            rows, token = self.unfed_padding
            self.unfed_padding = rows[index.to(rows.device)], token

    def clear(self) -> None:
        """Forget all streams."""
        self.history.clear()
        self.tokens_seen = self.peak = 0
        self.only_ids = self.can_replay = True
        self.interrupted = False
        self.already_fed = self.unusable_reason = self.unfed_padding = self.last_given = self.model_ids = None
