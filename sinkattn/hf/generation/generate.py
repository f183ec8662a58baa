"""`generate` of enabled models."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache, check_cache
from sinkattn.hf.generation.assisted import check_assistant, num_lookup_tokens
from sinkattn.hf.generation.beams import follow_beams
from sinkattn.hf.generation.continuation import ContinuationPlan, plan_continuation, record_given
from sinkattn.hf.generation.ended_rows import EndedRows
from sinkattn.hf.generation.options import call_setting, eos_ids
from sinkattn.hf.inputs import only_ids
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.versions import CHUNKS_HOLD_THE_PAST, GENERATE_CACHE, take_cache

SETTINGS = GenerationConfig()
# Positional arguments of `generate` after the inputs.
BY_PLACE = list(inspect.signature(GenerationMixin.generate).parameters)[2:]


def generate(model: PreTrainedModel, inputs: Tensor | None = None, *args, **kwargs):
    """`generate` of an enabled model: as its class has it, with a `SinkCache` unless one is passed.

    With a cache that has seen tokens, ``inputs`` may be the new ids alone, or all ids of the streams and more, as
    transformers has it: `sinkattn.hf.continuation`. Embeddings are new tokens. Rows that have ended are fed nothing.
    """
    kwargs |= dict(zip(BY_PLACE, args, strict=False))
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache: an enabled model generates from its SinkCache, got False")
    own = model.generation_config
    config = kwargs.get("generation_config") or own
    default, given = own.cache_implementation, config.cache_implementation
    # A default of the checkpoint, copied perhaps (pipelines do), is nobody's wish for this call.
    wanted = kwargs.get("cache_implementation", None if given == default else given)
    if wanted is not None:
        raise ValueError(f"cache_implementation: an enabled model generates from its SinkCache, got {wanted!r}")
    if default is not None:
        kwargs["cache_implementation"] = None
    check_assistant(model, kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError("attention_mask: expected padding on the left to generate from, got some on the right")
    name, given_cache = take_cache(kwargs)
    check_cache(get_patch(model), name, given_cache)
    cache = SinkCache(model) if given_cache is None else given_cache
    # A saved configuration may say otherwise; then every step would bring all tokens anew.
    kwargs |= {GENERATE_CACHE: cache, "use_cache": True}
    new = kwargs.get("inputs_embeds")
    new = (kwargs.get("input_ids") if inputs is None else inputs) if new is None else new
    if not isinstance(new, Tensor) or new.ndim < 2:
        return type(model).generate(model, inputs, **kwargs)

    state = cache.state
    if state.in_generate:
        raise RuntimeError(f"{name}: is in another generate already, in this thread or another")
    beams, returned = (call_setting(model, kwargs, option) or 1 for option in ("num_beams", "num_return_sequences"))
    rows, repeats = len(new), max(beams, returned)
    if cache.tokens_seen:
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                f"assistant_model: expected a new stream, for the assistant has not read what came before; got a cache "
                f"that has seen {cache.tokens_seen} tokens"
            )
        plan = plan_continuation(
            cache,
            new,
            mask,
            kwargs.get("position_ids"),
            name=name,
            repeats=repeats,
            new_ids_only=_feeds_all(model, kwargs),
            can_replay=state.can_replay and state.only_ids and _ids_alone(kwargs),
            padding=_pending_padding(model, cache, new),
        )
        # Both are made anew: positions by transformers, and the mask here, or transformers would guess it from ids for
        # padding, which a model may have generated.
        kwargs = {**kwargs, "attention_mask": plan.mask, "position_ids": None}
        state.generate_start = cache.tokens_seen - plan.begin
    else:
        present = _present(model, new, mask, kwargs)
        plan = record_given(
            cache, ContinuationPlan(present, 0, new.shape[1], lambda: None), torch.zeros(rows, dtype=int), repeats
        )
    ended = None
    if beams == 1 and rows * repeats > 1:
        ended = EndedRows.watch(model, cache, kwargs)
    state.in_generate, state.pending_plan = True, plan.carry_out
    try:
        output = type(model).generate(model, inputs, **kwargs)
        state.interrupted = False
    finally:
        state.in_generate = False
        state.generate_start = state.ended_rows = state.pending_plan = None
        cache.state.catch_up()
    sequences = output if isinstance(output, Tensor) else output.sequences
    if ended is not None:
        ended.settle(sequences)
    elif beams > 1 and (given_cache is not None or not isinstance(output, Tensor)):
        generated = sequences[:, new.shape[1] if new.ndim == 2 else _columns(kwargs.get("input_ids"), inputs) :]
        follow_beams(model, cache, generated, kwargs, plan.start, beams)
    return output


def _columns(*ids: Tensor | None) -> int:
    return next((x.shape[1] for x in ids if x is not None), 0)


def _ids_alone(kwargs: dict[str, Any]) -> bool:
    """Whether a model will be given ids alone: what is no setting of `generate` goes to the model."""
    return only_ids({name: x for name, x in kwargs.items() if name not in BY_PLACE and not hasattr(SETTINGS, name)})


def _present(model: PreTrainedModel, new: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Which new tokens are no padding, as transformers has it: bool ``[rows, tokens]``."""
    if mask is not None:
        return mask[:, -new.shape[1] :] != 0
    pad, eos = call_setting(model, kwargs, "pad_token_id"), eos_ids(model, kwargs, new.device)
    if new.ndim == 3 or pad is None or (eos is not None and bool((eos == pad).any())):
        return torch.ones(new.shape[:2], dtype=torch.bool, device=new.device)
    return new != pad


def _pending_padding(model: PreTrainedModel, cache: SinkCache, new: Tensor) -> Tensor | None:
    """What rows that ended were given as their last id, as it comes among new ids or embeddings; None if none was."""
    if cache.state.unfed_padding is None:
        return None
    padding = torch.tensor(cache.state.unfed_padding[1], device=new.device)
    return padding if new.ndim == 2 else model.get_input_embeddings()(padding).detach()


def _feeds_all(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """What makes transformers feed all ids that it is given, those that the cache has seen, too; None if nothing."""
    if num_lookup_tokens(model, kwargs):
        return "prompt lookup"
    return "prefill_chunk_size" if CHUNKS_HOLD_THE_PAST and call_setting(model, kwargs, "prefill_chunk_size") else None
