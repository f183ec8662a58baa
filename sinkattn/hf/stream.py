"""Generate tokens from an enabled model without end, in constant memory, and decode them to text."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkattn.argument_checks import check_kind, check_whole
from sinkattn.hf.cache.sink_cache import SinkCache, check_cache
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.sampling.batch_sampler import BatchSampler
from sinkattn.hf.sampling.in_sight import IdsInSight
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.sampling.stream_sampler import StreamSampler
from sinkattn.hf.versions import forward_cache

# Tokens held back until a character is complete. A character has up to four bytes, but each token may end in the middle
# of the next character; after this many the bytes are not text.
MAX_HELD = 32
# Prompt tokens that the decoder reads before the first generated token.
DECODE_CONTEXT = 8


def stream_tokens(
    model: PreTrainedModel,
    prompt_ids: Tensor | Sequence[int],
    cache: SinkCache | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    sampling: SamplingParams | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_ids: Collection[int] = (),
    prefill_chunk: int = 512,
) -> Iterator[int]:
    """Generate token ids one by one in constant memory, without end unless ``max_new_tokens`` or ``stop_ids`` ends it.

    Each token is fed to the model when the next one is requested. So the last token has not been fed: to continue with
    ``cache``, begin the next prompt with it.

    Args:
        model: a model prepared by `sinkattn.enable`.
        prompt_ids: ``[tokens]`` or ``[1, tokens]``, at least one token; fed in chunks.
        cache: the stream to continue; default: a new one.
        max_new_tokens: number of tokens to generate; None for no limit.
        temperature: this and the following up to ``seed`` are those of `SamplingParams`; the default is greedy
            decoding.
        sampling: instead of these six, with everything else that `SamplingParams` has. With ``logprobs`` the tokens
            are of `ScoredToken`, a subclass of int. With a grammar the stream ends when the text is complete, and at
            the end tokens of the model.
        tokenizer: needed for a grammar.
        stop_ids: tokens that end the stream; they are not yielded.
        prefill_chunk: prompt tokens per forward.

    Raises:
        TypeError, ValueError: for an invalid argument, or a model that is not enabled.
        ImportError: for a grammar without llguidance.
    """
    check_cache(require_patch(model), "cache", cache)
    check_whole("prefill_chunk", prefill_chunk, 1)
    if max_new_tokens is not None:
        check_whole("max_new_tokens", max_new_tokens)
    check_kind("stop_ids", stop_ids, Collection, "a collection of ids")
    if others := [x for x in stop_ids if not isinstance(x, Integral)]:
        raise ValueError(f"stop_ids: expected ids, got {others[0]!r}")
    try:
        prompt = torch.as_tensor(prompt_ids, device=model.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"prompt_ids: expected ids [tokens], got {type(prompt_ids).__name__}: {error}") from error
    if prompt.is_floating_point() and len(prompt):
        raise ValueError(f"prompt_ids: expected ids [tokens], got {prompt.dtype}")
    prompt = prompt.long()
    if prompt.ndim == 1:
        prompt = prompt.unsqueeze(0)
    if prompt.ndim != 2 or prompt.shape[0] != 1 or not prompt.shape[1]:
        raise ValueError(f"prompt_ids: expected [tokens] or [1, tokens], at least one, got {list(prompt.shape)}")
    cache = SinkCache(model) if cache is None else cache
    options = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if sampling is not None and options != SamplingParams():
        raise ValueError("sampling: expected no other sampling argument beside it")
    params = options if sampling is None else sampling
    check_kind("sampling", params, SamplingParams, "SamplingParams")
    stop_ids = {*stop_ids, *(end_ids(model) if params.grammar is not None else ())}
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    stream = StreamSampler(params, vocabulary=vocabulary, end_ids=stop_ids, tokenizer=tokenizer)
    return _tokens(model, prompt, cache, stream, max_new_tokens, prefill_chunk)


def _tokens(
    model: PreTrainedModel,
    prompt: Tensor,
    cache: SinkCache,
    stream: StreamSampler,
    max_new_tokens: int | None,
    prefill_chunk: int,
) -> Iterator[int]:
    options: dict[str, Any] = {forward_cache(model): cache, "use_cache": True, **keep_last_logits(model)}
    pending: Sequence[Tensor] = prompt.split(prefill_chunk, dim=1)
    del prompt
    in_sight = IdsInSight(cache, model.device) if stream.params.needs_ids else None
    sampler = BatchSampler()
    count = 0
    while max_new_tokens is None or count < max_new_tokens:
        # Not inference_mode: the caller may continue with this cache under no_grad.
        with torch.no_grad():
            for chunk in pending:
                logits = model(input_ids=chunk, **options).logits[:, -1]
                if in_sight is not None:
                    in_sight.append(chunk)
            chosen = sampler.choose(logits, [stream], None if in_sight is None else in_sight.ids)
        pending = (chosen.ids.unsqueeze(1),)
        [token] = chosen.read()
        if token in stream.end_ids:
            return
        count += 1
        yield token
        if stream.grammar is not None and stream.grammar.is_complete:
            return


def end_ids(model: PreTrainedModel) -> list[int]:
    """Tokens that end a text, by the model's generation configuration; empty if it has none."""
    end = None if model.generation_config is None else model.generation_config.eos_token_id
    return [] if end is None else end if isinstance(end, list) else [end]


def keep_last_logits(model: PreTrainedModel) -> dict[str, int]:
    """Arguments that make a model's forward compute only the logits of the last token; empty if not supported."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def stream_text(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], prompt_ids: Sequence[int] = ()
) -> Iterator[str]:
    """Decode tokens one by one; yields a string, maybe empty, for each token, and held bytes at the end.

    Bytes of a character are held back until the character is complete.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.
        tokens: token ids.
        prompt_ids: ids before ``tokens``, needed for the space between the two.

    Raises:
        ValueError: for a tokenizer without such a backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer: expected one with a tokenizers backend, got {type(tokenizer).__name__}")
    decoder = DecodeStream(skip_special_tokens=False)
    for token in prompt_ids[-DECODE_CONTEXT:]:
        decoder.step(backend, int(token))
    held: list[int] = []
    for token in tokens:
        text = decoder.step(backend, token)
        held = [] if text is not None else [*held, token]
        if len(held) > MAX_HELD:
            # DecodeStream would hold these and all later tokens back.
            text, held = backend.decode(held, skip_special_tokens=False), []
            decoder = DecodeStream(skip_special_tokens=False)
        yield text or ""
    if held:
        yield backend.decode(held, skip_special_tokens=False)
