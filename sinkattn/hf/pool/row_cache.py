"""`RowCache`: rings of many streams, of which each forward runs some."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.pool.transfer import to_device
from sinkattn.hf.swap.ring_patch import RingPatch
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache
from sinkattn.rope import cache_positions

# Numbers of streams whose steps are compiled; the kernel for few tokens takes no more.
COMPILED_SIZES = (1, 2, 4)


class RowInput(NamedTuple):
    """Tokens that a forward appends to a row; none, if the row is idle."""

    row: int
    seen: int
    """Tokens of its stream before these."""
    num_sinks: int
    begin: int
    """First token that the window of these may hold."""
    ids: Sequence[int]


class Selection(NamedTuple):
    """Rows of the next forward, int64 ``[batch]`` each; see `RowInput`."""

    rows: Tensor
    seen: Tensor
    num_sinks: Tensor
    begins: Tensor
    lengths: Tensor
    """Tokens that are appended."""


NUM_NUMBERS = len(Selection._fields) + 1  # of a row of a step, its id among them


class RowCache(SinkCache):
    """Cache of many streams, whose lengths the caller keeps; a forward runs the rows that were selected for it.

    Where steps are captured in graphs, there is one for each of a few sizes: 1, 2, 4, 8 and so on. A step of another
    number of streams runs idle rows as well, which stay as they are.

    Args:
        model: an enabled model all of whose layers attend over rings.
        num_rows: rows of every ring.
        num_sinks: the most sinks of a row; slots for so many are allocated.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, *, num_sinks: int) -> None:
        super().__init__(model, num_rows, num_sinks=num_sinks)
        self.state.num_rows = self._num_rows = num_rows
        patch = require_patch(model)
        assert isinstance(patch, RingPatch)
        self._patch, self._device = patch, model.device
        self._selection: Selection | None = None
        self._is_captured = False
        with torch.inference_mode(False):
            # Numbers and ids of a captured step, where graphs find them.
            self._step_numbers = torch.empty(NUM_NUMBERS * num_rows, dtype=torch.int64, device=model.device)

    def select(self, inputs: Sequence[RowInput]) -> tuple[Tensor, Tensor | None]:
        """Choose the rows of the next forward.

        Returns:
            Its ids, int64 ``[batch, tokens]``, at the right, and its mask, bool; None if all rows have as many tokens.
            A step may have idle rows after the others.
        """
        width = max(len(x.ids) for x in inputs)
        self._is_captured = width == 1 and self._patch.captures_steps
        if self._is_captured:
            inputs = [*inputs, *self._idle_rows({x.row for x in inputs})]
        columns = [(*x[:4], len(x.ids), *[0] * (width - len(x.ids)), *x.ids) for x in inputs]
        numbers = torch.tensor([*zip(*columns, strict=True)])
        out = self._step_numbers[: numbers.numel()].view_as(numbers) if self._is_captured else None
        there = to_device(numbers, self._device, out)
        self._selection, self.state.num_columns = Selection(*there[: NUM_NUMBERS - 1]), max(x.seen for x in inputs)
        mask = None
        if not self._is_captured and any(len(x.ids) < width for x in inputs):
            mask = torch.arange(width, device=self._device) >= width - self._selection.lengths.unsqueeze(1)
        return there[NUM_NUMBERS - 1 :].T.contiguous(), mask

    def _idle_rows(self, taken: set[int]) -> list[RowInput]:
        """Rows that make a step one of the next size for which there is a graph."""
        size = min(1 << (len(taken) - 1).bit_length(), self._num_rows)
        free = (row for row in range(self._num_rows) if row not in taken)
        return [RowInput(row, 0, 0, 0, ()) for row in islice(free, size - len(taken))]

    @property
    def seen(self) -> Tensor | None:
        """Tokens of the selected streams: int64 ``[batch]``, on the device."""
        return None if self._selection is None else self._selection.seen

    @property
    def has_padding(self) -> bool:
        """True: rows have different numbers of tokens."""
        return True

    @property
    def can_compile(self) -> bool:
        """Whether the step in progress may be compiled: only of a few sizes, as each takes another graph."""
        return self._selection is not None and len(self._selection.rows) in COMPILED_SIZES

    @property
    def graph_key(self) -> int | None:
        """Rows of the step in progress, idle ones too; None if it is not one to be captured."""
        return len(self._selection.rows) if self._selection is not None and self._is_captured else None

    @property
    def ended_rows(self) -> Tensor | None:
        """Idle rows of the step in progress, which get padding: bool ``[batch]``; None if there cannot be any."""
        if self._selection is None or not self._is_captured or self._num_rows == 1:
            return None
        return self._selection.lengths == 0

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
        rows, _, num_sinks, begins, _ = self._selection
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
