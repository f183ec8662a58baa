"""What ``sinkattn generate --follow`` reads and says: the places in a text, and the words at each of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from sinkattn.cli.limited import Limited, asked
from sinkattn.hf import SamplingParams
from sinkattn.hf.follow import Follower
from sinkattn.hf.stream import stream_text
from sinkattn.hf.tokenize_stream import TokenizeStream, text_ids

# Characters of a line that a pattern is looked for in.
MAX_LINE = 65536


@dataclass(frozen=True)
class Manner:
    """Where the model speaks, and how."""

    every: int | None = None
    """Tokens from one place to the next; None to speak after lines."""
    pattern: re.Pattern[str] = re.compile(r"\S")
    """What is found in the lines after which the model speaks."""
    prompt: str = ""
    """What comes before what it says, each time."""
    closing: list[int] = field(default_factory=list)
    """Ids between the prompt and what it says."""
    one_line: bool = True
    """Whether what it says ends with a line, the first one that is not blank."""
    keep: bool = False
    """Whether the prompt and what it says stay in the stream."""
    max_new_tokens: int | None = None
    """The most tokens that it says at a time."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How its words are chosen. A ``seed`` is that of the first time, the next one of the second."""
    options: dict[str, Any] = field(default_factory=dict)
    """Others of `stream_tokens`."""


class Speaker:
    """Passes a text on to a model as it comes, and writes to stdout what the model says at its places.

    Args:
        follower: the model.
        tokenizer: its tokenizer.
        text: the text, to be read by this tokenizer.
        manner: where it speaks, and how.
        before: called before it speaks.

    Attributes:
        num_times: how often it has spoken.
        num_cut_off: how often what it said did not get to the end of its grammar.
    """

    def __init__(
        self,
        follower: Follower,
        tokenizer: PreTrainedTokenizerBase,
        text: TokenizeStream,
        manner: Manner,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._follower, self._tokenizer, self._manner, self._before = follower, tokenizer, manner, before
        self._text = text
        self._line = ""
        self._until_next = manner.every or 0
        self._has_new_text = False
        self.num_times = self.num_cut_off = 0

    def read(self, piece: str) -> None:
        """Read text, and speak at the places in it."""
        if self._manner.every:
            self._read_tokens(self._text.append(piece))
            return
        for part, is_place in self._parts(piece):
            self._follower.read(self._text.append(part))
            self._has_new_text = True
            if is_place:
                self._speak_after_open_text()

    def finish(self) -> None:
        """The text ends: say a last word, unless its end was a place."""
        if self._manner.every:
            self._read_tokens(self._text.finish())
        if self._has_new_text:
            self._speak_after_open_text()

    def _read_tokens(self, ids: list[int]) -> None:
        while ids:
            part, ids = ids[: self._until_next], ids[self._until_next :]
            self._follower.read(part)
            self._has_new_text = True
            self._until_next -= len(part)
            if not self._until_next:
                self._until_next = self._manner.every or 0
                self._speak(text_ids(self._tokenizer, self._manner.prompt))

    def _parts(self, piece: str) -> Iterator[tuple[str, bool]]:
        """Cut text after each line that the model speaks after; also whether a part ends with one."""
        part = ""
        for line in re.findall(r"[^\n]*\n|[^\n]+", piece):
            part += line
            self._line = (self._line + line)[:MAX_LINE]
            if line.endswith("\n"):
                whole, self._line = self._line.rstrip("\r\n"), ""
                if self._manner.pattern.search(whole):
                    yield part, True
                    part = ""
        if part:
            yield part, False

    def _speak_after_open_text(self) -> None:
        if self._manner.keep:
            self._follower.read(self._text.finish())
        self._speak(self._text.open_ids(self._manner.prompt))

    def _speak(self, prompt_ids: list[int]) -> None:
        self._before()
        self._has_new_text = False
        manner = self._manner
        prompt_ids, said, seed = prompt_ids + manner.closing, list[int](), manner.sampling.seed
        sampling = manner.sampling if seed is None else replace(manner.sampling, seed=seed + self.num_times)
        self.num_times += 1
        most = asked(manner.max_new_tokens, has_grammar=sampling.grammar is not None)
        tokens = self._follower.say(prompt_ids, max_new_tokens=most, sampling=sampling, **manner.options)
        limited = Limited(tokens, manner.max_new_tokens)
        pieces = stream_text(self._tokenizer, _noted(limited, said), prompt_ids)
        for piece in first_line(pieces) if manner.one_line else pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.num_cut_off += limited.is_cut_off
        if manner.keep:
            if "\n" not in str(self._tokenizer.decode(said)).lstrip():
                said += text_ids(self._tokenizer, "\n")
            self._follower.read(prompt_ids + said, learn=False)


def _noted(tokens: Iterable[int], said: list[int]) -> Iterator[int]:
    """The same tokens, which are noted in ``said``."""
    for token in tokens:
        said.append(token)
        yield token


def first_line(pieces: Iterable[str]) -> Iterator[str]:
    """The first line that is not blank, without its end."""
    blank: str | None = ""
    for piece in pieces:
        if blank is not None:
            blank += piece
            words = blank.lstrip()
            if not words:
                continue
            piece, blank = blank[: len(blank) - len(words)].rpartition("\n")[2] + words, None
        line, end, _ = piece.partition("\n")
        yield line
        if end:
            return
