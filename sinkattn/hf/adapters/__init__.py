"""Adapters for families that do not call transformers' attention function, one module each.

The probe cannot record their attention. An adapter provides two functions instead: `position_encoding` returns the
family's rotary embedding or ALiBi slopes, and `forward` computes queries, keys and values as the family does and
attends over the ring. The trial of `enable` checks the result against the original, as for every other model.

Modules of a family are annotated as Any: their attributes are known to its class only, which is not imported.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel

from sinkattn.hf.model_config import find_decoder
from sinkattn.hf.probe.masks import MaskPattern
from sinkattn.hf.probe.result import LayerInfo, ProbeResult

# Adapter module by class of attention module; by name, so that unused modeling files are not imported.
ADAPTERS = {
    "transformers.models.bloom.modeling_bloom.BloomAttention": "bloom",
    "transformers.models.codegen.modeling_codegen.CodeGenAttention": "codegen",
    "transformers.models.falcon.modeling_falcon.FalconAttention": "falcon",
    "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": "gpt_neox_japanese",
    "transformers.models.gptj.modeling_gptj.GPTJAttention": "gptj",
    "transformers.models.mpt.modeling_mpt.MptAttention": "mpt",
}

MASK_NAME = "sinkattn_adapted"


def probe_by_adapter(model: PreTrainedModel) -> ProbeResult | None:
    """Probe result from the adapter of a model's family; None without an adapter. Leaves the model unchanged.

    Raises:
        UnsupportedModelError: for a configuration that the adapter does not support.
    """
    decoder = find_decoder(model)
    adapter_names: dict[Any, str] = {
        module: name for module in decoder.modules() if (name := _adapter_name(module)) is not None
    }
    if not adapter_names:
        return None
    result = ProbeResult(decoder, [])
    for name in dict.fromkeys(adapter_names.values()):
        adapter = import_module(f"{__name__}.{name}")
        rotation, alibi_slopes = adapter.position_encoding(decoder)
        for module in (module for module, other in adapter_names.items() if other == name):
            result.layers[module] = LayerInfo(module.layer_idx, rotation, MaskPattern("full"), None, alibi_slopes)
            result.adapter_forwards[module] = partial(adapter.forward, module)
    return result


def _adapter_name(module: nn.Module) -> str | None:
    # Also for subclasses: a family has another class for flash attention.
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((ADAPTERS[name] for name in names if name in ADAPTERS), None)


def placeholder_mask(*args: Any, device: torch.device | None = None, **kwargs: Any) -> Tensor:
    """Mask function of decoders with an adapter: attention ignores the mask, but some decoders index it."""
    return torch.zeros(1, 1, 1, 1, device=device)


AttentionMaskInterface.register(MASK_NAME, placeholder_mask)
