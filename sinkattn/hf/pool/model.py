"""`PoolModel`: the model of a pool with its tokenizer, and what both need to know of text and sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkattn.argument_checks import check_kind
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.sampling.stream_sampler import StreamSampler
from sinkattn.hf.stream import end_ids


class PoolModel:
    """The model of a pool, and its tokenizer.

    Args:
        model: enabled; raises ValueError if it is not.
        tokenizer: None if there is only text as ids.

    Attributes:
        patch: of the model.
        vocabulary: number of ids that can be chosen.
        num_ids: number of ids that can be fed.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.patch = require_patch(model)
        if tokenizer is not None:
            check_kind("tokenizer", tokenizer, Callable, "a tokenizer of transformers or None")
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
        # Of some models not all ids that can be chosen can be fed, or the other way round.
        embeddings = self.patch.decoder.get_input_embeddings()
        self.num_ids: int = getattr(embeddings, "num_embeddings", self.vocabulary)

    def check_enabled(self) -> None:
        """Raise ValueError if the model has been disabled, or enabled anew, since the pool was made."""
        if require_patch(self.model) is not self.patch:
            raise ValueError("model: expected one that stays enabled, got one that was enabled anew; make a new pool")

    def new_sampler(self, params: SamplingParams) -> StreamSampler:
        """Sampler of a stream; raises ValueError or ImportError as `StreamSampler`."""
        return StreamSampler(params, vocabulary=self.vocabulary, end_ids=end_ids(self.model), tokenizer=self.tokenizer)

    def ids_of(self, name: str, tokens: str | Sequence[int] | Tensor, *, is_first: bool) -> list[int]:
        """Ids of the argument ``name``.

        Raises ValueError if there are others than the model has, and as `check_enabled`.

        is_first: whether text gets the special tokens that begin a stream.
        """
        self.check_enabled()
        if isinstance(tokens, str) and self.tokenizer is None:
            raise ValueError(f"{name}: expected ids, as the pool has no tokenizer, got text")
        try:
            if isinstance(tokens, str):
                assert self.tokenizer is not None
                tokens = self.tokenizer(tokens, add_special_tokens=is_first, verbose=False).input_ids
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:  # also for text that is not Unicode
            raise ValueError(f"{name}: expected text or ids [tokens], got {type(tokens).__name__}: {error}") from error
        ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
        if ids.ndim != 1 or (ids.is_floating_point() and len(ids)):
            raise ValueError(f"{name}: expected text or ids [tokens], got {ids.dtype} {list(ids.shape)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_ids:
            raise ValueError(
                f"{name}: expected ids from 0 to {self.num_ids - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        return [int(x) for x in ids.tolist()]
