"""Streams for models that add absolute positions to their embeddings: the context is encoded anew when it is full.

A key of such a model has its position in it for good and cannot be moved. So the context of a token grows up to
``num_sinks + window`` tokens, as it does without sinkattn; then the sinks and the last half of the window are kept,
those of the window are encoded at their new positions, and it grows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.layers import SinkLayer
from sinkattn.hf.cache.state import SharedCacheState
from sinkattn.hf.inputs import check_positions, new_token_mask, stream_positions
from sinkattn.hf.reencode.cache import LaneInput, Padding, ReencodeCache
from sinkattn.hf.reencode.lanes import Lane
from sinkattn.hf.swap.stream_patch import StreamPatch
from sinkattn.ops import check_no_gradients

PER_TOKEN = {"input_ids", "attention_mask", "position_ids"}


class ReencodePatch(StreamPatch):
    """What `enable` leaves on a model that adds positions to its embeddings."""

    cache_class = ReencodeCache

    def cache_layers(self, state: SharedCacheState) -> list[SinkLayer]:
        """One layer, which says how many tokens were seen; keys and values are in the lanes of the cache."""
        return [SinkLayer(state, self.layout)]

    def forward(self, *args, **kwargs) -> Any:
        """Forward of the decoder: cuts its tokens where the context is rebuilt, and joins the outputs."""
        kwargs = self.by_name(args, kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name not in PER_TOKEN:
                raise ValueError(f"{name}: a model that streams by re-encoding takes input_ids alone, they are kept")
        ids = kwargs.get("input_ids")
        if ids is None:
            return self.run_decoder(**kwargs)  # which says what is missing
        if ids.ndim != 2:
            raise ValueError(f"input_ids: expected [batch, tokens], got {list(ids.shape)}")
        batch, tokens = ids.shape
        cache = self.stream_of(kwargs, batch, tokens)
        if torch.is_grad_enabled():
            check_no_gradients(*self.decoder.parameters())

        config = self.decoder.config
        use_cache, return_dict = (
            kwargs[name] if kwargs.get(name) is not None else getattr(config, name, True)
            for name in ("use_cache", "return_dict")
        )
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        kwargs |= {"attention_mask": None, "use_cache": True, "return_dict": True}
        cache.begin_forward(batch, tokens, ids)
        try:
            padding = _padding(mask, cache, tokens)
            if position_ids is not None and not cache.counts_from_prompt:
                token_mask = None if padding is None else padding.token_mask
                check_positions(position_ids, stream_positions(cache, token_mask, tokens, ids.device), token_mask)
            arrivals = cache.arrivals(ids, padding)
            # Where there is nothing but padding, any token shows what the outputs look like.
            run = arrivals or [LaneInput(Lane(self.layout, [0], ids.new_empty(1, 0)), ids.new_zeros(1, 1), None)]
            kinds, states = zip(*(self._run_lane(arrival, kwargs) for arrival in run), strict=True)
            last_hidden_state, *hidden_states = (
                _place(parts, arrivals, batch, tokens) for parts in zip(*states, strict=True)
            )
            output = kinds[0](
                last_hidden_state=last_hidden_state,
                **{self.cache_argument: cache if use_cache else None},
                hidden_states=tuple(hidden_states) or None,
            )
        except BaseException:
            cache.abandon_forward()
            raise
        cache.finish_forward(arrivals, padding)
        return output if return_dict else output.to_tuple()

    def _run_lane(self, arrival: LaneInput, kwargs: dict[str, Any]) -> tuple[type, tuple[Tensor | None, ...]]:
        """Class of the decoder's output, and its states for what has arrived: the last hidden ones, then every layer's.

        Not all layers' are there if some were asked for by index.
        """
        parts = []
        for piece, first, new in arrival.lane.pieces(arrival.ids):
            positions = torch.arange(first, first + piece.shape[1], device=piece.device).unsqueeze(0)
            provided = {"input_ids": piece, "position_ids": positions, self.cache_argument: arrival.lane.context}
            output = self.run_decoder(**{**kwargs, **provided})
            states = (output.last_hidden_state, *(output.hidden_states or ()))
            parts.append([None if x is None else x[:, -new:] for x in states])
        joined = (None if xs[0] is None else torch.cat(xs, dim=1) for xs in zip(*parts, strict=True))
        return type(output), tuple(joined)


def _place(parts: Sequence[Tensor | None], arrivals: list[LaneInput], batch: int, tokens: int) -> Tensor | None:
    """States of what has arrived in one tensor ``[batch, tokens, hidden]``, each where its token is; else zeros."""
    if parts[0] is None or (arrivals and arrivals[0].where is None):
        return parts[0]
    placed = parts[0].new_zeros(batch, tokens, parts[0].shape[-1])
    for arrival, part in zip(arrivals, parts, strict=False):
        placed[arrival.where] = part
    return placed


def _padding(attention_mask: Tensor | None, cache: ReencodeCache, tokens: int) -> Padding | None:
    """Padding among the new tokens, anywhere in their rows; None if there is none."""
    token_mask = new_token_mask(attention_mask, cache, tokens)
    if token_mask is None:
        return None
    # Read even where that stops a GPU: how many tokens come decides what runs.
    counts = token_mask.sum(dim=1).tolist()
    return None if min(counts) == tokens else Padding(token_mask, counts)
