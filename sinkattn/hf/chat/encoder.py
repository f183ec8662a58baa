"""`MessageEncoder`: ids of the messages of a chat, each by itself, as a tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain, zip_longest
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from sinkattn.hf.chat.template import FIRST, REPLY, ChatTemplate, rendered

# A chat by which a template is tried out. In the second reply the model thinks aloud, which some templates drop later.
QUESTIONS = ("What is 2 + 2?", "And with 3.5 more,\nwhat is it then?", "Wie heißt das auf Französisch?")
REPLIES = ("It is 4.", "<think>\n4 + 3.5\n</think>\n\nIt is **7.5**.", "« sept et demi »")


class MessageEncoder:
    """Encodes each message of a chat without those before it, so that a turn of a long chat costs what the first costs.

    A chat is ``prefix``, then for each turn `question`, ``before_reply``, the reply without the token that ended it,
    and ``end``. These ids are the ids of the whole chat, which is tried out with a chat of three turns: a template that
    writes a message in another way once others follow is refused.

    Args:
        tokenizer: one with a chat template.
        system: the system prompt; None for what the template writes without one.

    Attributes:
        prefix: ids before the first message: a start token, the system message; may be empty.
        before_reply: ids that a reply begins with, written by the template; may be empty.
        end: ids after a reply.
        special_ids: ids of special tokens that the template writes around messages. In a reply they end it.
        replies_stand_alone: whether the template writes a reply without the question before it, so that a chat of which
            the first question is forgotten is one of this template.

    Raises:
        ValueError: for a template that cannot be cut into messages, or a system prompt with special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template = ChatTemplate.of(tokenizer, system)
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        if system is not None and (found := self._special_of(self._encode(system))):
            raise ValueError(f"system: expected text without special tokens, got {self._text(found[:1])!r}")
        self.prefix = self._encode(template.start)
        self.before_reply, self.end = self._encode(template.before_reply), self._encode(template.end)
        self._question_special = self._special_of(self._encode(template.question("")))
        self.special_ids = frozenset((*self._question_special, *self._special_of([*self.before_reply, *self.end])))
        self.replies_stand_alone = self._has_replies_alone(system)
        if not self._is_whole(system):
            raise ValueError(
                "chat: this model's chat template cannot be cut into messages: it writes some of them in another way "
                "once others follow, such as without what the model thought"
            )

    def question(self, text: str) -> list[int]:
        """Ids of a message of the user; raises ValueError for one that is empty or has special tokens."""
        if not text.strip():
            raise ValueError("message: expected text, got none")
        ids = self._encode(self._template.question(text))
        if self._special_of(ids) != self._question_special:
            found = self._special_of(self._encode(text))
            raise ValueError(f"message: expected text without special tokens, got {self._text(found[:1])!r}")
        return ids

    def reply(self, text: str) -> list[int]:
        """Ids of the text of a reply, which comes between ``before_reply`` and ``end``.

        Raises ValueError for one that has special tokens.
        """
        ids = self._encode(text)
        if found := self._special_of(ids):
            raise ValueError(f"reply: expected text without special tokens, got {self._text(found[:1])!r}")
        return ids

    def read(self, ids: list[int]) -> list[tuple[Literal["user", "assistant"], int, str]]:
        """The messages in the ids of a message or a turn: who it is from, its number of tokens and its text."""
        before, template, text = len(self.before_reply), self._template, self._text(ids)
        if before and ids[:before] == self.before_reply:
            return [("assistant", len(ids), self._text(ids[before:]).removesuffix(template.end).strip())]
        asked = text.removeprefix(template.before_question).partition(template.after_question or REPLY)[0].strip()
        question = self._encode(template.question(asked))
        if len(question) == len(ids) or ids[: len(question)] != question:
            return [("user", len(ids), asked)]
        reply = self._text(ids[len(question) + before :]).removesuffix(template.end).strip()
        return [("user", len(question), asked), ("assistant", len(ids) - len(question), reply)]

    def longest_turn(self, questions: Collection[str], max_reply: int) -> int:
        """The most tokens that one of these questions has with a reply of so many."""
        return max(len(self.question(text)) for text in questions) + len(self.before_reply) + max_reply + len(self.end)

    def _has_replies_alone(self, system: str | None) -> bool:
        try:
            alone = rendered(self._tokenizer, system, [REPLY, FIRST], first_role="assistant")
        except jinja2.TemplateError:
            return False
        template = self._template
        return alone == template.start + template.before_reply + REPLY + template.end + template.question(FIRST)

    def _is_whole(self, system: str | None) -> bool:
        """Whether the ids of a chat are those of its messages, one after the other."""
        turns = chain.from_iterable(zip(QUESTIONS, REPLIES, strict=True))
        rest = self._encode(rendered(self._tokenizer, system, [*turns]))
        before = self.prefix
        for question, reply in zip_longest(QUESTIONS, ("", *REPLIES)):
            asked = [] if question is None else [*self.question(question), *self.before_reply]
            piece = [*before, *asked]
            begins = range(len(rest) - len(piece) + 1) if asked else [len(rest) - len(piece)]
            begin = next((x for x in begins if x >= 0 and rest[x : x + len(piece)] == piece), None)
            if begin is None or self._text(rest[:begin]).strip() != reply:
                return False
            rest, before = rest[begin + len(piece) :], self.end
        return True

    def _encode(self, text: str) -> list[int]:
        return [*self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids]

    def _special_of(self, ids: Collection[int]) -> list[int]:
        return [number for number in ids if number in self._special]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
