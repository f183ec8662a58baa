"""What the choice of tokens keeps of one stream, on the host."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sinkattn.argument_checks import check_kind
from sinkattn.hf.sampling.grammar import Grammar
from sinkattn.hf.sampling.params import SamplingParams


class StreamSampler:
    """Parameters of a stream, and how far its random numbers and its grammar are.

    Args:
        params: how its tokens are chosen.
        vocabulary: number of logits.
        end_ids: tokens that end a text: penalties leave them alone, and a grammar allows them where a text may end.
        tokenizer: needed for a grammar.

    Raises:
        TypeError: for other params.
        ValueError: for a biased id beyond the vocabulary, an invalid grammar, or one without a tokenizer.
        ImportError: for a grammar without llguidance.

    Attributes:
        seed: of the draws.
        draws: tokens sampled so far. With `seed` and the ids of `grammar` it is all that the next token depends on,
            besides logits and ids in sight.
        grammar: None without one.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocabulary: int,
        end_ids: Collection[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_kind("sampling", params, SamplingParams, "SamplingParams")
        if beyond := [token for token in params.logit_bias if token >= vocabulary]:
            raise ValueError(f"logit_bias: expected ids below {vocabulary}, got {beyond[0]}")
        self.params = params
        self.end_ids = frozenset(end_ids)
        self.draws = 0
        self.grammar: Grammar | None = None
        if params.grammar is not None:
            self.grammar = Grammar.compile(params.grammar, tokenizer, vocabulary, self.end_ids)
        if params.seed is not None:
            self.seed = int(params.seed)
        else:
            self.seed = 0 if params.is_greedy else int(torch.randint(2**63 - 1, ()))

    def state(self) -> dict[str, Any]:
        """Seed, draws and ids of the grammar's text, for `restore`; ints and lists of them."""
        return {
            "seed": self.seed,
            "draws": self.draws,
            "grammar_ids": [] if self.grammar is None or self.grammar.is_complete else [*self.grammar.ids],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of a stream with the same parameters; this one must be new."""
        self.seed, self.draws = state["seed"], state["draws"]
        for token in state["grammar_ids"]:
            if self.grammar is not None:
                self.grammar.accept(token)

    def fork(self) -> StreamSampler:
        """A copy that goes its own way; with the same logits it draws the same tokens."""
        fork = copy.copy(self)
        fork.grammar = None if self.grammar is None else self.grammar.fork()
        return fork
