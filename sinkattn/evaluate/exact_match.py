"""How often a model answers the questions in a stream right, for several methods side by side.

An answer is right if every token of it is the likeliest where the right ones before it were fed: just then greedy
decoding would have given this answer. The right answer stays in the stream, so that one mistake does not lead to the
next and every method reads the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from sinkattn.evaluate.items import Item
from sinkattn.evaluate.methods import Predictor

PARTS = 4


class Tally:
    """Right answers and questions, in each quarter of a stream of ``count`` questions."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked = [0] * PARTS
        self.right = [0] * PARTS

    def add(self, number: int, right: bool) -> None:
        """Record the answer to a question, numbered from 0."""
        part = number * PARTS // self.count
        self.asked[part] += 1
        self.right[part] += right

    @property
    def accuracy(self) -> float:
        """Fraction of right answers so far; 0 without questions."""
        return sum(self.right) / max(1, sum(self.asked))

    def as_dict(self) -> dict[str, Any]:
        """Accuracy with its 95 % confidence interval (Wilson's), and that of each quarter, None without questions."""
        low, high = binomtest(sum(self.right), sum(self.asked)).proportion_ci(method="wilson")
        parts = [right / asked if asked else None for right, asked in zip(self.right, self.asked, strict=True)]
        return {
            "questions": sum(self.asked),
            "accuracy": self.accuracy,
            "low": float(low),
            "high": float(high),
            "accuracy_by_quarter": parts,
        }


def first_token(tokenizer: Any) -> int:
    """The token that a stream of questions begins with: the start token, or where there is none a line break.

    Raises ValueError for a tokenizer that has neither.
    """
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if not (line_break := tokenizer("\n", add_special_tokens=False).input_ids):
        raise ValueError("tokenizer: has neither a start token nor a line break, so there is nothing to begin with")
    return line_break[-1]


def encode(item: Item, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids of an item, int64 ``[tokens]``, and which of them spell the answer, bool ``[tokens]``.

    A token that spells a part of the answer and a part of what stands around it belongs to the answer. Raises
    ValueError for an answer that the tokenizer cannot spell.
    """
    text = item.context + item.answer + item.closing
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    begin, end = len(item.context), len(item.context) + len(item.answer)
    is_answer = [low < end and high > begin for low, high in encoding.offset_mapping]
    ids, is_answer = torch.tensor(encoding.input_ids), torch.tensor(is_answer, dtype=torch.bool)
    if not is_answer.any() or tokenizer.unk_token_id in ids[is_answer].tolist():
        raise ValueError(f"questions: this tokenizer cannot spell the answer {item.answer!r}")
    return ids, is_answer


def run(
    predictors: list[Predictor],
    items: Iterable[Item],
    tokenizer: Any,
    count: int,
    watch: Callable[[int, int, list[Tally]], None],
) -> tuple[list[Tally], int]:
    """Ask the first ``count`` items of one stream; a tally for each predictor, and the tokens of the stream.

    ``watch`` is called after every item with the items and the tokens done, and the tallies.
    """
    tallies = [Tally(count) for _ in predictors]
    last, tokens = first_token(tokenizer), 1
    for predictor in predictors:
        predictor.reset()
    for number, item in enumerate(islice(items, count)):
        ids, is_answer = encode(item, tokenizer)
        fed = torch.cat((torch.tensor([last]), ids[:-1]))
        for predictor, tally in zip(predictors, tallies, strict=True):
            tally.add(number, bool(predictor.feed(fed, ids, is_answer).hits[is_answer].all()))
        last, tokens = int(ids[-1]), tokens + len(ids)
        watch(number + 1, tokens, tallies)
    return tallies, tokens
