"""`SinkCache` of a model that streams by re-encoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.cache.stream_file import SavedStreams
from sinkattn.hf.reencode.lanes import Lane, context_start
from sinkattn.ops import check_tensor


class Padding(NamedTuple):
    """Padding among the new tokens."""

    token_mask: Tensor
    """False at padding: bool ``[batch, tokens]``."""
    num_new: list[int]
    """Tokens of each row that are not padding."""


class LaneInput(NamedTuple):
    """New tokens of a lane."""

    lane: Lane
    ids: Tensor
    """int64 ``[rows of the lane, tokens]``, without padding."""
    target: tuple[Tensor, Tensor | slice] | None
    """Index of these tokens in ``[batch, tokens]`` of the call; None if they are the whole call."""


class ReencodeCache(SinkCache):
    """`SinkCache` of a model that streams by re-encoding: lanes, each with ids and one context."""

    def __init__(
        self, model: PreTrainedModel, max_batch_size: int | None = None, *, num_sinks: int | None = None
    ) -> None:
        super().__init__(model, max_batch_size, num_sinks=num_sinks)
        self._drop_lanes()

    def _drop_lanes(self) -> None:
        self.lanes: list[Lane] = []
        """Each row of the batch is in one lane; empty before the first forward."""
        self._seen: Tensor | None = None
        self.layers[0].__dict__.pop("batch_size", None)

    def _lanes_changed(self) -> None:
        self.layers[0].batch_size = sum(len(lane.rows) for lane in self.lanes)
        self._seen = None

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has seen, without padding, as known on the host."""
        lengths = {row: lane.seen for lane in self.lanes for row in lane.rows}
        return [lengths[row] for row in range(len(lengths))]

    @property
    def seen(self) -> Tensor | None:
        """Tokens that each row has seen, without padding: int64 ``[batch]``, on the device; None before any."""
        if self._seen is None and self.lanes:
            lane = self.lanes[0]
            if len(self.lanes) == 1:  # filled on the device, without a host copy
                self._seen = lane.ids.new_full((len(lane.rows),), lane.seen, dtype=torch.int64)
            else:
                self._seen = torch.tensor(self.lengths, device=lane.ids.device)
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers, and of the ids."""
        return sum(lane.nbytes for lane in self.lanes)

    @property
    def widest_window(self) -> int:
        """Tokens besides the sinks in the context of the last token: half of the window after a rebuild."""
        layout = self.layout
        return max((max(0, lane.seen - context_start(lane.seen - 1, layout)) for lane in self.lanes), default=0)

    def lane_inputs(self, ids: Tensor, padding: Padding | None) -> list[LaneInput]:
        """Distribute new ids ``[batch, tokens]`` to the lanes; returns the lanes that get some.

        A lane whose rows get different numbers of tokens is split first. Lanes never merge.
        """
        batch, tokens = ids.shape
        if not self.lanes:
            self.lanes = [Lane(self.layout, range(batch), ids.new_empty(batch, 0))]
        if padding is None and len(self.lanes) == 1:
            return [LaneInput(self.lanes[0], ids, None)]
        counts = [tokens] * batch if padding is None else padding.num_new
        parts = [(count, part) for lane in self.lanes for count, part in lane.split(counts).items()]
        self.lanes = [lane for _, lane in parts]
        if padding is not None:
            # Columns of each row, padding last.
            order = (~padding.token_mask).to(torch.int8).argsort(dim=1, stable=True)
        inputs = []
        for count, lane in parts:
            if count:
                rows = torch.tensor(lane.rows, device=ids.device)
                target = (rows, slice(None)) if padding is None else (rows.unsqueeze(1), order[rows, :count])
                inputs.append(LaneInput(lane, ids[target], target))
        return inputs

    def commit_inputs(self, inputs: list[LaneInput], token_mask: Tensor | None) -> None:
        """Commit the forward, in place of `finish_forward`: append its tokens, the ``inputs``, to their lanes.

        token_mask: bool ``[batch, tokens]``; None without padding.
        """
        before = self.seen
        assert before is not None  # lane_inputs has created lanes
        for lane, ids, _ in inputs:
            lane.append(ids)
        self._lanes_changed()
        self.state.commit_columns(token_mask, before)

    def abandon_forward(self, *, written: bool) -> None:
        """Discard the tokens of a forward that failed.

        written: has no effect; lanes get tokens only in `commit_inputs`.
        """
        self.state.num_new_tokens, self.state.forward_ids = 0, None
        if self.tokens_seen == 0:
            self._drop_lanes()

    def can_rollback(self, counts: Tensor, rows: Tensor) -> bool:
        """Whether ``counts[i]`` tokens, int64, can be rolled back in row ``rows[i]``; see `Lane.max_rollback`."""
        limits = {row: lane.max_rollback for lane in self.lanes for row in lane.rows}
        return all(count <= limits[row] for count, row in zip(counts.tolist(), rows.tolist(), strict=True))

    def rollback(self, counts: int | Tensor) -> None:
        """Forget the last ``counts`` tokens of every row, int64 ``[batch]``; the number of columns stays the same.

        Raises RuntimeError, with nothing changed, if `can_rollback` is false.
        """
        by_row = [counts] * self.batch_size if isinstance(counts, int) else counts.tolist()
        for lane in self.lanes:
            for row in lane.rows:
                if by_row[row] > lane.max_rollback:
                    raise RuntimeError(
                        f"cache: row {row} can roll back {lane.max_rollback} tokens more (headroom "
                        f"{self.layout.headroom}), got {by_row[row]}"
                    )
        parts = [part for lane in self.lanes for part in lane.split(by_row).items()]
        for count, lane in parts:
            lane.rollback(count)
        self.lanes = [lane for _, lane in parts]
        self._lanes_changed()
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
            # Without reading the indices on the host.
            self.lanes = [self.lanes[0].select(indices, range(len(indices)))]
        else:
            sources, lanes = indices.tolist(), []
            if not all(0 <= source < self.batch_size for source in sources):
                raise IndexError(f"indices: expected rows from 0 to {self.batch_size - 1}, got {sources}")
            for lane in self.lanes:
                index_in_lane = {row: i for i, row in enumerate(lane.rows)}
                rows = [row for row, source in enumerate(sources) if source in index_in_lane]
                if rows:
                    selected = torch.tensor([index_in_lane[sources[row]] for row in rows], device=indices.device)
                    lanes.append(lane.select(selected, rows))
            self.lanes = lanes
        self._lanes_changed()

    def reset(self) -> None:
        """Start new streams and free the memory of the old ones."""
        super().reset()
        self._drop_lanes()

    def state_tensors(self) -> dict[str, Tensor]:
        """What `save` saves, rows first."""
        tensors = super().state_tensors()
        for i, lane in enumerate(self.lanes if tensors else ()):
            tensors |= {f"lanes.{i}.{name}": x for name, x in lane.state_tensors().items()}
        return tensors

    def state_fields(self) -> dict[str, Any]:
        """What it saves besides tensors."""
        return {**super().state_fields(), "lanes": [lane.state_fields() for lane in self.lanes]}

    def load_state(self, saved: SavedStreams) -> None:
        """Become the cache that was saved; see `SinkCache.load_state`."""
        super().load_state(saved)
        if not self.state.num_columns:
            return
        new = self.lanes[0]
        self.lanes = [new.load(saved.part(f"lanes.{i}", x)) for i, x in enumerate(saved.field("lanes", list))]
        rows = sorted(row for lane in self.lanes for row in lane.rows)
        if rows != list(range(saved.rows)):
            raise ValueError(f"path: lanes: expected each of {saved.rows} rows in one of them, got rows {rows}")
        self._lanes_changed()
