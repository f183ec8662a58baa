"""Quantize the weights of a model's linear layers with torchao."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

Quantization = Literal["int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

GROUP = 32
"""Weights of a row that share a scale and a zero point in 4 bits."""


def quantize_weights(model: PreTrainedModel, quantization: Quantization) -> None:
    """Quantize the weights of all linear layers in place, the output head included; the embedding keeps its dtype.

    With int8 a row has one scale, with int4 every 32 weights of a row have one and a zero point. A head that is tied to
    the embedding is untied first: a step reads all of the head, but one row of the embedding. Layers whose size the
    4-bit kernels do not take keep their weights.

    Raises:
        ValueError: for a model that is quantized already, and for int4 in another dtype than bfloat16: on a CPU its
            products would be 50 times as slow, on a GPU there are none. Also if torchao is not installed.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("quantize: the weights of this model are quantized already")
    if quantization == "int4" and model.dtype != torch.bfloat16:
        raise ValueError(f"quantize: the kernels for int4 need bfloat16, got {str(model.dtype).removeprefix('torch.')}")
    config = _config(quantization, model.device)
    from torchao.quantization import quantize_

    def is_quantized(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (quantization == "int8" or _fits_int4(module))

    head: Any = model.get_output_embeddings()
    if not any(is_quantized(module, "") for module in model.modules() if module is not head):
        raise ValueError(
            f"quantize: {type(model).__name__} has no linear layers, or none of sizes that {quantization} takes"
        )
    if head is not None and is_quantized(head, "") and head.weight is model.get_input_embeddings().weight:
        _untie(model, head)
    quantize_(model, config, is_quantized)


def weight_bytes(model: PreTrainedModel) -> int:
    """Memory of all parameters of a model, on all of its ranks, in bytes; of quantized weights with their scales."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def quantized_share(model: PreTrainedModel) -> float:
    """Share of the parameters that `quantize_weights` has quantized, 0 to 1."""
    sizes = [(parameter.numel(), hasattr(parameter, "__tensor_flatten__")) for parameter in model.parameters()]
    return sum(size for size, is_quantized in sizes if is_quantized) / sum(size for size, _ in sizes)


def _bytes(tensor: Any) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or hasattr(tensor, "device_mesh"):  # a DTensor has the size of all shards
        return int(tensor.nbytes)
    names, _ = flatten()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def _config(quantization: Quantization, device: torch.device) -> Any:
    """The configuration of torchao whose weights a decode step multiplies fastest on a device."""
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError("quantize: needs torchao 0.18 or later: pip install 'sinkattn[quantize]'") from error
    # torchao would change settings of torch.compile for the whole process.
    if quantization == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cuda":
        return Int4WeightOnlyConfig(GROUP, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")
    return PrototypeInt4WeightOnlyConfig(GROUP, set_inductor_config=False)


def _fits_int4(linear: nn.Linear) -> bool:
    return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0


def _untie(model: PreTrainedModel, head: nn.Linear) -> None:
    """Give the output head weights of its own."""
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
