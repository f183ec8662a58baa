"""`RowCache`: rings of many streams, of which each forward runs some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache
from sinkattn.rope import cache_positions

# Numbers of streams whose steps are compiled; the kernel for few tokens takes no more.
COMPILED_SIZES = (1, 2, 4)


class RowInput(NamedTuple):
    """A row that a forward appends tokens to."""

    row: int
    seen: int
    """Tokens of its stream before these."""
    num_sinks: int
    begin: int
    """First token that the window of these may hold."""


class Selection(NamedTuple):
    """Rows of the next forward, int64 ``[batch]`` each; see `RowInput`."""

    rows: Tensor
    seen: Tensor
    num_sinks: Tensor
    begins: Tensor


class RowCache(SinkCache):
    """Cache of many streams, whose lengths the caller keeps; a forward runs the rows that were selected for it.

    Args:
        model: an enabled model all of whose layers attend over rings.
        num_rows: rows of every ring.
        num_sinks: the most sinks of a row; slots for so many are allocated.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, *, num_sinks: int) -> None:
        super().__init__(model, num_rows, num_sinks=num_sinks)
        self.state.num_rows = num_rows
        self._selection: Selection | None = None
        self._device = model.device

    def select(self, inputs: Sequence[RowInput]) -> None:
        """Choose the rows of the next forward."""
        numbers = [[x.row, x.seen, x.num_sinks, x.begin] for x in inputs]
        # In one copy to the device.
        self._selection = Selection(*torch.tensor(numbers).T.contiguous().to(self._device, non_blocking=True))
        self.state.num_columns = max(x.seen for x in inputs)

    @property
    def seen(self) -> Tensor | None:
        """Tokens of the selected streams: int64 ``[batch]``, on the device."""
        return None if self._selection is None else self._selection.seen

    @property
    def has_padding(self) -> bool:
        """True: rows have different numbers of tokens."""
        return True

    @property
    def can_step(self) -> bool:
        """Whether a step may be compiled: only for a few numbers of streams, as each takes another graph."""
        return super().can_step and self._selection is not None and len(self._selection.rows) in COMPILED_SIZES

    @property
    def can_capture(self) -> bool:
        """False: every step has rows of its own."""
        return False

    def relative_positions(self, positions: Tensor) -> Tensor:
        """Ranks of tokens of the selected rows, at stream positions ``[batch, tokens]``, among those they see."""
        assert self._selection is not None
        return cache_positions(positions, self._selection.num_sinks, self.layout.window, self._selection.begins)

    def ring_counters(self, ring: RingKVCache) -> tuple[Tensor, Tensor]:
        """Tokens of the selected rows, and as many counters."""
        assert self._selection is not None
        return self._selection.seen, ring.arrivals[: len(self._selection.rows)]

    def row_options(self, layout: RingLayout) -> dict[str, Any]:
        """Arguments of the attention operator for the selected rows, in a layer with this layout."""
        assert self._selection is not None
        rows, _, num_sinks, begins = self._selection
        # A window of the model's own has no sinks.
        return {"rows": rows, "row_sinks": num_sinks if layout.num_sinks else None, "begins": begins}

    def begin_forward(self, batch: int, tokens: int, ids: Tensor | None) -> None:
        """Start a forward of the selected rows."""
        if self._selection is None or len(self._selection.rows) != batch:
            raise RuntimeError("cache: belongs to a StreamPool; use the pool's streams")
        self.state.num_new_tokens = tokens

    def finish_forward(self, token_mask: Tensor | None) -> None:
        """End the forward; the caller counts its tokens."""
        self.state.num_new_tokens, self._selection = 0, None

    def abandon_forward(self, *, written: bool) -> None:
        """End a forward that failed."""
        self.finish_forward(None)
