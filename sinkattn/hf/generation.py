"""`generate` of enabled models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sinkattn.hf.cache import LEAST_REMEMBERED, SinkCache, find_swap
from sinkattn.hf.versions import GENERATE_CACHE, take_cache

# Tokens that an assistant proposes at once if its configuration does not say: transformers' own default.
ASSISTANT_TOKENS = 20


def generate(model: PreTrainedModel, inputs: Tensor | None = None, *args, **kwargs):
    """`generate` of an enabled model: as its class has it, with a `SinkCache` unless one is passed.

    With a cache that has seen tokens, ``inputs`` may be all ids of the stream so far, as transformers has it, or the
    new ones alone: which of the two can be told from how the stream began.
    """
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache: an enabled model generates from its SinkCache, got False")
    own = model.generation_config
    config = (args[0] if args else kwargs.get("generation_config")) or own
    default, given = own.cache_implementation, config.cache_implementation
    # A default of the checkpoint, copied perhaps (pipelines do), is nobody's wish for this call.
    wanted = kwargs.get("cache_implementation", None if given == default else given)
    if wanted is not None:
        raise ValueError(f"cache_implementation: an enabled model generates from its SinkCache, got {wanted!r}")
    if default is not None:
        kwargs["cache_implementation"] = None
    _check_assistant(model, config, kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError("attention_mask: expected padding on the left to generate from, got some on the right")
    name, cache = take_cache(kwargs)
    find_swap(model).check_cache(name, cache)
    kwargs[GENERATE_CACHE] = SinkCache(model) if cache is None else cache
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if isinstance(cache, SinkCache) and isinstance(ids, Tensor) and cache.tokens_seen:
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                f"assistant_model: expected a new stream, for the assistant has not read what came before; got a cache "
                f"that has seen {cache.tokens_seen} tokens"
            )
        if _candidates(model, config, kwargs) and cache.continues_with(ids):
            raise ValueError(
                "input_ids: expected the new ids alone, for prompt lookup in transformers feeds all that it is given; "
                f"got those of the whole stream ({ids.shape[1]})"
            )
        kwargs |= _continuation(name, cache, ids, mask)
    # A saved configuration may say otherwise; then every step would bring all tokens anew.
    kwargs["use_cache"] = True
    return type(model).generate(model, inputs, *args, **kwargs)


def _setting(model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of a call, as transformers reads it: what the configuration leaves open is as in the model's own."""
    if name in kwargs:
        return kwargs[name]
    given = getattr(config, name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _candidates(model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any]) -> int:
    """Tokens that prompt lookup proposes at once; 0 without it."""
    return _setting(model, config, kwargs, "prompt_lookup_num_tokens") or 0


def _check_assistant(model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    setting = partial(_setting, model, config, kwargs)
    if setting("assistant_early_exit"):
        raise ValueError("assistant_early_exit: an enabled model runs all of its layers; use an assistant_model")
    candidates = _candidates(model, config, kwargs)
    if (assistant := kwargs.get("assistant_model")) is not None:
        if "heuristic" in (assistant.generation_config.num_assistant_tokens_schedule or ""):
            raise ValueError(
                "assistant_model: expected a num_assistant_tokens_schedule of 'constant', for the headroom is, got "
                f"{assistant.generation_config.num_assistant_tokens_schedule!r}"
            )
        if kwargs.get("assistant_tokenizer") is not None and not setting("do_sample"):
            raise ValueError(
                "assistant_tokenizer: without sampling, an assistant proposes text, which may be any number of this "
                "model's tokens, and no headroom is enough for certain; expected do_sample=True, or an assistant with "
                "the same tokenizer"
            )
        proposed = assistant.generation_config.num_assistant_tokens or ASSISTANT_TOKENS
        candidates = max(candidates, proposed)
        if find_swap(assistant) is not None:
            _check_headroom(assistant, proposed, "assistant_model")
    if setting("use_mtp"):
        candidates = max(candidates, getattr(model.config.get_text_config(), "num_mtp_layers", None) or 0)
    _check_headroom(model, candidates, "model")


def _check_headroom(model: PreTrainedModel, candidates: int, name: str) -> None:
    headroom = find_swap(model).layout.headroom
    if candidates > headroom:
        raise ValueError(
            f"headroom: expected {candidates} or more, as assisted decoding takes back so many tokens, got {headroom}; "
            f"call sinkattn.enable({name}, ..., headroom={candidates})"
        )


def _continuation(name: str, cache: SinkCache, ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """What `generate` has to be told when it goes on: a mask as long as the stream, and positions."""
    seen, whole = cache.tokens_seen, cache.continues_with(ids)
    if len(ids) != len(cache.seen):
        if not whole or ids.shape[1] <= seen:
            raise ValueError(
                f"{name}: holds {len(cache.seen)} streams, got new ids of {len(ids)}; after several beams or "
                "returned sequences, go on with all ids and the same number of them"
            )
        return {}
    if attention_mask is not None and (whole or attention_mask.shape != ids.shape):
        return {}  # told already
    if not whole and (common := cache.common_beginning(ids)) >= LEAST_REMEMBERED:
        raise ValueError(
            f"input_ids: expected new ids, or all of the stream ({seen} tokens) and more; got {ids.shape[1]}, of which "
            f"the first {common} are those that the stream began with; if they are meant to come again, give an "
            "attention_mask of ones for all tokens and position_ids"
        )
    # Made here, or it would be guessed from tokens for padding, which a model may well have generated.
    new = torch.ones_like(ids[:, seen:] if whole else ids) if attention_mask is None else attention_mask.to(torch.int64)
    # Only how many of the past tokens were none of padding matters, not which.
    past = torch.arange(seen, 0, -1, device=ids.device) <= cache.seen.unsqueeze(1)
    mask = torch.cat((past.to(new.dtype), new), dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions if whole else positions[:, seen:]}
