"""`generate` of enabled models."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from sinkattn.hf.cache import SinkCache, find_swap
from sinkattn.hf.continuation import Plan, follow, go_on, note_given
from sinkattn.hf.inputs import ids_alone
from sinkattn.hf.versions import CHUNKS_HOLD_THE_PAST, GENERATE_CACHE, forward_cache, take_cache

# Tokens that an assistant proposes at once if its configuration does not say: transformers' own default.
ASSISTANT_TOKENS = 20

# Settings of `generate`, and its arguments by place, after the inputs.
SETTINGS = GenerationConfig()
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
    _check_assistant(model, kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError("attention_mask: expected padding on the left to generate from, got some on the right")
    name, given_cache = take_cache(kwargs)
    find_swap(model).check_cache(name, given_cache)
    cache = SinkCache(model) if given_cache is None else given_cache
    # A saved configuration may say otherwise; then every step would bring all tokens anew.
    kwargs |= {GENERATE_CACHE: cache, "use_cache": True}
    new = kwargs.get("inputs_embeds")
    new = (kwargs.get("input_ids") if inputs is None else inputs) if new is None else new
    if not isinstance(new, Tensor) or new.ndim < 2:
        return type(model).generate(model, inputs, **kwargs)

    streams = cache.streams
    if streams.generating:
        raise RuntimeError(f"{name}: is in another generate already, in this thread or another")
    beams, returned = (_option(model, kwargs, option) or 1 for option in ("num_beams", "num_return_sequences"))
    rows, repeats = len(new), max(beams, returned)
    if cache.tokens_seen:
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                f"assistant_model: expected a new stream, for the assistant has not read what came before; got a cache "
                f"that has seen {cache.tokens_seen} tokens"
            )
        plan = go_on(
            cache,
            new,
            mask,
            kwargs.get("position_ids"),
            name=name,
            repeats=repeats,
            new_alone=_feeds_all(model, kwargs),
            mendable=streams.mendable and streams.ids_alone and _ids_alone(kwargs),
            padding=_pending_padding(model, cache, new),
        )
        # Both are made anew: positions by transformers, and the mask here, or transformers would guess it from ids for
        # padding, which a model may have generated.
        kwargs = {**kwargs, "attention_mask": plan.mask, "position_ids": None}
        streams.origin = cache.tokens_seen - plan.begin
    else:
        present = _present(model, new, mask, kwargs)
        plan = note_given(cache, Plan(present, 0, new.shape[1], lambda: None), torch.zeros(rows, dtype=int), repeats)
    ended = None
    if beams == 1 and rows * repeats > 1:
        ended = Ended.watch(model, cache, kwargs)
    streams.generating, streams.plan = True, plan.carry_out
    try:
        output = type(model).generate(model, inputs, **kwargs)
        streams.interrupted = False
    finally:
        streams.generating = False
        streams.origin = streams.ended = streams.plan = None
        cache.catch_up()
    sequences = output if isinstance(output, Tensor) else output.sequences
    if ended is not None:
        ended.settle(sequences)
    elif beams > 1 and (given_cache is not None or not isinstance(output, Tensor)):
        generated = sequences[:, new.shape[1] if new.ndim == 2 else _columns(kwargs.get("input_ids"), inputs) :]
        _follow_beams(model, cache, generated, kwargs, plan.start, beams)
    return output


def _columns(*ids: Tensor | None) -> int:
    return next((x.shape[1] for x in ids if x is not None), 0)


def _ids_alone(kwargs: dict[str, Any]) -> bool:
    """Whether a model will be given ids alone: what is no setting of `generate` goes to the model."""
    return ids_alone({name: x for name, x in kwargs.items() if name not in BY_PLACE and not hasattr(SETTINGS, name)})


def _present(model: PreTrainedModel, new: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Which new tokens are no padding, as transformers has it: bool ``[rows, tokens]``."""
    if mask is not None:
        return mask[:, -new.shape[1] :] != 0
    pad, eos = _option(model, kwargs, "pad_token_id"), _eos(model, kwargs, new.device)
    if new.ndim == 3 or pad is None or (eos is not None and bool((eos == pad).any())):
        return torch.ones(new.shape[:2], dtype=torch.bool, device=new.device)
    return new != pad


