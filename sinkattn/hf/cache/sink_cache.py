"""The cache of an enabled model: one ring per attention layer behind transformers' `Cache` interface."""

from __future__ import annotations

import copy
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from sinkattn.argument_checks import check_whole
from sinkattn.hf.cache.id_history import IdHistory
from sinkattn.hf.cache.layers import SinkLayer, layer_tensors, load_layer
from sinkattn.hf.cache.state import SharedCacheState
from sinkattn.hf.cache.stream_file import SavedStreams, write_streams
from sinkattn.hf.fingerprint import fingerprint
from sinkattn.hf.model_patch import ModelPatch, find_patch, get_patch, require_patch
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache
from sinkattn.rope import cache_positions


class SinkCache(Cache):
    """Constant-memory cache of an enabled model; pass it as ``cache`` (until transformers
    5.23: ``past_key_values``) and keep it between turns.

    Each layer holds its sink tokens and a ring of recent tokens. `generate` of an enabled model creates a cache if none
    is passed; create your own to continue the stream later. ``copy.deepcopy`` forks it; `save` saves it to a file.

    Args:
        model: a model that `sinkattn.enable` has prepared.
        max_batch_size: refuse larger batches. Memory is allocated in the first forward, for its batch size.
        num_sinks: first tokens of these streams that are never evicted, such as those of a system prompt; default: that
            of `sinkattn.enable`. The window stays the same.

    Raises:
        TypeError, ValueError: for an invalid argument, such as a model that is not enabled, or num_sinks that are, with
            the window, beyond what the model takes.
    """

    layers: list[Any]
    """A `SinkLayer` for each layer that attends; those of transformers for other kinds of state."""

    def __new__(cls, model: PreTrainedModel | None = None, *args: Any, **kwargs: Any) -> SinkCache:
        """Create the class of cache that the model's patch names."""
        patch = get_patch(model) if isinstance(model, nn.Module) else None  # no model when copied or unpickled
        return super().__new__(cls if patch is None or cls is not SinkCache else patch.cache_class)

    def __init__(
        self, model: PreTrainedModel, max_batch_size: int | None = None, *, num_sinks: int | None = None
    ) -> None:
        patch = require_patch(model)
        if max_batch_size is not None:
            check_whole("max_batch_size", max_batch_size, 1)
        self.patch_id: str = patch.id
        self._max_batch_size = max_batch_size
        layout = patch.layout if num_sinks is None else patch.layout_with(num_sinks)
        history = IdHistory(layout.num_sinks + layout.window + layout.headroom)
        self.state = SharedCacheState(layout, history, patch.cache_dtype)
        super().__init__(layers=patch.cache_layers(self.state))

    def __copy__(self) -> SinkCache:
        """Refused: two caches that share memory would overwrite each other."""
        raise TypeError("a SinkCache cannot be copied shallowly; copy.deepcopy makes an independent fork")

    def __deepcopy__(self, memo: dict[int, Any]) -> SinkCache:
        """An independent fork."""
        fork = memo[id(self)] = type(self).__new__(type(self))
        # No inference tensors, even under torch.inference_mode(): the fork may continue outside of it.
        with torch.inference_mode(False):
            fork.__dict__ = copy.deepcopy(self.__dict__, memo)
        return fork

    @property
    def layout(self) -> RingLayout:
        """Ring layout of all layers except those that keep a sliding window of their own."""
        return self.state.layout

    @property
    def max_seq_length(self) -> int:
        """The most tokens that precede a token in what it sees."""
        return self.layout.num_sinks + self.layout.window - 1

    @property
    def can_step(self) -> bool:
        """Whether decode steps may be compiled or captured in graphs: only once there is memory."""
        return self.state.counter_ring is not None

    @property
    def can_compile(self) -> bool:
        """Whether the decode step in progress may be compiled."""
        return True

    @property
    def graph_key(self) -> int | None:
        """Steps with the same key find their tensors at the same places, so one graph serves all; None: none may be."""
        return 0

    def relative_positions(self, positions: Tensor) -> Tensor:
        """Ranks of tokens at stream positions ``[1 or batch, tokens]`` among those that they see."""
        return cache_positions(positions, self.layout.num_sinks, self.layout.window)

    def ring_counters(self, ring: RingKVCache) -> tuple[Tensor, Tensor]:
        """Tokens of each row of a forward in a ring, int64 ``[batch]``, and counters for `ops.sink_attention_`."""
        return ring.seen, ring.arrivals

    def row_options(self, layout: RingLayout) -> dict[str, Any]:
        """Further arguments of the attention operator in a layer with this layout."""
        return {}

    @property
    def widest_window(self) -> int:
        """Tokens besides the sinks that some layer keeps in sight."""
        return max(layer.layout.window for layer in self._sink_layers)

    @property
    def tokens_seen(self) -> int:
        """Tokens fed to each row, padding included: the number of columns, equal for all rows."""
        return self.state.num_columns

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(layer.ring.nbytes for layer in self._sink_layers if layer.ring is not None)

    @property
    def seen(self) -> Tensor | None:
        """Tokens of each stream, without padding: int64 ``[batch]``, on the device; None before the first forward."""
        return None if self.state.counter_ring is None else self.state.counter_ring.seen

    @property
    def has_padding(self) -> bool:
        """Whether rows may have different numbers of tokens."""
        return self.state.history.has_padding

    @property
    def counts_from_prompt(self) -> bool:
        """Whether `generate` numbers positions from the start of its prompt, not from the start of the streams."""
        return self.state.generate_offset is not None

    @property
    def ended_rows(self) -> Tensor | None:
        """Rows that have ended and get padding from `generate`: bool ``[batch]``; None if there are none."""
        return self.state.ended_rows

    @property
    def has_states(self) -> bool:
        """Whether some layers keep a convolutional or recurrent state."""
        return bool(self._state_layers)

    @property
    def _sink_layers(self) -> list[SinkLayer]:
        return [layer for layer in self.layers if isinstance(layer, SinkLayer)]

    @property
    def _state_layers(self) -> list[LinearAttentionCacheLayerMixin]:
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    def note_inputs(self, ids: Tensor | None, *, only_ids: bool) -> None:
        """Note the ids passed to the whole model, whose decoder may get embeddings, and whether it got only ids."""
        self.state.model_ids = ids
        self.state.only_ids &= only_ids

    def check_padding(self, token_mask: Tensor) -> None:
        """Raise ValueError for padding in a model with states; token_mask: bool ``[batch, tokens]``."""
        if self.has_states and not token_mask.all():
            raise ValueError(
                "attention_mask: expected only ones, as padding would change the convolutional or recurrent states of "
                "this model; run rows of equal length, or one by one"
            )

    @property
    def is_usable(self) -> bool:
        """Whether the streams can continue."""
        return self.state.unusable_reason is None

    def check_usable(self) -> None:
        """Raise RuntimeError if the streams cannot continue."""
        if not self.is_usable:
            raise RuntimeError(f"cache: {self.state.unusable_reason}")

    def apply_pending_update(self) -> None:
        """Bring the cache to where the running `generate` continues it, in its first forward."""
        state = self.state
        if state.pending_update is not None:
            update, state.pending_update, length = state.pending_update, None, self.get_seq_length()
            update()
            state.generate_interrupted = True  # until generate finishes
            if state.generate_offset is not None:
                state.generate_offset = state.num_columns - length  # the update must not change get_seq_length

    def begin_forward(self, batch: int, tokens: int, ids: Tensor | None) -> None:
        """Start a forward of ``tokens`` new tokens per row; raises, with nothing changed, if the cache refuses it."""
        state = self.state
        if state.num_new_tokens:
            raise RuntimeError("cache: is in the middle of a forward already, in this thread or another")
        if (seen := self.seen) is not None and len(seen) != batch and state.num_columns:
            raise ValueError(f"cache: holds {len(seen)} streams, got a batch of {batch}")
        if self._max_batch_size is not None and batch > self._max_batch_size:
            raise ValueError(f"cache: max_batch_size is {self._max_batch_size}, got a batch of {batch}")
        self.check_usable()
        model_ids, state.model_ids = state.model_ids, None
        if ids is None and model_ids is not None and model_ids.shape == (batch, tokens):
            ids = model_ids
        if seen is not None and len(seen) != batch:
            self._free_memory()  # allocated for another batch size before a reset()
        state.num_new_tokens, state.forward_ids = tokens, ids

    def finish_forward(self, token_mask: Tensor | None) -> None:
        """Commit the forward: advance ``seen`` by its tokens.

        token_mask: bool ``[batch, tokens]``; None without padding.
        """
        ring, tokens = self.state.counters, self.state.num_new_tokens
        self.state.commit_columns(token_mask, ring.seen)
        ring.advance(tokens if token_mask is None else token_mask.sum(dim=1))

    def abandon_forward(self, *, written: bool) -> None:
        """End a failed forward without counting its tokens.

        The next forward overwrites them, so the streams can continue, unless they have overwritten tokens that its
        queries see, or have changed a state.

        Args:
            written: whether any layer may have written them.
        """
        state = self.state
        columns, tokens = state.num_columns, state.num_new_tokens
        state.num_new_tokens, state.forward_ids = 0, None
        if columns == 0:
            self._free_memory()
            return
        reason = (
            "an interrupted forward has overwritten tokens or states that the next one needs; call reset() and start a "
            "new stream"
        )
        if written:
            state.counters.note_uncounted(tokens)
            state.peak_columns = max(state.peak_columns, columns + tokens)
            for layout in {layer.layout for layer in self._sink_layers}:
                oldest_kept = columns + tokens - layout.ring
                if layout.window_begin(columns) < min(oldest_kept, columns):
                    state.unusable_reason = reason
        if self.has_states:
            state.unusable_reason = reason

    def _free_memory(self) -> None:
        self.state.counter_ring = None
        for state_layer in self._state_layers:
            LinearAttentionLayer.__init__(state_layer, state_layer.number_of_states)
        for sink_layer in self._sink_layers:
            sink_layer.free()

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back the last ``-tokens_to_remove`` columns (a negative number, as in transformers).

        A row with padding in these columns loses only its tokens. Until a ring is full, any number can be rolled back;
        then, up to the headroom.

        Raises ValueError for a positive number, and RuntimeError beyond the headroom or if a layer has a state that
        cannot be rolled back; nothing is changed then.
        """
        columns = -int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if columns < 0:
            raise ValueError(f"tokens_to_remove: expected a negative number of tokens, got {-columns}")
        state = self.state
        if state.num_columns == 0:
            return
        if columns:
            if any(
                not (layer.record_past and LinearAttentionLayer.is_croppable.__get__(layer))
                for layer in self._state_layers
            ):
                raise RuntimeError(
                    "cache: cannot roll back, as a convolutional or recurrent state does not record its past; assisted "
                    "decoding needs a model without such states"
                )
            counts: int | Tensor = columns
            if state.history.has_padding:
                token_mask = state.history.token_mask(state.num_columns - columns, state.num_columns)
                if token_mask is None:
                    recorded = state.num_columns - state.history.oldest_column
                    raise RuntimeError(
                        f"cache: can roll back {recorded} columns of a batch with padding, got {columns}; the padding "
                        "of earlier ones is not recorded"
                    )
                counts = token_mask.sum(dim=1)
            self.rollback(counts)
            state.num_columns -= columns
        for layer in self._state_layers:
            if layer.record_past:
                LinearAttentionLayer.crop(layer, -columns)

    def can_rollback(self, counts: Tensor, rows: Tensor) -> bool:
        """Whether row ``rows[i]`` can be rolled back by ``counts[i]`` tokens, both int64."""
        if self.has_states and counts.any():
            return False
        max_rollback = self.state.counters.max_rollback(self._effective_headroom)
        rows = rows.to(max_rollback.device)
        return bool((counts.to(rows.device) <= max_rollback[rows]).all())

    def rollback(self, counts: int | Tensor) -> None:
        """Remove the last ``counts`` tokens of each row, int64 ``[batch]``; the column count does not change.

        Raises RuntimeError, with nothing changed, if not `can_rollback`.
        """
        self.state.counters.rollback(counts, headroom=self._effective_headroom)
        self.state.note_rollback(counts)

    @property
    def _effective_headroom(self) -> int | None:
        # Until the smallest ring wraps around, no token has been overwritten. None: the headroom of the layout.
        smallest = min(layer.layout.slots for layer in self._sink_layers)
        return None if self.state.peak_columns > smallest else smallest

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # annotated as LongTensor, a legacy type
        self.state.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, its copies next to each other: several continuations of one stream."""
        if repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {repeats}")
        seen = self.seen
        if seen is not None:
            rows = torch.arange(len(seen), device=seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row ``indices[i]`` was, int64 ``[rows]``: drops streams, copies them, or both.

        A bool mask ``[batch]`` keeps the rows where it is True. Raises ValueError, with nothing changed, for indices
        out of range or more rows than ``max_batch_size``.
        """
        seen = self.seen
        if seen is None:
            return
        indices = self._check_rows(indices, len(seen), seen.device)
        self._take_rows(indices)
        self.state.take_rows(indices)

    def _check_rows(self, indices: Tensor, rows: int, device: torch.device) -> Tensor:
        indices = torch.as_tensor(indices, device=device)
        if indices.dtype == torch.bool and indices.shape == (rows,):
            indices = indices.nonzero().flatten()
        if indices.ndim != 1 or not len(indices) or indices.is_floating_point():
            raise ValueError(f"indices: expected int64 [rows], one or more, got {indices.dtype} {list(indices.shape)}")
        if self._max_batch_size is not None and len(indices) > self._max_batch_size:
            raise ValueError(f"cache: max_batch_size is {self._max_batch_size}, got {len(indices)} rows")
        indices = torch.where(indices < 0, indices + rows, indices).to(torch.int64)
        if not ((indices >= 0) & (indices < rows)).all():
            raise ValueError(f"indices: expected rows from 0 to {rows - 1}, got {indices.tolist()}")
        return indices

    def _take_rows(self, indices: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                # Accepts another number of rows.
                LinearAttentionLayer.reorder_cache(layer, indices)  # type: ignore[arg-type]  # as in reorder_cache
        # First the ring that owns the counters, because the others then take the new ones from it.
        for layer in sorted(self._sink_layers, key=lambda layer: layer.ring is not self.state.counter_ring):
            layer.take_rows(indices)

    def reset(self) -> None:
        """Start new streams in the same memory."""
        super().reset()
        self.state.clear()

    def save(self, path: str | Path) -> None:
        """Save the streams to a file, from which `sinkattn.load_stream` makes a cache, in another process too.

        The file is in the format of safetensors: the bytes of rings and states, 4 for each recorded id, that is for 66
        and each slot of each row (twice in a padded batch), with a cache_dtype one for each element of a key in each
        row, and a header of 1 to 3 KB and 100 bytes for each tensor. A file that exists is replaced: whoever reads
        it, also after a crash, finds the old one or the new one. A save that was killed may leave a folder
        ``.NAME.saving`` beside it, which the next save to this path removes.

        Raises:
            RuntimeError: in the middle of a forward or of `generate`; or the model is not enabled any more.
            OSError: the file cannot be written.
        """
        self.state.check_between_calls()
        write_streams(path, self.state_tensors(), fingerprint(find_patch(self.patch_id)), self.state_fields())

    def state_tensors(self) -> dict[str, Tensor]:
        """What `save` saves, rows first; nothing of streams without tokens."""
        if not self.state.num_columns:
            return {}
        tensors = self.state.state_tensors()
        for i, layer in enumerate(self.layers):
            tensors |= {f"layers.{i}.{name}": x for name, x in layer_tensors(layer).items()}
        return tensors

    def state_fields(self) -> dict[str, Any]:
        """What it saves besides tensors."""
        rows = len(self.seen) if self.seen is not None and self.state.num_columns else 0
        fields = {"rows": rows, "num_sinks": self.layout.num_sinks, "max_batch_size": self._max_batch_size}
        return {**fields, **self.state.state_fields()}

    def load_state(self, saved: SavedStreams) -> None:
        """Become the cache that was saved. This one must have fed its first tokens, if that one had, in any rows.

        Raises ValueError, with this cache left in pieces, if it does not fit.
        """
        self._max_batch_size = saved.field("max_batch_size", (int, NoneType))
        self.state.load_fields(saved)
        if not self.state.num_columns:
            return
        self.state.load_tensors(saved)
        for i, layer in enumerate(self.layers):
            load_layer(layer, saved.part(f"layers.{i}"))


def check_cache(patch: ModelPatch, name: str, cache: Any) -> None:
    """Raise TypeError or ValueError unless ``cache``, passed as argument ``name``, is None or made for this patch."""
    if cache is None:
        return
    if not isinstance(cache, SinkCache):
        raise TypeError(
            f"{name}: expected a sinkattn.SinkCache or None, got {type(cache).__name__}; if you passed none, the "
            "model around the enabled one made it: enable the outer model instead, or give it a SinkCache; prefix "
            "tuning is not supported"
        )
    if cache.patch_id != patch.id:
        raise ValueError(f"{name}: this SinkCache was made for another model or before the last enable()")
