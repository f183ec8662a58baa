"""`SinkCache` of a model that streams by re-encoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.reencode.lanes import Lane
from sinkattn.ops import check_tensor


class Padding(NamedTuple):
    """Which of the new tokens count."""

    token_mask: Tensor
    """Which ones: bool ``[batch, tokens]``."""
    counts: list[int]
    """How many in each row."""


class LaneInput(NamedTuple):
    """New tokens of a lane."""

    lane: Lane
    ids: Tensor
    """int64 ``[rows of the lane, tokens]``, none of them padding."""
    where: tuple[Tensor, Tensor | slice] | None
    """Index of these in ``[batch, tokens]`` of the call; None if they are all of it."""


class ReencodeCache(SinkCache):
    """`SinkCache` of a model that streams by re-encoding: lanes, each with its ids and one context."""

    def __init__(self, model: PreTrainedModel, max_batch_size: int | None = None) -> None:
        super().__init__(model, max_batch_size)
        self._drop()

    def _drop(self) -> None:
        self.lanes: list[Lane] = []
        """Each row of the batch is in one of them; none before the first forward."""
        self._seen: Tensor | None = None
        self.layers[0].__dict__.pop("batch_size", None)

    def _changed(self) -> None:
        self.layers[0].batch_size = sum(len(lane.rows) for lane in self.lanes)
        self._seen = None

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has seen, without padding, on the host."""
        lengths = {row: lane.seen for lane in self.lanes for row in lane.rows}
        return [lengths[row] for row in range(len(lengths))]

    @property
    def seen(self) -> Tensor | None:
        """Tokens that each row has seen, without padding: int64 ``[batch]``, on the device; None before the first."""
        if self._seen is None and self.lanes:
            lane = self.lanes[0]
            if len(self.lanes) == 1:  # filled on the device, which is not waited for
                self._seen = lane.ids.new_full((len(lane.rows),), lane.seen, dtype=torch.int64)
            else:
                self._seen = torch.tensor(self.lengths, device=lane.ids.device)
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers, and of the ids."""
        return sum(lane.nbytes for lane in self.lanes)

    def arrivals(self, ids: Tensor, padding: Padding | None) -> list[LaneInput]:
        """What arrives in each lane that gets new tokens, of ids ``[batch, tokens]`` with this padding among them.

        A lane whose rows get different numbers of tokens is split first. Lanes never merge.
        """
        batch, tokens = ids.shape
        if not self.lanes:
            self.lanes = [Lane(self.layout, range(batch), ids.new_empty(batch, 0))]
        if padding is None and len(self.lanes) == 1:
            return [LaneInput(self.lanes[0], ids, None)]
        counts = [tokens] * batch if padding is None else padding.counts
        parts = [(count, part) for lane in self.lanes for count, part in lane.split(counts).items()]
        self.lanes = [lane for _, lane in parts]
        if padding is not None:
            # Columns of each row, those of tokens that count first.
            order = (~padding.token_mask).to(torch.int8).argsort(dim=1, stable=True)
        arrivals = []
        for count, lane in parts:
            if count:
                rows = torch.tensor(lane.rows, device=ids.device)
                where = (rows, slice(None)) if padding is None else (rows.unsqueeze(1), order[rows, :count])
                arrivals.append(LaneInput(lane, ids[where], where))
        return arrivals

    def finish_forward(self, arrivals: list[LaneInput], padding: Padding | None) -> None:
        """Close the forward: what arrived counts."""
        before = self.seen
        for lane, ids, _ in arrivals:
            lane.append(ids)
        self._changed()
        self.state.commit_columns(None if padding is None else padding.token_mask, before)

    def abandon_forward(self) -> None:
        """Close a forward that failed: its tokens do not count."""
        self.state.num_new_tokens = self.state.forward_ids = None
        if self.tokens_seen == 0:
            self._drop()

    def can_rollback(self, counts: Tensor, rows: Tensor) -> bool:
        """Whether ``counts[i]`` tokens, int64, can be taken back of row ``rows[i]``; columns are left as they are.

        As many as come after the first token whose context is among the ids that are kept: `Lane.max_rollback`.
        """
        most = {row: lane.max_rollback for lane in self.lanes for row in lane.rows}
        return all(count <= most[row] for count, row in zip(counts.tolist(), rows.tolist(), strict=True))

    def rollback(self, counts: int | Tensor) -> None:
        """Forget the last ``counts`` tokens of every row, int64 ``[batch]``; columns are left as they are.

        Raises RuntimeError, with nothing changed, if they cannot all be taken back: `can_rollback`.
        """
        by_row = [counts] * self.batch_size if isinstance(counts, int) else counts.tolist()
        for lane in self.lanes:
            for row in lane.rows:
                if by_row[row] > lane.max_rollback:
                    raise RuntimeError(
                        f"cache: can go back {lane.max_rollback} tokens more (headroom {self.layout.headroom}), got "
                        f"{by_row[row]} in row {row}"
                    )
        parts = [part for lane in self.lanes for part in lane.split(by_row).items()]
        for count, lane in parts:
            lane.rollback(count)
        self.lanes = [lane for _, lane in parts]
        self._changed()
        self.state.note_rollback(counts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was: integers ``[batch]``."""
        if self.lanes:
            device = self.lanes[0].ids.device
            beam_idx = beam_idx.to(device, torch.int64)
            check_tensor("beam_idx", beam_idx, (self.batch_size,), torch.int64, device)
            self._take_rows(beam_idx)
            self.state.take_rows(beam_idx)

    def _take_rows(self, indices: Tensor) -> None:
        if len(self.lanes) == 1:
            # Nothing has to be read from the device.
            self.lanes = [self.lanes[0].take(indices, range(len(indices)))]
        else:
            sources, lanes = indices.tolist(), []
            if not all(0 <= source < self.batch_size for source in sources):
                raise IndexError(f"indices: expected rows from 0 to {self.batch_size - 1}, got {sources}")
            for lane in self.lanes:
                places = {row: place for place, row in enumerate(lane.rows)}
                rows = [row for row, source in enumerate(sources) if source in places]
                if rows:
                    taken = torch.tensor([places[sources[row]] for row in rows], device=indices.device)
                    lanes.append(lane.take(taken, rows))
            self.lanes = lanes
        self._changed()

    def reset(self) -> None:
        """Start all streams anew; nothing of the old ones is left in memory."""
        super().reset()
        self._drop()
