"""Which tokens a JSON schema or a Lark grammar allows next, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Grammar:
    """The state of one stream within its grammar.

    Args:
        matcher: at the start of a text.
        never: a token that is never allowed.

    Attributes:
        ids: tokens of the text so far, from its start.
        is_complete: whether the text has ended. The next token begins another text.
    """

    def __init__(self, matcher: LLMatcher, never: int | None) -> None:
        self._matcher = matcher
        self._never = never
        self.ids: list[int] = []
        self.is_complete = False

    @classmethod
    def compile(
        cls,
        grammar: Mapping[str, Any] | str,
        tokenizer: PreTrainedTokenizerBase | None,
        vocabulary: int,
        end_ids: Collection[int],
    ) -> Grammar:
        """Prepare a grammar.

        Args:
            grammar: that of `SamplingParams`.
            tokenizer: of the model.
            vocabulary: number of logits.
            end_ids: tokens that may end the text where the grammar lets it end.

        Raises:
            ValueError: without a tokenizer, or for an invalid grammar.
            ImportError: without llguidance.
        """
        if tokenizer is None or getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(
                f"tokenizer: expected one with a tokenizers backend for a grammar, got {type(tokenizer).__name__}"
            )
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ImportError("grammar: needs llguidance, pip install 'sinkattn[grammar]'") from error
        if (schema := _schema(grammar)) is None:
            text = LLMatcher.grammar_from_lark(str(grammar))
        else:
            # Small models write white space without end where it is allowed.
            text = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        # llguidance needs an end token. Where there is none, a special one stands in, and is never allowed.
        never = None if end_ids else min(tokenizer.all_special_ids, default=0)
        tokens = _tokens(tokenizer, vocabulary, tuple(sorted(end_ids)) if never is None else (never,))
        if message := LLMatcher.validate_grammar(text, tokens):
            raise ValueError(f"grammar: {message.splitlines()[0]}")
        return cls(LLMatcher(tokens, text, log_level=0), never)

    def begin_anew(self) -> None:
        """Let the next token begin another text."""
        self.is_complete = True

    def allowed(self) -> Tensor:
        """Tokens that may come next: uint8 ``[at least vocabulary / 8]``, one bit each, the lowest first.

        Raises:
            RuntimeError: if the grammar is too complex to go on.
        """
        if self.is_complete:
            self._matcher.reset()
            self.ids, self.is_complete = [], False
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        if self._never is not None:
            mask[self._never // 8] &= 255 - (1 << self._never % 8)
        return mask

    def accept(self, token: int) -> None:
        """Add the token that was chosen by `allowed`.

        Raises:
            RuntimeError: if it is not allowed.
        """
        self._matcher.consume_token(token)
        self._check()
        self.ids.append(token)
        self.is_complete = self._matcher.is_stopped()

    def fork(self) -> Grammar:
        """A copy that goes its own way."""
        fork = Grammar(self._matcher.deep_copy(), self._never)
        fork.ids, fork.is_complete = [*self.ids], self.is_complete
        return fork

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"grammar: {self._matcher.get_error().splitlines()[0]}")


def _schema(grammar: Mapping[str, Any] | str) -> dict[str, Any] | None:
    """The JSON schema that a grammar is; None for one in Lark, which is never JSON."""
    if isinstance(grammar, str):
        try:
            grammar = json.loads(grammar)
        except ValueError:
            return None
    if not isinstance(grammar, Mapping):
        raise ValueError(f"grammar: expected an object as JSON schema, got {grammar!r}")
    return dict(grammar)


@lru_cache(maxsize=8)
def _tokens(tokenizer: Any, vocabulary: int, end_ids: tuple[int, ...]) -> LLTokenizer:
    """The tokens as llguidance reads them, which takes up to a second."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=[*end_ids])
