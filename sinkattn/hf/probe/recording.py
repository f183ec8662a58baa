"""Run a decoder with an attention function that records queries, keys, values and masks."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sinkattn.hf.model_config import attention_implementation
from sinkattn.hf.probe.masks import MaskPattern, classify_mask
from sinkattn.hf.ranks import wait_for_ranks

ATTENTION_NAME = "sinkattn_probe"


@dataclass
class AttentionCall:
    """Arguments of one call of the attention function."""

    module: Any
    """The `nn.Module` that attends; its attributes, such as ``layer_idx``, are those of its family."""
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass(eq=False)
class Recording:
    """Attention calls, masks and output of one forward of the decoder."""

    calls: list[AttentionCall] = field(default_factory=list)
    mask_patterns: list[MaskPattern | None] = field(default_factory=list)
    """Pattern of each mask that the model asked for; None if not full causal, sliding window or chunked."""
    output: Tensor = field(init=False)
    """Last hidden states."""

    @staticmethod
    def has_own_mask(call: AttentionCall) -> bool:
        """Whether the mask of a call is not one that `_record_mask` returned, or a slice of it."""
        return call.mask is not None and not (isinstance(call.mask, Tensor) and call.mask.dtype == torch.int32)

    def mask_pattern(self, call: AttentionCall) -> MaskPattern | None:
        """Pattern of the mask of a call; None if not full causal, sliding window or chunked."""
        return MaskPattern("full") if call.mask is None else self.mask_patterns[int(call.mask.flatten()[0])]


_recording: ContextVar[Recording] = ContextVar("sinkattn_recording")


def _record_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    _recording.get().calls.append(AttentionCall(module, query, key, value, attention_mask, options))
    # Return the values: independent of queries and keys, so rotation does not change the inputs of later layers.
    group_size = query.shape[1] // value.shape[1]
    return value.repeat_interleave(group_size, dim=1).transpose(1, 2).contiguous(), None


def _record_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor:
    patterns = _recording.get().mask_patterns
    patterns.append(MaskPattern("full") if mask_function is None else classify_mask(mask_function, device))
    # Return the pattern's index in a mask-shaped tensor, which models may slice.
    return torch.full((batch_size, 1, q_length, kv_length), len(patterns) - 1, dtype=torch.int32, device=device)


AttentionInterface.register(ATTENTION_NAME, _record_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _record_mask)


def record_forward(decoder: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> Recording:
    """Run the decoder on ids ``[tokens]`` with the recording attention function."""
    wait_for_ranks(decoder)
    recording = Recording()
    token = _recording.set(recording)
    try:
        with attention_implementation(decoder, ATTENTION_NAME):
            recording.output = decoder(input_ids=ids.unsqueeze(0), use_cache=False, **inputs)[0]
    finally:
        _recording.reset(token)
    return recording
