"""Generate tokens from an enabled model without end, in constant memory, and decode them to text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sinkattn.hf.cache.sink_cache import SinkCache
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
    seed: int | None = None,
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
        temperature: divides the logits before sampling; 0 for greedy decoding.
        top_k: sample only from the k most likely tokens; 0 for all.
        top_p: sample only from the most likely tokens that together reach this probability.
        seed: for sampling; None uses torch's global generator.
        stop_ids: tokens that end the stream; they are not yielded.
        prefill_chunk: prompt tokens per forward.

    Raises:
        ValueError: for an invalid argument, or a model that is not enabled.
    """
    prompt = torch.as_tensor(prompt_ids, dtype=torch.int64, device=model.device)
    if prompt.ndim == 1:
        prompt = prompt.unsqueeze(0)
    if prompt.ndim != 2 or prompt.shape[0] != 1 or not prompt.shape[1]:
        raise ValueError(f"prompt_ids: expected [tokens] or [1, tokens], at least one, got {list(prompt.shape)}")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk: expected 1 or more, got {prefill_chunk}")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
    cache = SinkCache(model) if cache is None else cache
    warpers = LogitsProcessorList()
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    any_ids = prompt[:, -1:].clone()  # a copy, so that the prompt can be freed
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:  # [1, vocabulary] -> [1, 1]
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        # These warpers ignore the previous tokens, so any ids will do.
        scores = warpers(any_ids, logits.float())  # type: ignore[arg-type]  # annotated as LongTensor, a legacy type
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)

    return _tokens(model, prompt, cache, choose, max_new_tokens, frozenset(stop_ids), prefill_chunk)


def _tokens(
    model: PreTrainedModel,
    prompt: Tensor,
    cache: SinkCache,
    choose: Callable[[Tensor], Tensor],
    max_new_tokens: int | None,
    stop_ids: Collection[int],
    prefill_chunk: int,
) -> Iterator[int]:
    options: dict[str, Any] = {forward_cache(model): cache, "use_cache": True, **keep_last_logits(model)}
    pending: Sequence[Tensor] = prompt.split(prefill_chunk, dim=1)
    del prompt
    count = 0
    while max_new_tokens is None or count < max_new_tokens:
        # Not inference_mode: the caller may continue with this cache under no_grad.
        with torch.no_grad():
            for chunk in pending:
                logits = model(input_ids=chunk, **options).logits[:, -1]
            chosen = choose(logits)
        pending = (chosen,)
        token = int(chosen)
        if token in stop_ids:
            return
        count += 1
        yield token


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
