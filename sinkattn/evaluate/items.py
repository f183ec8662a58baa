"""Questions with one right answer each, to be asked in a stream: lines to recall, code to complete, pairs from a file.

The lines follow StreamEval (arXiv 2309.17453, section 4.3), whose data was never released: a stream of lines, each
with a name and a value, and at regular intervals a question for the value of the line a fixed number of lines back.
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

# Names are two syllables: unlikely to be words, and plain letters for any tokenizer.
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
MIN_NAMES = 400

PASSAGE_LINES = 6


@dataclass(frozen=True)
class Item:
    """A piece of a stream with one question; its text is context + answer + closing, in a chat question + reply."""

    context: str
    """Text up to the answer, including the question."""
    answer: str
    """The right answer; not empty."""
    closing: str
    """Text after the answer."""
    question: str
    """What a user says in a chat, the context with it."""
    reply: str
    """The right reply to it; not empty."""


def line_text(name: str, value: str) -> str:
    """A line with a name and a value."""
    return f"line {name} {value}\n"


def line_question(name: str, value: str, context: str = "") -> Item:
    """The question for the value of a line, after the lines in ``context``."""
    question = f'{context}\nPlease repeat the line that begins with "line {name}".'
    return Item(f"{context}Recall line {name} ", value, "\n", question, line_text(name, value).strip())


class LineSource:
    """Random lines. A name is reused only after half as many lines as there are names, so no question is ambiguous.

    Args:
        rng: source of randomness.
        max_distance: how many lines back a question may be; there are at least four times as many names.
    """

    def __init__(self, rng: np.random.Generator, max_distance: int = 1) -> None:
        names = [first + second for first in SYLLABLES for second in SYLLABLES]
        if max_distance * 4 > len(names):
            raise ValueError(f"distance: expected at most {len(names) // 4} lines, got {max_distance}")
        # The names do not depend on `rng`, so that a model can be trained on the names that it is asked for.
        order = np.random.default_rng(0).permutation(len(names))[: max(MIN_NAMES, max_distance * 4)]
        self.names = [names[index] for index in order]
        self._rng = rng
        self._recent: deque[str] = deque(maxlen=len(self.names) // 2)

    def draw(self) -> tuple[str, str]:
        """Draw the name and the value of a new line."""
        while (name := self.names[self._rng.integers(len(self.names))]) in self._recent:
            pass
        self._recent.append(name)
        return name, str(self._rng.integers(100, 1000))


def line_items(distance: int, every: int, seed: int = 0) -> Iterator[Item]:
    """Endless lines, with a question every ``every`` lines for the line ``distance`` lines back (1: the last one).

    An item holds the lines since the last question, and a question. Raises ValueError if ``distance`` or ``every`` is
    below 1, or if there are not enough names for ``distance``.
    """
    for name, size in (("distance", distance), ("every", every)):
        if size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size}")
    source = LineSource(np.random.default_rng(seed), distance)

    def items() -> Iterator[Item]:
        known: deque[tuple[str, str]] = deque(maxlen=distance)
        context: list[str] = []
        count = 0
        while True:
            known.append(source.draw())
            context.append(line_text(*known[-1]))
            count += 1
            if count % every == 0 and len(known) == distance:
                yield line_question(*known[0], "".join(context))
                context = []

    return items()


def read_items(path: Path) -> list[Item]:
    """Question-answer pairs from a JSONL file: on each line an object with the strings ``question`` and ``answer``.

    Raises:
        ValueError: for a file that cannot be read, is empty, or has any other line; the message says which.
    """
    return [
        Item(f"Question: {question}\nAnswer: ", answer, "\n\n", question, answer)
        for question, answer in _read_strings(path, "question", "answer")
    ]


def read_questions(path: Path) -> list[str]:
    """Questions from a JSONL file: on each line an object with the string ``question``; errors as of `read_items`."""
    return [question for (question,) in _read_strings(path, "question")]


def _read_strings(path: Path, *names: str) -> list[list[str]]:
    """The strings with these names from each line of a JSONL file, stripped; none is empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"questions: cannot read {path}: {reason}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            row = [fields[name].strip() for name in names]
        except (ValueError, KeyError, TypeError, AttributeError):
            row = [""]
        if not all(row):
            form = json.dumps(dict.fromkeys(names, "..."))
            raise ValueError(f"questions: expected {form} in line {number} of {path}, got {line[:60]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"questions: {path} is empty")
    return rows


def code_items(pieces: Iterator[str]) -> Iterator[Item]:
    """Passages of source code in ``pieces`` of text; the answer is the last word of each passage."""
    lines = (line for piece in pieces for line in piece.split("\n") if line.strip())
    while passage := list(islice(lines, PASSAGE_LINES)):
        if match := re.fullmatch(r"(.*\W)(\w{3,})(\W*)", passage[-1]):
            context = "".join(f"{line}\n" for line in passage[:-1]) + match[1]
            question = f"Which word comes next? Reply with the word only.\n\n{context}"
            yield Item(context, match[2], f"{match[3]}\n\n", question, match[2])