def _pending_padding(model: PreTrainedModel, cache: SinkCache, new: Tensor) -> Tensor | None:
    """What rows that ended were given as their last id, as it comes among new ids or embeddings; None if none was."""
    if cache.streams.pending is None:
        return None
    padding = torch.tensor(cache.streams.pending[1], device=new.device)
    return padding if new.ndim == 2 else model.get_input_embeddings()(padding).detach()


def _option(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of a call, as transformers reads it: what a configuration leaves open is as in the model's own."""
    if name in kwargs:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), model.generation_config)
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _eos(model: PreTrainedModel, kwargs: dict[str, Any], device: torch.device) -> Tensor | None:
    eos = _option(model, kwargs, "eos_token_id")
    return None if eos is None else torch.as_tensor(eos, device=device).flatten()


class Watched(StoppingCriteria):
    """A criterion of the user's, and what it last said: asking it twice might not do."""

    def __init__(self, criterion: StoppingCriteria) -> None:
        self.criterion = criterion
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        """What the criterion says."""
        self.done = self.criterion(input_ids, scores, **kwargs)
        return self.done

    def __getattr__(self, name: str) -> Any:
        """Of the criterion: transformers goes by whether it has an ``eos_token_id``."""
        if name == "criterion":
            raise AttributeError(name)
        return getattr(self.criterion, name)


class Ended(StoppingCriteria):
    """Watches which rows of a batch have ended, for `generate` feeds those padding until the others have, too."""

    def __init__(self, cache: SinkCache, asked: StoppingCriteriaList, watched: list[Watched]) -> None:
        self.cache = cache
        self.asked = asked
        self.watched = watched
        self.done: Tensor | None = None
        self.padding: Tensor | None = None
        """Rows whose last id is padding."""

    @classmethod
    def watch(cls, model: PreTrainedModel, cache: SinkCache, kwargs: dict[str, Any]) -> Ended | None:
        """Put one in the arguments of `generate`; None if rows are never padded there."""
        eos = _eos(model, kwargs, model.device)
        given = list(kwargs.get("stopping_criteria") or ())
        if eos is None and not any(hasattr(criterion, "eos_token_id") for criterion in given):
            return None  # rows that have ended go on
        # Those of transformers take the place of its defaults by their class; these go by the ids alone.
        asked = StoppingCriteriaList(x for x in given if type(x) in (EosTokenCriteria, StopStringCriteria))
        if eos is not None and not any(type(x) is EosTokenCriteria for x in asked):
            asked.append(EosTokenCriteria(eos))
        stop_strings = _option(model, kwargs, "stop_strings")
        if stop_strings and not any(type(x) is StopStringCriteria for x in asked) and kwargs.get("tokenizer"):
            asked.append(StopStringCriteria(kwargs["tokenizer"], stop_strings))
        # Others of transformers end all rows at once.
        criteria = [x if type(x).__module__.startswith("transformers.") else Watched(x) for x in given]
        ended = cls(cache, asked, [x for x in criteria if isinstance(x, Watched)])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, ended])
        return ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        """End nothing."""
        done = self.asked(input_ids, scores, **kwargs)
        for criterion in self.watched:
            done = done | torch.as_tensor(criterion.done, device=done.device)
        before = torch.zeros_like(done) if self.done is None else self.done
        self.padding, self.done = before, before | done
        # What was chosen last is fed next.
        if not self.cache.has_states and not (before.is_cpu and not before.any()):
            self.cache.streams.ended = before
        return torch.zeros_like(done)

    def settle(self, sequences: Tensor) -> None:
        """Leave word in the cache, once `generate` is done, of which rows ended before others."""
        if self.padding is None or not self.padding.any():
            return
        streams = self.cache.streams
        if self.cache.has_states:
            streams.mendable = False
            streams.unusable = (
                f"row {int(self.padding.nonzero()[0])} ended before others, and the padding that it was given since is "
                "in its state; call reset(), and run rows that may end at different times one by one"
            )
        else:
            self.cache.note_ended(self.padding, sequences[:, -1])


