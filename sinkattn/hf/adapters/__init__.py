"""Adapters for families whose attention does not go through transformers' attention function, one file each.

A probe cannot see into those. An adapter knows a family instead: how positions come into its attention, and a forward
that makes queries, keys and values as the family does and attends over the ring. What it knows is checked like what a
probe finds: on a short input the swapped model must agree with the original.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel

from sinkattn.hf.model_config import find_decoder
from sinkattn.hf.probe.masks import MaskPattern
from sinkattn.hf.probe.result import LayerInfo, ProbeResult

# By the class of a family's attention modules. Their code is not imported here: not everyone needs all of it.
FAMILIES = {
    "transformers.models.bloom.modeling_bloom.BloomAttention": "bloom",
    "transformers.models.codegen.modeling_codegen.CodeGenAttention": "codegen",
    "transformers.models.falcon.modeling_falcon.FalconAttention": "falcon",
    "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": "gpt_neox_japanese",
    "transformers.models.gptj.modeling_gptj.GPTJAttention": "gptj",
    "transformers.models.mpt.modeling_mpt.MptAttention": "mpt",
}

MASK_NAME = "sinkattn_adapted"


def find(model: PreTrainedModel) -> ProbeResult | None:
    """What the adapter of a model's family knows about it; None if there is none. Leaves the model as it was.

    Raises:
        UnsupportedModelError: the model does something that its adapter does not.
    """
    decoder = find_decoder(model)
    families = {module: name for module in decoder.modules() if (name := _family(module)) is not None}
    if not families:
        return None
    probe_result = ProbeResult(decoder, [])
    for name in dict.fromkeys(families.values()):
        family = import_module(f"{__name__}.{name}")
        rotation, slopes = family.positions(decoder)
        for module in (module for module, its in families.items() if its == name):
            probe_result.layers[module] = LayerInfo(module.layer_idx, rotation, MaskPattern("all"), None, slopes)
            probe_result.forwards[module] = partial(family.forward, module)
    return probe_result


def _family(module: nn.Module) -> str | None:
    # Subclasses too: a family has another class for flash attention.
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def no_mask(*args, device: torch.device | None = None, **kwargs) -> Tensor:
    """Mask function of decoders with an adapter: nothing reads the mask, but some decoders work on it."""
    return torch.zeros(1, 1, 1, 1, device=device)


AttentionMaskInterface.register(MASK_NAME, no_mask)
