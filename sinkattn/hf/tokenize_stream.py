"""Tokenize a text that comes in pieces as it would be tokenized in one."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

# In front of white space whose end is known, which tokenizers rarely join with what is before it; so many characters
# before the end, because tokens may be as long.
CUTS = re.compile(r"(?<=\S)(?=\s+\S)")
AHEAD = 16
# The last cuts that are tried.
MAX_TRIED = 8
# Characters without a cut, after which the text is cut where it ends.
MAX_OPEN = 1024
# What an open text is tokenized after. Some tokenizers treat the beginning of a text in another way.
BEFORE = "a"


class TokenizeStream:
    """Token ids of a text that comes in pieces, in constant memory.

    Ids are final if no text that follows changes them. The others are those of the open text, after the last place
    where the tokenizer gives the same ids for both sides as for the whole: usually a word and the white space around
    it. Only in text that has no such place for 1,024 characters ids may differ from those of the whole text.

    Args:
        tokenizer: a transformers tokenizer. Special tokens spelled out in the text are tokenized as ordinary text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        keep_no_words(tokenizer)
        self._before = self._open = ""

    def append(self, text: str) -> list[int]:
        """Continue the text; returns the ids that have become final, after those of earlier calls."""
        self._open += text
        ids = self.open_ids()
        cuts = [match.start() for match in CUTS.finditer(self._open, 0, max(0, len(self._open) - AHEAD))]
        for cut in reversed(cuts[-MAX_TRIED:]):
            head, rest = self._open[:cut], self._open[cut:]
            final = self._encode(self._before, head)
            if final + self._encode(BEFORE, rest) == ids:
                self._before, self._open = BEFORE, rest
                return final
        if len(self._open) > MAX_OPEN:
            self._before = self._open = ""
            return ids
        return []

    def open_ids(self, following: str = "") -> list[int]:
        """Ids of the text that are not final, as they are if ``following`` is its end."""
        return self._encode(self._before, self._open + following)

    def finish(self) -> list[int]:
        """End the text; returns the rest of its ids. What is appended next is a new text."""
        ids = self.open_ids()
        self._before = self._open = ""
        return ids

    def _encode(self, before: str, text: str) -> list[int]:
        return text_ids(self._tokenizer, before + text)[len(text_ids(self._tokenizer, before)) :]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ordinary text: without special tokens, also where they are spelled out."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return ids


def keep_no_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Turn off the tokenizer's cache of up to 10,000 words, which would grow with a stream."""
    resize = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "_resize_cache", None)
    if resize is not None:
        resize(0)
