"""Questions with one right answer each, to be asked in a stream: lines to look up, code to complete, pairs from a file.

The lines follow StreamEval (arXiv 2309.17453, section 4.3), whose data was never released: a stream of lines, each
with a name and a value, and now and then the question for the value of the line so many lines back.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

# Two syllables make a name that no text contains and that any tokenizer can spell.
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
LEAST_NAMES = 400

PASSAGE = 6


@dataclass(frozen=True)
class Item:
    """A stretch of a stream with a question in it; its text is context, answer and closing, end to end."""

    context: str
    """What comes before the answer, the question included."""
    answer: str
    """The right answer; not empty."""
    closing: str
    """What ends the item."""


def line_text(name: str, value: str) -> str:
    """A line that can be asked for."""
    return f"line {name} {value}\n"


def line_question(name: str, value: str) -> Item:
    """The question for a line."""
    return Item(f"Recall line {name} ", value, "\n")


class LineSource:
    """Lines with names and values drawn at random; a name comes again only after half as many lines as there are names.

    Args:
        rng: source of randomness.
        reach: how many lines back a question may be; there are at least four times as many names.
    """

    def __init__(self, rng: np.random.Generator, reach: int = 1) -> None:
        names = [first + second for first in SYLLABLES for second in SYLLABLES]
        if reach * 4 > len(names):
            raise ValueError(f"distance: expected at most {len(names) // 4} lines, got {reach}")
        # The same names for the same reach in every stream: a model can be trained on the first ones.
        order = np.random.default_rng(0).permutation(len(names))[: max(LEAST_NAMES, reach * 4)]
        self.names = [names[place] for place in order]
        self._rng = rng
        self._resting: deque[str] = deque(maxlen=len(self.names) // 2)

    def draw(self) -> tuple[str, str]:
        """The name and the value of a new line."""
        while (name := self.names[self._rng.integers(len(self.names))]) in self._resting:
            pass
        self._resting.append(name)
        return name, str(self._rng.integers(100, 1000))


def line_items(distance: int, every: int, seed: int = 0) -> Iterator[Item]:
    """Endless lines; after every ``every`` lines the question for the line ``distance`` lines back (1: the last one).

    Every item holds the lines since the last question and a question. Raises ValueError for a distance or an interval
    below 1, or a distance that there are not enough names for.
    """
    for name, size in (("distance", distance), ("every", every)):
        if size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size}")
    source = LineSource(np.random.default_rng(seed), distance)

    def items() -> Iterator[Item]:
        known: deque[tuple[str, str]] = deque(maxlen=distance)
        context, count = [], 0
        while True:
            known.append(source.draw())
            context.append(line_text(*known[-1]))
            count += 1
            if count % every == 0 and len(known) == distance:
                question = line_question(*known[0])
                yield Item("".join(context) + question.context, question.answer, question.closing)
                context = []

    return items()


def read_items(path: Path) -> list[Item]:
    """Question-answer pairs from a JSONL file: on each line an object with the strings ``question`` and ``answer``.

    Raises:
        ValueError: a file that cannot be read, is empty, or has a line that is no such object; the message says which.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"questions: cannot read {path}: {reason}") from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            question, answer = pair["question"].strip(), pair["answer"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            question = answer = ""
        if not question or not answer:
            form = '{"question": "...", "answer": "..."}'
            raise ValueError(f"questions: expected {form} in line {number} of {path}, got {line[:60]!r}")
        items.append(Item(f"Question: {question}\nAnswer: ", answer, "\n\n"))
    if not items:
        raise ValueError(f"questions: {path} is empty")
    return items


def code_items(pieces: Iterator[str]) -> Iterator[Item]:
    """Passages of code whose last word is to be told, from a text: questions for a model that reads Python."""
    lines = (line for piece in pieces for line in piece.split("\n") if line.strip())
    while passage := list(islice(lines, PASSAGE)):
        if match := re.fullmatch(r"(.*\W)(\w{3,})(\W*)", passage[-1]):
            context = "".join(f"{line}\n" for line in passage[:-1])
            yield Item(context + match[1], match[2], f"{match[3]}\n\n")
