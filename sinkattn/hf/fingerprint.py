"""Fingerprint of a model: what must be equal for a stream to go on in another process, in few bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from types import NoneType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sinkattn.hf.model_patch import ModelPatch
from sinkattn.hf.plain_tensors import plain_tensors

Accepted = Literal["dtype", "weights"]

# Values of each tensor that are compared.
NUM_SAMPLES = 32
# Weights in one of these dtypes are compared in it with weights in any other.
COARSER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Attributes of peft's layers that decide what adapters do.
ADAPTER_SETTINGS = ("_active_adapter", "_disable_adapters", "scaling")
# Parts of the names of configuration fields without an effect on the outputs for a stream, besides those that every
# configuration has.
WITHOUT_EFFECT = ("use_cache", "token_id", "dropout", "pdrop", "initializer", "quantization_config")


def fingerprint(patch: ModelPatch) -> dict[str, Any]:
    """What a stream of an enabled model depends on, as JSON: class, configuration, layout, dtypes and weights.

    Of each tensor of the state dict 32 values are read, at places that depend only on its size, with names and shapes,
    and which adapters are active; what is kept are 64 bits of SHA-256 of that, in the dtype of the weights and rounded
    to others. So another checkpoint, a merged adapter or a fine-tuned model, where nearly every value is another one,
    is noticed; a change of a few values, such as one row of an embedding, may not be, nor one that somebody hides.
    """
    model, layout = patch.model, patch.layout
    return {
        "class": type(model).__name__,
        "config": _config_fields(model),
        "layout": [layout.num_sinks, layout.window, layout.headroom],
        **({} if patch.cache_dtype is None else {"cache_dtype": patch.cache_dtype}),
        "dtype": str(model.dtype),
        "weights": _weight_digests(model),
    }


def check_fingerprint(patch: ModelPatch, saved: Any, accept: Collection[Accepted]) -> None:
    """Raise ValueError, with the field, if the model is not that of a saved `fingerprint`, but for what is accepted."""
    if not isinstance(accept, (tuple, list, set, frozenset)) or not set(accept) <= set(get_args(Accepted)):
        raise ValueError(f"accept: expected some of {get_args(Accepted)}, got {accept!r}")
    want = fingerprint(patch)
    kinds = {name: type(x) for name, x in want.items()} | {"cache_dtype": (str, NoneType)}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"path: model: expected {sorted(want)}, got {saved!r}")
    _check_same("class", want["class"], saved["class"])
    # Another version of transformers may have more fields.
    for name in sorted(want["config"].keys() & saved["config"].keys()):
        _check_same(f"config.{name}", want["config"][name], saved["config"][name])
    _check_same("layout", want["layout"], saved["layout"], " (num_sinks, window, headroom)")
    _check_same("cache_dtype", want.get("cache_dtype"), saved.get("cache_dtype"))
    if "dtype" not in accept:
        _check_same("dtype", want["dtype"], saved["dtype"], "; accept=('dtype',) would convert it")
    digests = {"exact"} if want["dtype"] == saved["dtype"] else want["weights"].keys() - {"exact"}
    if "weights" not in accept and all(want["weights"][name] != saved["weights"].get(name) for name in digests):
        name = min(digests)
        hint = "; accept=('weights',) goes on with the model's, on keys and values that others have made"
        _check_same("weights", want["weights"][name], saved["weights"].get(name), hint)


def _check_same(name: str, want: Any, got: Any, hint: str = "") -> None:
    if want != got:
        raise ValueError(f"path: {name}: expected {want}, as this model has it, got {got}{hint}")


def _config_fields(model: PreTrainedModel) -> dict[str, Any]:
    """Fields of the configuration that may have an effect, as JSON."""
    of_all = PreTrainedConfig().to_dict()
    fields = model.config.get_text_config(decoder=True).to_dict()
    named = {name: x for name, x in fields.items() if not any(part in name for part in WITHOUT_EFFECT)}
    chosen = {name: x for name, x in named.items() if name not in of_all and not name.startswith("_")}
    return json.loads(json.dumps(chosen, default=str))


def _tensors(x: Any) -> Iterator[Tensor]:
    """The plain tensors of an entry of a state dict, which PyTorch's own quantization packs into tuples."""
    if isinstance(x, tuple):
        for each in x:
            yield from _tensors(each)
    else:
        yield from plain_tensors(x)


@torch.no_grad()
def _weight_digests(model: nn.Module) -> dict[str, str]:
    shapes, dtypes, samples = [], [], []
    for name, x in model.state_dict(keep_vars=True).items():
        for part in _tensors(x):
            shapes.append(f"{name} {list(part.shape)}")
            dtypes.append(str(part.dtype))
            samples.append(_sample(part))
    for path, module in model.named_modules():
        shapes += [f"{path}.{name} {vars(module)[name]}" for name in ADAPTER_SETTINGS if name in vars(module)]
    values = torch.cat(samples).cpu()
    digests = {"exact": _digest([*shapes, *dtypes], values)}
    return digests | {name: _digest(shapes, values.to(dtype).double()) for name, dtype in COARSER_DTYPES.items()}


def _sample(x: Tensor) -> Tensor:
    """Some values of a tensor, spread over it: float64 ``[up to NUM_SAMPLES]``, on its device."""
    size = x.numel()
    # Multiples of the golden ratio, modulo 1: regular steps would all be in one column of a matrix.
    places = [(i * 0x9E3779B97F4A7C15 % 2**64) * size >> 64 for i in range(min(size, NUM_SAMPLES))]
    x = x.int_repr() if x.is_quantized else x
    x = x.view(torch.uint8) if x.element_size() == 1 else x
    return x.take(torch.tensor(places, dtype=torch.int64).to(x.device)).double()


def _digest(names: list[str], values: Tensor) -> str:
    return hashlib.sha256("\n".join(names).encode() + values.numpy().tobytes()).hexdigest()[:16]
