"""One forward with an attention function that records queries, keys and masks."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sinkattn.hf.model_config import attention_implementation
from sinkattn.hf.probe.masks import MaskPattern, mask_pattern

PROBE_NAME = "sinkattn_probe"


@dataclass
class Call:
    """One call of the attention function during a probe."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass(eq=False)
class Recording:
    """What one forward of a probe leaves."""

    calls: list[Call] = field(default_factory=list)
    masks: list[MaskPattern | None] = field(default_factory=list)
    """What each mask shows that the model asked for; None if that is nothing known."""
    output: Tensor | None = None
    """Hidden states that the decoder makes of it."""

    def visible(self, call: Call) -> MaskPattern | None:
        """What a call's query sees; None if nobody knows."""
        if call.mask is None:
            return MaskPattern("all")
        if not isinstance(call.mask, Tensor) or call.mask.dtype != torch.int32:
            return None
        return self.masks[int(call.mask.flatten()[0])]


_recording: ContextVar[Recording] = ContextVar("sinkattn_recording")


def _record(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    _recording.get().calls.append(Call(module, query, key, value, attention_mask, options))
    # Neither queries nor keys: rotating them must not change what later layers see.
    heads = query.shape[1] // value.shape[1]
    return value.repeat_interleave(heads, dim=1).transpose(1, 2).contiguous(), None


def _record_mask(batch_size, q_length, kv_length, *args, mask_function=None, device=None, **kwargs) -> Tensor:
    masks = _recording.get().masks
    masks.append(MaskPattern("all") if mask_function is None else mask_pattern(mask_function, device))
    # Instead of a mask its number, of the shape of a mask: models may slice it.
    return torch.full((batch_size, 1, q_length, kv_length), len(masks) - 1, dtype=torch.int32, device=device)


AttentionInterface.register(PROBE_NAME, _record)


AttentionMaskInterface.register(PROBE_NAME, _record_mask)


def record_forward(decoder: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> Recording:
    """Run the decoder on ids ``[tokens]`` with the recording attention function."""
    recording = Recording()
    token = _recording.set(recording)
    try:
        with attention_implementation(decoder, PROBE_NAME):
            recording.output = decoder(input_ids=ids.unsqueeze(0), use_cache=False, **inputs)[0]
    finally:
        _recording.reset(token)
    return recording
