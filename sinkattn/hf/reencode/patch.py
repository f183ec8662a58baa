"""Streams for models with absolute position embeddings: the context is re-encoded when it is full.

Keys of such a model contain their position and cannot be moved. So the context grows to ``num_sinks + window`` tokens,
as without sinkattn. Then it is rebuilt: the sinks and the last half of the window remain, those of the window are
encoded at their new positions, and it grows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.layers import SinkLayer
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.cache.state import SharedCacheState
from sinkattn.hf.inputs import check_positions, new_token_mask, stream_positions
from sinkattn.hf.reencode.cache import LaneInput, Padding, ReencodeCache
from sinkattn.hf.reencode.lanes import Lane
from sinkattn.hf.swap.stream_patch import StreamPatch

# Tensors that a call may pass: the cache keeps the ids, and masks and positions follow from the stream. The last one is
# for the loss, which a Trainer's calls pass on.
ALLOWED_TENSORS = {"input_ids", "attention_mask", "position_ids", "num_items_in_batch"}


class ReencodePatch(StreamPatch):
    """Patch of a model with absolute position embeddings."""

    cache_class = ReencodeCache

    def cache_layers(self, state: SharedCacheState) -> list[SinkLayer]:
        """One layer, which reports the tokens seen; the lanes of the cache hold keys and values."""
        return [SinkLayer(state, state.layout)]

    def describe_steps(self, cache: Any) -> str:
        """How the decode steps of a cache run, and why."""
        return "launched one by one, as their context is encoded again from time to time"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the decoder: run each lane, with a rebuild where its context is full, and join the outputs."""
        kwargs = self.named_arguments(args, kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name not in ALLOWED_TENSORS:
                raise ValueError(
                    f"{name}: expected None, got a tensor; a model that streams by re-encoding takes input_ids only, "
                    "as rebuilding its context needs the ids"
                )
        ids = kwargs.get("input_ids")
        if ids is None:
            return self.run_decoder(**kwargs)  # raises the model's own error
        if ids.ndim != 2:
            raise ValueError(f"input_ids: expected [batch, tokens], got {list(ids.shape)}")
        batch, num_tokens = ids.shape
        cache = self.checked_cache(kwargs, batch, num_tokens)
        assert isinstance(cache, ReencodeCache)
        if self.decoder.training:
            self._check_trainable()

        config = self.decoder.config
        use_cache, return_dict = (
            kwargs[name] if kwargs.get(name) is not None else getattr(config, name, True)
            for name in ("use_cache", "return_dict")
        )
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        kwargs |= {"attention_mask": None, "use_cache": True, "return_dict": True}
        cache.begin_forward(batch, num_tokens, ids)
        try:
            padding = _padding(mask, cache, num_tokens)
            token_mask = None if padding is None else padding.token_mask
            if position_ids is not None and not cache.counts_from_prompt:
                check_positions(position_ids, stream_positions(cache, token_mask, num_tokens, ids.device), token_mask)
            inputs = cache.lane_inputs(ids, padding)
            # If all is padding, run one arbitrary token for the class and shapes of the outputs.
            run = inputs or [LaneInput(Lane(self.layout, [0], ids.new_empty(1, 0)), ids.new_zeros(1, 1), None)]
            output_classes, states = zip(*(self._run_lane(lane_input, kwargs) for lane_input in run), strict=True)
            last_hidden_state, *hidden_states = (
                _scatter(parts, inputs, batch, num_tokens) for parts in zip(*states, strict=True)
            )
            output = output_classes[0](
                last_hidden_state=last_hidden_state,
                **{self.cache_argument: cache if use_cache else None},
                hidden_states=tuple(hidden_states) or None,
            )
        except BaseException:
            cache.abandon_forward(written=False)
            raise
        cache.commit_inputs(inputs, token_mask)
        return output if return_dict else output.to_tuple()

    def _run_lane(self, lane_input: LaneInput, kwargs: dict[str, Any]) -> tuple[type, tuple[Tensor | None, ...]]:
        """Run the new tokens of a lane.

        Returns the class of the decoder's output, and its states: the last hidden states, then those of each layer if
        asked for. A layer's are None if only some layers were asked for, by index.
        """
        lane, parts = lane_input.lane, []

        def run(ids: Tensor, first_position: int) -> Any:
            positions = torch.arange(first_position, first_position + ids.shape[1], device=ids.device).unsqueeze(0)
            options = {"input_ids": ids, "position_ids": positions, self.cache_argument: lane.context}
            return self.run_decoder(**{**kwargs, **options})

        try:
            for ids, first_position, num_past, num_new in lane.segments(lane_input.ids):
                if num_past and torch.is_grad_enabled():
                    # What earlier calls have fed is a constant, although this call encodes it again.
                    with torch.no_grad():
                        run(ids[:, :num_past], first_position)
                    ids, first_position = ids[:, num_past:], first_position + num_past
                output = run(ids, first_position)
                states = (output.last_hidden_state, *(output.hidden_states or ()))
                parts.append([None if x is None else x[:, -num_new:] for x in states])
        finally:
            lane.drop_graph()
        joined = (None if xs[0] is None else torch.cat(xs, dim=1) for xs in zip(*parts, strict=True))
        return type(output), tuple(joined)

    def _check_trainable(self) -> None:
        """Raise RuntimeError for what skips layers or runs them again, in training mode."""
        self.check_no_checkpointing()
        rate = max(getattr(module, "layerdrop", 0.0) for module in self.decoder.modules())
        if rate:
            raise RuntimeError(
                f"layerdrop: expected 0 in training mode, got {rate}; a layer that is skipped leaves no keys for the "
                "tokens after; set this attribute of the decoder to 0, or call model.eval()"
            )


def _scatter(parts: Sequence[Tensor | None], inputs: list[LaneInput], batch: int, num_tokens: int) -> Tensor | None:
    """Join the states of all lanes to ``[batch, tokens, hidden]``, with zeros at padding."""
    present = [part for part in parts if part is not None]  # all or none of them
    if not present or (inputs and inputs[0].target is None):
        return parts[0]
    joined = present[0].new_zeros(batch, num_tokens, present[0].shape[-1])
    for lane_input, part in zip(inputs, present, strict=False):
        joined[lane_input.target] = part
    return joined


def _padding(attention_mask: Tensor | None, cache: SinkCache, num_tokens: int) -> Padding | None:
    """Padding among the new tokens, at any columns; None without padding."""
    token_mask = new_token_mask(attention_mask, cache, num_tokens)
    if token_mask is None:
        return None
    # Read on the host, although that synchronizes a GPU: the number of tokens per row decides which forwards run.
    num_new = token_mask.sum(dim=1).tolist()
    return None if min(num_new) == num_tokens else Padding(token_mask, num_new)
