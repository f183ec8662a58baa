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
    """Before the first turn: a start token, the system message, given or default; may be empty."""
    before_question: str
    """Before what the user says."""
    after_question: str
    """After it, where the message of the user ends."""
    before_reply: str
    """Then, before the reply, as in a prompt for generation; may be empty."""
    end: str
    """After the reply."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> ChatTemplate:
        """Take a tokenizer's chat template apart.

        Args:
            tokenizer: one with a chat template.
            system: the system prompt; None for what the template writes without one.

        Raises:
            ValueError: if there is none, or if it does not write every turn in the same way.
        """
        if not tokenizer.chat_template:
            raise ValueError("chat: this model's tokenizer has no chat template")
        what = "plain chat" if system is None else "system prompt"
        try:
            replied = rendered(tokenizer, system, [FIRST, REPLY])
            closed = rendered(tokenizer, system, [FIRST, REPLY, SECOND])
            asked = rendered(tokenizer, system, [FIRST, REPLY, SECOND], is_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat: this model's chat template takes no {what}: {error}") from error
        opening, end = closed.partition(FIRST)[0], replied.partition(REPLY)[2]
        between, second, after_question = closed.partition(REPLY)[2].partition(SECOND)
        before_question = between.removeprefix(end)
        is_regular = second and between.startswith(end) and opening.endswith(before_question)
        if not (is_regular and asked.startswith(closed)):
            with_system = "" if system is None else "with a system prompt "
            raise ValueError(f"chat: {with_system}this model's chat template does not write every turn in the same way")
        start = opening.removesuffix(before_question)
        return cls(start, before_question, after_question, asked.removeprefix(closed), end)

    def question(self, text: str) -> str:
        """The message of the user."""
        return self.before_question + text.strip() + self.after_question

    def asked(self, question: str) -> str:
        """A turn up to the reply."""
        return self.question(question) + self.before_reply


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    texts: list[str],
    *,
    is_prompt: bool = False,
    first_role: str = "user",
) -> str:
    """A chat as the tokenizer's template writes it; raises jinja2.TemplateError if the template refuses it.

    Args:
        tokenizer: one with a chat template.
        system: the system prompt; None for none.
        texts: what user and assistant say in turns, beginning with ``first_role``.
        is_prompt: whether the beginning of a reply follows.
    """
    roles = ["user", "assistant"] if first_role == "user" else ["assistant", "user"]
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt))
