"""How far an enabled model is from what it must compute, measured without its caches: see `Differences`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from families import FAMILIES, FULL, REENCODE, SLIDING, build, random_ids
from torch import nn

import sinkattn
from sinkattn.cli.info import model_facts
from sinkattn.hf.reencode.lanes import context_start
from sinkattn.reference import visible

S, W = 4, 12
TOKENS = 80
CHUNKS = (1, 7)
# Around every border: the last sink, the native window, the window, the cache, one turn of the ring, the end.
ASKED = (0, 3, 4, 9, 10, 15, 16, 17, 28, 41, 60, 79)

# What modules are called in which tokens see each other, within a layer.
MIXER = re.compile(r"self_attn|attn|(self_|multi_head_)?attention|norm_attn_norm\.attn|linear_attn|conv|mamba|mixer")


def spread(x: torch.Tensor) -> float:
    """How much outputs differ from each other."""
    return float((x - x.mean(dim=-1, keepdim=True)).square().mean().sqrt())


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Error as a fraction of the spread of the wanted logits."""
    return float((got - want).double().square().mean().sqrt()) / spread(want.double())


@dataclass(frozen=True)
class Differences:
    """Differences of an enabled model of a family, each a fraction of the spread of its outputs; None: says nothing."""

    short: float | None
    """From the model as it was, on ``S + W`` tokens."""
    gathered: float | None
    """In one attention layer: from the model as it was, on nothing but the tokens that a query sees."""
    chunks: float
    """Token by token, and in chunks, from one call."""
    sliding: float | None
    """All layers, no sinks: from the model as it was, under a mask."""


@torch.no_grad()
def measure(family: str) -> tuple[Differences, str]:
    """Differences of a family, and its rotary embeddings in words; raises what `sinkattn.enable` raises."""
    model, ids = build(family), random_ids(2, TOKENS)
    start = ids[:, : S + W]
    as_it_was = _logits(model, start)
    masked = _logits(model, ids, attention_mask=sliding_mask(model)) if FAMILIES[family].mask else None
    facts = model_facts(model, S, W)
    sinkattn.enable(model, S, W)
    one_call = model(ids).logits
    short = rms_error(model(start).logits, as_it_was)
    chunks = max(rms_error(stream(model, ids, size), one_call) for size in CHUNKS)
    sinkattn.disable(model)
    sliding = None
    if masked is not None:
        sliding = rms_error(sinkattn.enable(model, 0, W)(ids).logits, masked)
    if FAMILIES[family].path == REENCODE:
        return Differences(short, _gathered(build(family), ids, reencoded_context), chunks, sliding), "none"
    errors = []
    for layer in FAMILIES[family].lone:
        model = build(family)
        silence_others(model, layer)
        errors.append(_gathered(model, ids, partial(seen_by, model, layer)))
    return Differences(short, max(errors, default=None), chunks, sliding), _in_words(facts["rotary_by_layer"])


def stream(model: Any, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of an enabled model that is given ``size`` tokens at a time."""
    cache = sinkattn.SinkCache(model)
    return torch.cat([model(part, cache=cache).logits for part in ids.split(size, dim=1)], dim=1)


def sliding_mask(model: Any, window: int = W) -> torch.Tensor | dict[str, torch.Tensor | None]:
    """Mask of ``window`` tokens, or of a layer's own window if that is narrower, as the model takes it."""
    config = model.config.get_text_config(decoder=True)
    native = getattr(config, "sliding_window", None) or window
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return _mask(min(window, native))
    if kinds == {FULL}:
        return _mask(window)
    narrow = _mask(min(window, native))
    masks = dict.fromkeys((FULL, "chunked_attention", "hybrid"), _mask(window))
    # Layers that keep a state take a mask of padding, which there is none of.
    return {**masks, SLIDING: narrow, "hybrid_sliding": narrow, "linear_attention": None, "conv": None}


def seen_by(model: Any, layer: int, token: int) -> list[int]:
    """Tokens that the query of a token sees in one layer: its own window if it has a narrow one among others."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] == SLIDING:
        return list(range(max(0, token - config.sliding_window + 1), token + 1))
    return visible(token, S, W)


def reencoded_context(token: int) -> list[int]:
    """Tokens that are in the context of a token in a model that streams by re-encoding."""
    first = context_start(token, sinkattn.ops.RingLayout(S, W, 0))
    return [*range(min(S, token + 1)), *range(first, token + 1)]


def silence_others(model: Any, lone: int) -> None:
    """Leave one layer in which tokens see each other; the others add nothing, in the model as it was or enabled."""
    layers = next(
        module for module in model.modules() if isinstance(module, nn.ModuleList) and all(map(_mixers, module))
    )
    for index, layer in enumerate(layers):
        for mixer in _mixers(layer) if index != lone else ():
            mixer.register_forward_hook(_nothing)


def _mixers(layer: nn.Module) -> list[nn.Module]:
    modules = dict(layer.named_modules())
    if "self_attention.dense" in modules:
        return [modules["self_attention.dense"]]  # bloom adds the residual within its attention
    return [module for name, module in modules.items() if MIXER.fullmatch(name)]


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)([torch.zeros_like(output[0]), *output[1:]])
    return torch.zeros_like(output)


def _gathered(model: Any, ids: torch.Tensor, seen: Callable[[int], list[int]]) -> float:
    want = []
    # Tokens that see equally many run as rows of one batch.
    for _, tokens in groupby(ASKED, key=lambda token: len(seen(token))):
        rows = [ids[:, seen(token)] for token in tokens]
        want += _logits(model, torch.cat(rows))[:, -1].split(len(ids))
    sinkattn.enable(model, S, W)
    return rms_error(model(ids).logits[:, list(ASKED)], torch.stack(want, dim=1))


def _logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(ids, use_cache=False, **options).logits


def _mask(window: int) -> torch.Tensor:
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    mask = torch.where((distance >= 0) & (distance < window), 0.0, torch.finfo(torch.float32).min)
    return mask.expand(2, 1, TOKENS, TOKENS)


def _in_words(kinds: list[str]) -> str:
    """Rotary embeddings of all layers: each kind once, with the number of its layers where there are several."""
    counts = {kind: kinds.count(kind) for kind in kinds}
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{kind} (in {count} of {len(kinds)} layers)" for kind, count in counts.items())
