"""`generate` of enabled models: checks the call, plans how it continues the streams of its cache, and runs it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache, check_cache
from sinkattn.hf.generation.assisted import check_assistant, num_lookup_tokens
from sinkattn.hf.generation.beams import sync_rows_with_hypotheses
from sinkattn.hf.generation.continuation import ContinuationPlan, plan_continuation, record_prompt_span
from sinkattn.hf.generation.ended_rows import EndedRows
from sinkattn.hf.generation.options import call_setting, eos_ids
from sinkattn.hf.inputs import has_only_ids
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.versions import CHUNKS_HOLD_THE_PAST, GENERATE_CACHE, take_cache

GENERATION_CONFIG = GenerationConfig()
# Positional arguments of `generate` after the inputs.
POSITIONAL_ARGUMENTS = list(inspect.signature(GenerationMixin.generate).parameters)[2:]


def generate(model: PreTrainedModel, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the model's class, with a new `SinkCache` unless one is passed.

    With a cache that is not empty, ``inputs`` may be only the new ids, or all ids of the streams and more, as in
    transformers: see `plan_continuation`. Embeddings are always new tokens. Padding that `generate` feeds to rows that
    have ended does not enter their streams.
    """
    model_class: Any = type(model)  # one with GenerationMixin, which its annotation does not say
    kwargs |= dict(zip(POSITIONAL_ARGUMENTS, args, strict=False))
    if kwargs.get("use_cache") is False:
        raise ValueError(
            "use_cache: expected True or None, as an enabled model generates from its SinkCache, got False"
        )
    own_config = model.generation_config
    config = kwargs.get("generation_config") or own_config
    default, given = own_config.cache_implementation, config.cache_implementation
    # A value equal to the checkpoint's default is ignored: pipelines copy the default into the config of the call.
    requested = kwargs.get("cache_implementation", None if given == default else given)
    if requested is not None:
        raise ValueError(
            f"cache_implementation: expected None, as an enabled model generates from its SinkCache, got {requested!r}"
        )
    if default is not None:
        kwargs["cache_implementation"] = None
    check_assistant(model, kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError(
            "attention_mask: expected padding on the left, as generate continues from the last column, got 0 there"
        )
    cache_name, given_cache = take_cache(kwargs)
    check_cache(require_patch(model), cache_name, given_cache)
    cache = SinkCache(model) if given_cache is None else given_cache
    # A saved generation config may have use_cache=False; then every step would feed all tokens again.
    kwargs |= {GENERATE_CACHE: cache, "use_cache": True}
    prompt = kwargs.get("inputs_embeds")
    prompt = (kwargs.get("input_ids") if inputs is None else inputs) if prompt is None else prompt
    if not isinstance(prompt, Tensor) or prompt.ndim < 2:
        return model_class.generate(model, inputs, **kwargs)

    state = cache.state
    if state.in_generate:
        raise RuntimeError(f"{cache_name}: is in another generate already, in this thread or another")
    beams, returned = (call_setting(model, kwargs, option) or 1 for option in ("num_beams", "num_return_sequences"))
    rows, repeats = len(prompt), max(beams, returned)
    if cache.tokens_seen:
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "assistant_model: expected an empty cache, as the assistant has not seen its tokens, got one that has "
                f"seen {cache.tokens_seen} tokens"
            )
        plan = plan_continuation(
            cache,
            prompt,
            mask,
            kwargs.get("position_ids"),
            cache_name=cache_name,
            repeats=repeats,
            needs_new_ids=_option_feeding_all_ids(model, kwargs),
            can_prefill_again=state.can_prefill_again and state.only_ids and _model_gets_only_ids(kwargs),
            unfed_padding=_unfed_padding(model, cache, prompt),
        )
        # Without a mask, transformers would take padding ids for padding, but they may be real output. It computes the
        # positions itself.
        kwargs = {**kwargs, "attention_mask": plan.mask, "position_ids": None}
        state.generate_offset = cache.tokens_seen - plan.feed_from
    else:
        plan = ContinuationPlan(_prompt_mask(model, prompt, mask, kwargs), 0, prompt.shape[1], lambda: None)
        plan = record_prompt_span(cache, plan, torch.zeros(rows, dtype=torch.int64), repeats)
    ended_rows = None
    if beams == 1 and rows * repeats > 1:
        ended_rows = EndedRows.watch(model, cache, kwargs)
    state.in_generate, state.pending_update = True, plan.update_cache
    try:
        output = model_class.generate(model, inputs, **kwargs)
        state.generate_interrupted = False
    finally:
        state.in_generate = False
        state.generate_offset = state.ended_rows = state.pending_update = None
        state.count_columns_ahead()
    sequences = output if isinstance(output, Tensor) else output.sequences
    if ended_rows is not None:
        ended_rows.record_in_cache(sequences)
    elif beams > 1 and (given_cache is not None or not isinstance(output, Tensor)):
        prompt_columns = prompt.shape[1] if prompt.ndim == 2 else _num_columns(kwargs.get("input_ids"), inputs)
        generated = sequences[:, prompt_columns:]
        sync_rows_with_hypotheses(model, cache, generated, kwargs, plan.generated_from, beams)
    return output


def _num_columns(*ids: Tensor | None) -> int:
    """Columns of the first of these that is not None; 0 without any."""
    return next((x.shape[1] for x in ids if x is not None), 0)


def _model_gets_only_ids(kwargs: dict[str, Any]) -> bool:
    """Whether `generate` passes only ids on to the model, to which all arguments go that are not its own options."""
    return has_only_ids(
        {
            name: x
            for name, x in kwargs.items()
            if name not in POSITIONAL_ARGUMENTS and not hasattr(GENERATION_CONFIG, name)
        }
    )


def _prompt_mask(model: PreTrainedModel, prompt: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Token mask of a prompt, bool ``[rows, tokens]``: ``mask``, or inferred from padding ids as in transformers."""
    if mask is not None:
        return mask[:, -prompt.shape[1] :] != 0
    pad, eos = call_setting(model, kwargs, "pad_token_id"), eos_ids(model, kwargs, prompt.device)
    if prompt.ndim == 3 or pad is None or (eos is not None and bool((eos == pad).any())):
        return torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
    return prompt != pad


def _unfed_padding(model: PreTrainedModel, cache: SinkCache, prompt: Tensor) -> Tensor | None:
    """Padding that the last `generate` returned and did not feed, as an id or embedding like ``prompt``; else None."""
    if cache.state.unfed_padding is None:
        return None
    padding = torch.tensor(cache.state.unfed_padding[1], device=prompt.device)
    return padding if prompt.ndim == 2 else model.get_input_embeddings()(padding).detach()


def _option_feeding_all_ids(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """Option that makes transformers feed all ids it gets, even those that the cache holds; None if there is none."""
    if num_lookup_tokens(model, kwargs):
        return "prompt lookup"
    return "prefill_chunk_size" if CHUNKS_HOLD_THE_PAST and call_setting(model, kwargs, "prefill_chunk_size") else None
