"""Differences between the logits of an enabled model and of the unpatched model, for the table of families."""

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
# Tokens at the boundaries: last sink, native window, window, full cache, first wrap of the ring, last token.
ASKED = (0, 3, 4, 9, 10, 15, 16, 17, 28, 41, 60, 79)

# Names of the modules within a layer in which tokens see each other.
MIXER = re.compile(r"self_attn|attn|(self_|multi_head_)?attention|norm_attn_norm\.attn|linear_attn|conv|mamba|mixer")


def spread(x: torch.Tensor) -> float:
    """Standard deviation over the last dimension, RMS over the others."""
    return float((x - x.mean(dim=-1, keepdim=True)).square().mean().sqrt())


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Error as a fraction of the spread of the wanted logits."""
    return float((got - want).double().square().mean().sqrt()) / spread(want.double())


@dataclass(frozen=True)
class Differences:
    """RMS errors of an enabled model, as fractions of the spread of the logits; None if a comparison does not apply."""

    short: float | None
    """Against the unpatched model, on ``S + W`` tokens."""
    gathered: float | None
    """With one active attention layer: against the unpatched model on only the visible tokens of each query."""
    chunks: float
    """Token by token, and in chunks: against one call."""
    sliding: float | None
    """With all layers and no sinks: against the unpatched model with a sliding-window mask."""


@torch.no_grad()
def measure(family: str) -> tuple[Differences, str]:
    """Differences of a family, and a description of its rotary embeddings; raises what `sinkattn.enable` raises."""
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
    """Logits of an enabled model that is fed ``size`` tokens at a time."""
    cache = sinkattn.SinkCache(model)
    return torch.cat([model(part, cache=cache).logits for part in ids.split(size, dim=1)], dim=1)


def sliding_mask(model: Any, window: int = W) -> torch.Tensor | dict[str, torch.Tensor | None]:
    """Mask of ``window`` tokens, or of a layer's native window if it is narrower, in the form that the model takes."""
    config = model.config.get_text_config(decoder=True)
    native = getattr(config, "sliding_window", None) or window
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return _mask(min(window, native))
    if kinds == {FULL}:
        return _mask(window)
    narrow = _mask(min(window, native))
    masks = dict.fromkeys((FULL, "chunked_attention", "hybrid"), _mask(window))
    # Recurrent layers take a padding mask; there is no padding.
    return {**masks, SLIDING: narrow, "hybrid_sliding": narrow, "linear_attention": None, "conv": None}


def seen_by(model: Any, layer: int, token: int) -> list[int]:
    """Tokens visible to a query in one layer: the native window of a sliding layer, else sinks and window."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] == SLIDING:
        return list(range(max(0, token - config.sliding_window + 1), token + 1))
    return visible(token, S, W)


def reencoded_context(token: int) -> list[int]:
    """Tokens in the context of a token in a model that streams by re-encoding."""
    first = context_start(token, sinkattn.ops.RingLayout(S, W, 0))
    return [*range(min(S, token + 1)), *range(first, token + 1)]


def silence_others(model: Any, lone: int) -> None:
    """Zero the output of every attention or state layer but one, in the unpatched or the enabled model."""
    layers = next(
        module for module in model.modules() if isinstance(module, nn.ModuleList) and all(map(_mixers, module))
    )
    for index, layer in enumerate(layers):
        for mixer in _mixers(layer) if index != lone else ():
            mixer.register_forward_hook(_nothing)


def _mixers(layer: nn.Module) -> list[nn.Module]:
    modules = dict(layer.named_modules())
    if "self_attention.dense" in modules:
        return [modules["self_attention.dense"]]  # BLOOM adds the residual within its attention
    return [module for name, module in modules.items() if MIXER.fullmatch(name)]


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)([torch.zeros_like(output[0]), *output[1:]])
    return torch.zeros_like(output)


def _gathered(model: Any, ids: torch.Tensor, seen: Callable[[int], list[int]]) -> float:
    want = []
    # Tokens with equally many visible tokens run as rows of one batch.
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
    """Each kind of rotary embedding once, with its number of layers where there are several kinds."""
    counts = {kind: kinds.count(kind) for kind in kinds}
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{kind} (in {count} of {len(kinds)} layers)" for kind, count in counts.items())
