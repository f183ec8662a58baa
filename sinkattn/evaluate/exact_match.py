"""Teacher-forced exact match: the accuracy of several methods on the questions of one stream.

An answer is right if each of its tokens is the argmax given the right tokens before it, which is when greedy decoding
would generate that answer. The right answer is what stays in the stream, so an error does not cause further ones, and
all methods read the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.items import Item
from sinkattn.evaluate.methods import Predictor
from sinkattn.hf.chat.template import ChatTemplate

QUARTERS = 4


class Tally:
    """Counts of questions and right answers, in each quarter of a stream of ``count`` questions."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked = [0] * QUARTERS
        self.right = [0] * QUARTERS

    def add(self, number: int, right: bool) -> None:
        """Record whether question ``number``, counted from 0, was answered right."""
        quarter = number * QUARTERS // self.count
        self.asked[quarter] += 1
        self.right[quarter] += right

    @property
    def accuracy(self) -> float:
        """Fraction of right answers so far; 0 if nothing was asked."""
        return sum(self.right) / max(1, sum(self.asked))

    def as_dict(self) -> dict[str, Any]:
        """Accuracy, its 95 % Wilson confidence interval, and the accuracy by quarter (None if nothing was asked)."""
        low, high = binomtest(sum(self.right), sum(self.asked)).proportion_ci(method="wilson")
        quarters = [right / asked if asked else None for right, asked in zip(self.right, self.asked, strict=True)]
        return {
            "questions": sum(self.asked),
            "accuracy": self.accuracy,
            "low": float(low),
            "high": float(high),
            "accuracy_by_quarter": quarters,
        }


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """First token of a stream of questions: the tokenizer's start token, or a line break if it has none.

    Raises ValueError for a tokenizer with neither.
    """
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if not (line_break := tokenizer("\n", add_special_tokens=False).input_ids):
        raise ValueError("tokenizer: has neither a start token nor a line break, so the stream has no first token")
    return line_break[-1]


def start_ids(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> list[int]:
    """First tokens of a stream of questions: what the chat template begins with, or else `first_token`."""
    start = [] if template is None else tokenizer(template.start, add_special_tokens=False).input_ids
    return start or [first_token(tokenizer)]


def encode(
    item: Item, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids of an item, int64 ``[tokens]``, and a mask of its answer, bool ``[tokens]``.

    With a template, the item is a turn of a chat. A token that covers both a part of the answer and text around it
    counts as the answer's. Raises ValueError for an answer that the tokenizer cannot represent.
    """
    before, answer, after = item.context, item.answer, item.closing
    if template is not None:
        before, answer, after = template.asked(item.question), item.reply, template.end
    encoding = tokenizer(
        before + answer + after,
        add_special_tokens=False,
        split_special_tokens=template is None,
        return_offsets_mapping=True,
        verbose=False,
    )
    begin, end = len(before), len(before) + len(answer)
    overlaps = [low < end and high > begin for low, high in encoding.offset_mapping]
    ids, is_answer = torch.tensor(encoding.input_ids), torch.tensor(overlaps, dtype=torch.bool)
    if not is_answer.any() or tokenizer.unk_token_id in ids[is_answer].tolist():
        raise ValueError(f"questions: this tokenizer cannot spell the answer {answer!r}")
    return ids, is_answer


OnProgress = Callable[[int, int, list[Tally]], None]
"""Called after every item with the items done, the tokens done and the tallies so far."""


def run(
    predictors: list[Predictor],
    items: Iterable[Item],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    on_progress: OnProgress,
    template: ChatTemplate | None = None,
) -> tuple[list[Tally], int]:
    """Feed the first ``count`` items to all predictors; returns a tally for each, and the tokens of the stream.

    With a template, the items are turns of a chat. Raises `Interrupted` if it is raised in a forward before any item
    is done; later it only ends the stream early.
    """
    tallies = [Tally(count) for _ in predictors]
    start = torch.tensor(start_ids(tokenizer, template))
    last, tokens = int(start[-1]), len(start)
    for predictor in predictors:
        predictor.reset()
        if len(start) > 1:
            predictor.feed(start[:-1], start[1:], torch.zeros(len(start) - 1, dtype=torch.bool))
    try:
        for number, item in enumerate(islice(items, count)):
            ids, is_answer = encode(item, tokenizer, template)
            fed = torch.cat((torch.tensor([last]), ids[:-1]))
            # Only after all forwards: an interrupted item counts for no predictor.
            scores = [predictor.feed(fed, ids, is_answer) for predictor in predictors]
            for tally, each in zip(tallies, scores, strict=True):
                tally.add(number, bool(each.hits[is_answer].all()))
            last, tokens = int(ids[-1]), tokens + len(ids)
            on_progress(number + 1, tokens, tallies)
    except Interrupted:
        if tokens == len(start):
            raise
    return tallies, tokens
