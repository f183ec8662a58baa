"""A chat as one endless stream: what a tokenizer's chat template writes around the texts of the turns."""

from __future__ import annotations

from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

# Stand for the texts of turns while the template is taken apart.
FIRST, REPLY, SECOND = "first 0a7f question", "first 0a7f reply", "second 0a7f question"


@dataclass(frozen=True)
class ChatTemplate:
    """Parts of a chat template. A chat is ``start``, then for each turn: `asked`, the reply, ``end``."""

    start: str
    """Before the first turn: a start token, a default system message; may be empty."""
    before_question: str
    """Before what the user says."""
    before_reply: str
    """Between that and the reply, as in a prompt for generation."""
    end: str
    """After the reply."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Take a tokenizer's chat template apart.

        Raises:
            ValueError: if there is none, or if it does not write every turn in the same way.
        """
        if not tokenizer.chat_template:
            raise ValueError("chat: this model's tokenizer has no chat template")
        chat = [
            {"role": "user", "content": FIRST},
            {"role": "assistant", "content": REPLY},
            {"role": "user", "content": SECOND},
        ]
        try:
            replied = str(tokenizer.apply_chat_template(chat[:2], tokenize=False))
            asked = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise ValueError(f"chat: this model's chat template takes no plain chat: {error}") from error
        opening, end = asked.partition(FIRST)[0], replied.partition(REPLY)[2]
        between, second, before_reply = asked.partition(REPLY)[2].partition(SECOND)
        before_question = between.removeprefix(end)
        if not (second and between.startswith(end) and opening.endswith(before_question)):
            raise ValueError("chat: this model's chat template does not write every turn in the same way")
        return cls(opening.removesuffix(before_question), before_question, before_reply, end)

    def asked(self, question: str) -> str:
        """A turn up to the reply."""
        return self.before_question + question.strip() + self.before_reply
