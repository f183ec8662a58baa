"""Whole messages or tokens leave, the whole system prompt or a few sinks stay: one chat, predicted each way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from sinkattn.evaluate.chat import Round
from sinkattn.evaluate.methods import CHUNK_TOKENS, copy_sharing_weights
from sinkattn.evaluate.speed import Speed
from sinkattn.evaluate.statistics import Blocks
from sinkattn.hf import enable
from sinkattn.hf.chat.encoder import MessageEncoder
from sinkattn.hf.pool.messages import Messages
from sinkattn.hf.pool.row_cache import RowCache, RowInput
from sinkattn.hf.versions import forward_cache

NUM_SINKS = 4
SYSTEM = (
    "You are Ada, the cook of a small sailing ship. You are cheerful, you answer in two short sentences, and you end "
    "every answer with a question about the sea."
)
Unit = Literal["token", "message", "turn"]
"""What leaves at a time: a token, a question or a reply, or a question with its reply."""


@dataclass
class Dialogue:
    """The ids of a chat, and what is where."""

    ids: list[int]
    num_prefix: int
    """Tokens of the system prompt."""
    wanted: list[bool]
    """Tokens that the model is asked for: those of replies, and the one that ends a reply."""
    begins: dict[Unit, list[int]] = field(default_factory=lambda: {"token": [], "message": [], "turn": []})
    """First tokens of what leaves at a time, without the system prompt."""
    ends: dict[int, int] = field(default_factory=dict)
    """For the first token of a message the one after those that have one window there, in a `Chat`."""

    @classmethod
    def of(cls, encoder: MessageEncoder, rounds: Sequence[Round]) -> Dialogue:
        """Encode a chat."""
        dialogue = cls([*encoder.prefix], len(encoder.prefix), [False] * len(encoder.prefix))
        for each in rounds:
            question, opening, reply = encoder.question(each.question), encoder.before_reply, encoder.reply(each.reply)
            asked, opened = len(dialogue.ids), len(dialogue.ids) + len(question)
            dialogue.begins["turn"].append(asked)
            dialogue.begins["message"] += [asked, opened]
            # A question makes room for the opening of its reply.
            dialogue.ends |= dict.fromkeys((asked, opened), opened + len(opening))
            dialogue._add([*question, *opening], 0)
            dialogue._add([*reply, *encoder.end], len(reply) + each.ended)
        return dialogue

    def _add(self, ids: Sequence[int], num_wanted: int) -> None:
        self.ids += ids
        self.wanted += [index < num_wanted for index in range(len(ids))]


@dataclass(frozen=True)
class Way:
    """What stays of the beginning of a chat, and what leaves at a time."""

    num_sinks: int
    window: int
    unit: Unit


def ways(num_prefix: int, total: int) -> list[Way]:
    """A few sinks or the whole system prompt, with each unit; all of them see up to ``total`` tokens.

    Raises:
        ValueError: if the system prompt leaves no window, or has no more tokens than the sinks.
    """
    if not NUM_SINKS < num_prefix < total:
        raise ValueError(
            f"system: expected a prompt of more than {NUM_SINKS} tokens and less than {total}, got {num_prefix}"
        )
    return [
        Way(num_sinks, total - num_sinks, unit)
        for num_sinks in (NUM_SINKS, num_prefix)
        for unit in ("token", "message", "turn")
    ]


def losses(
    model: PreTrainedModel, dialogue: Dialogue, way: Way, on_progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Losses in nats of the wanted tokens of a chat, fp64 ``[tokens]``; NaN for the others.

    Args:
        model: the model, which is not changed.
        dialogue: the chat.
        way: what the model sees of it.
        on_progress: called with the number of tokens so far.

    Raises:
        ValueError: if `sinkattn.enable` refuses the model, or sinks and window.
        Interrupted: if it is raised in a forward.
    """
    model = enable(copy_sharing_weights(model), way.num_sinks, way.window)
    cache = RowCache(model, 1, num_sinks=way.num_sinks)
    out, ids = torch.full((len(dialogue.ids),), torch.nan, dtype=torch.float64), torch.tensor(dialogue.ids)
    for seen, count, begin in _segments(dialogue, way):
        fed, _ = cache.select([RowInput(0, seen, way.num_sinks, begin, dialogue.ids[seen : seen + count])])
        with torch.inference_mode():
            logits = model(input_ids=fed, **{forward_cache(model): cache}, use_cache=True).logits[0].float()
        targets = ids[seen + 1 : seen + count + 1].to(model.device)
        out[seen + 1 : seen + count + 1] = functional.cross_entropy(logits[: len(targets)], targets, reduction="none")
        on_progress(seen + count)
    return np.where(dialogue.wanted, out.numpy(), np.nan)


def _segments(dialogue: Dialogue, way: Way) -> Iterator[tuple[int, int, int]]:
    """Parts of a chat that have one first window token: where they begin, their number of tokens, and that token."""
    messages, seen = Messages(way.num_sinks, way.window, 0), 0
    if way.unit != "token":
        # What the sinks leave of the system prompt leaves as a message, too.
        first = [way.num_sinks] if way.num_sinks < dialogue.num_prefix else []
        begins = [*first, *dialogue.begins[way.unit]]
        messages.restore(begins, [dialogue.ends.get(begin, begin) for begin in begins])
    while seen < len(dialogue.ids):
        count = min(CHUNK_TOKENS, len(dialogue.ids) - seen)
        count = count if way.unit == "token" else messages.run_length(seen, count)
        yield seen, count, 0 if way.unit == "token" else messages.window_begin(seen)
        seen += count


def blocks(values: np.ndarray, begin: int) -> Blocks:
    """Losses of the tokens from ``begin`` on."""
    out = Blocks(begin, len(values))
    out.add(begin, values[begin:])
    return out


def seconds(speed: Speed, rounds: int, question: int, max_reply: int, num_ways: int) -> float:
    """Estimate of the time that it takes to make a chat and to predict it."""
    tokens = question + max_reply
    # About four segments a round.
    predicted = 4 * speed.forward(tokens // 4)
    return rounds * (speed.forward(question) + max_reply * speed.step + num_ways * predicted)