def _follow_beams(
    model: PreTrainedModel, cache: SinkCache, generated: Tensor, kwargs: dict[str, Any], start: int, beams: int
) -> None:
    eos, pad = _eos(model, kwargs, generated.device), _option(model, kwargs, "pad_token_id")
    lengths = generated.new_full((len(generated),), generated.shape[1])
    # What it is filled up with at its end, if it is shorter than others; transformers takes no padding of id 0.
    fill = -1 if eos is None else pad or int(eos[0])
    if eos is None or kwargs.get("stopping_criteria") or _option(model, kwargs, "stop_strings"):
        lengths -= (generated == fill).flip(1).to(torch.int64).cumprod(dim=1).sum(dim=1)
    if eos is not None:
        is_end = torch.isin(generated, eos)
        first = is_end.to(torch.int64).argmax(dim=1) + 1
        lengths = torch.where(is_end.any(dim=1), torch.where(lengths < first, lengths, first), lengths)

    def feed(ids: Tensor, mask: Tensor) -> None:
        decoder = find_swap(model).decoder
        options = {forward_cache(decoder): cache, "use_cache": True}
        with torch.no_grad():
            decoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options)

    follow(cache, generated, lengths, start, beams, feed)


def _feeds_all(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """What makes transformers feed all ids that it is given, those that the cache has seen, too; None if nothing."""
    if _candidates(model, kwargs):
        return "prompt lookup"
    return "prefill_chunk_size" if CHUNKS_HOLD_THE_PAST and _option(model, kwargs, "prefill_chunk_size") else None


def _candidates(model: PreTrainedModel, kwargs: dict[str, Any]) -> int:
    """Tokens that prompt lookup proposes at once; 0 without it."""
    return _option(model, kwargs, "prompt_lookup_num_tokens") or 0


def _check_assistant(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    option = partial(_option, model, kwargs)
    if option("assistant_early_exit"):
        raise ValueError("assistant_early_exit: an enabled model runs all of its layers; use an assistant_model")
    candidates = _candidates(model, kwargs)
    if (assistant := kwargs.get("assistant_model")) is not None:
        if "heuristic" in (assistant.generation_config.num_assistant_tokens_schedule or ""):
            raise ValueError(
                "assistant_model: expected a num_assistant_tokens_schedule of 'constant', for the headroom is, got "
                f"{assistant.generation_config.num_assistant_tokens_schedule!r}"
            )
        if kwargs.get("assistant_tokenizer") is not None and not option("do_sample"):
            raise ValueError(
                "assistant_tokenizer: without sampling, an assistant proposes text, which may be any number of this "
                "model's tokens, and no headroom is enough for certain; expected do_sample=True, or an assistant with "
                "the same tokenizer"
            )
        proposed = assistant.generation_config.num_assistant_tokens or ASSISTANT_TOKENS
        candidates = max(candidates, proposed)
        if find_swap(assistant) is not None:
            _check_headroom(assistant, proposed, "assistant_model")
    if option("use_mtp"):
        candidates = max(candidates, getattr(model.config.get_text_config(), "num_mtp_layers", None) or 0)
    _check_headroom(model, candidates, "model")


def _check_headroom(model: PreTrainedModel, candidates: int, name: str) -> None:
    headroom = find_swap(model).layout.headroom
    if candidates > headroom:
        raise ValueError(
            f"headroom: expected {candidates} or more, as assisted decoding takes back so many tokens, got {headroom}; "
            f"call sinkattn.enable({name}, ..., headroom={candidates})"
        )
