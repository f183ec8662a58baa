"""Streams of one text or of several in turn, such that text that is never streamed is left to measure forgetting."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING

from sinkattn.evaluate.text import StandardLibrary, Text, TextError, TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_FOLDERS = 3
MODULES = "modules"  # files outside of all folders
PROSE = "prose"
# Of the drifting text: each folder, prose, and the first folder again.
NUM_TEXTS, NUM_SECTIONS = NUM_FOLDERS + 1, NUM_FOLDERS + 2
# Of a text of several files every so many is held out, from its beginning on, for so many tokens at least.
HELD_OUT_ONE_IN = 8
MIN_PART = 64


class Sections:
    """A stream of sections, each of the next tokens of a text; some of every text is held out.

    Of a text of several files every eighth is held out: the stream leaves it out as a whole. Of any other text it is
    the beginning. A text to which the stream comes back goes on where it was left, so nothing is read twice unless it
    is too short.

    Args:
        streams: the texts by name, which have one tokenizer.
        order: the text of each section.
        held_out: tokens of each text that are held out, at most; 0 for none.

    Attributes:
        held_out: ids of what is held out of each text, by name; with the start token, if there is one.
    """

    def __init__(self, streams: dict[str, TokenStream], order: Sequence[str], held_out: int) -> None:
        self._order = order
        self._streams = streams
        start = next(iter(streams.values())).start_token
        self._start = [] if start is None else [start]
        self._ids: dict[str, Iterator[int]] = {}
        self.held_out: dict[str, list[int]] = {}
        for name, stream in streams.items():
            kept: list[int] = []
            if held_out:
                kept = _hold_out_files(stream, held_out - len(self._start))
            self._ids[name] = islice(stream, len(self._start), None)
            if held_out:
                self.held_out[name] = self._start + (kept or list(islice(self._ids[name], held_out - len(self._start))))

    @property
    def restarts(self) -> int:
        """How many times texts have been started over because they were too short."""
        return sum(stream.restarts for stream in self._streams.values())

    def read(self, section: int) -> Iterator[int]:
        """Endless ids, ``section`` of each text in turn."""
        parts = (islice(self._ids[name], section) for name in cycle(self._order))
        first = islice(chain(self._start, next(parts)), section)
        return chain(first, chain.from_iterable(parts))


def _hold_out_files(stream: TokenStream, count: int) -> list[int]:
    """Take every eighth file of a text out of it, and return up to ``count`` ids of their beginnings, of each as many.

    Nothing is taken out of a text that does not consist of files.
    """
    text = stream.text
    if not isinstance(text, StandardLibrary | Prose) or len(text.names) < 2:
        return []
    names = text.names[::HELD_OUT_ONE_IN]
    text.names = [name for name in text.names if name not in names]
    ids: list[int] = []
    for name in names:
        file = copy.copy(text)
        file.names = [name]
        with suppress(TextError):  # an empty file
            part = TokenStream(file, stream.tokenizer, with_start=False).once()
            ids += islice(part, max(MIN_PART, math.ceil(count / len(names))))
    return ids[:count]


class Folder(StandardLibrary):
    """The held-out files of one folder of the standard library; ``modules`` are those outside of all folders."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.names = [each for each in self.names if _folder(each) == name]
        self.description = f"{self.description}, {name}"


class Prose:
    """The reference of Python, in English, that ``help()`` shows. Raises TextError if this Python lacks it."""

    description = "the reference of Python, in English"

    def __init__(self) -> None:
        try:
            self._topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
            self.names = list(self._topics)
        except ImportError as error:
            raise TextError("text: this Python comes without the topics of help(); give --text FILE") from error

    def pieces(self) -> Iterator[str]:
        """The topics, one by one."""
        yield from (self._topics[name] for name in self.names)


def drifting_streams(tokenizer: PreTrainedTokenizerBase, with_start: bool) -> tuple[dict[str, TokenStream], list[str]]:
    """A text that drifts, from what every Python has: the largest folders, English prose, and the first folder again.

    Args:
        tokenizer: a transformers tokenizer.
        with_start: False omits the start token.

    Returns:
        The streams by name, and the order of their sections.

    Raises:
        TextError: if this Python lacks some of it.
    """
    folders = largest_folders(StandardLibrary())
    texts: dict[str, Text] = {**{name: Folder(name) for name in folders}, PROSE: Prose()}
    return {name: TokenStream(text, tokenizer, with_start) for name, text in texts.items()}, [*texts, folders[0]]


def largest_folders(library: StandardLibrary) -> list[str]:
    """The folders of a library with most held-out text, largest first."""
    sizes: dict[str, int] = {}
    for name in library.names:
        sizes[_folder(name)] = sizes.get(_folder(name), 0) + (library.root / name).stat().st_size
    if len(sizes) < NUM_FOLDERS:
        raise TextError(f"text: expected a standard library of {NUM_FOLDERS} folders or more, got {len(sizes)}")
    return sorted(sizes, key=lambda name: (-sizes[name], name))[:NUM_FOLDERS]


def _folder(name: str) -> str:
    folder, separator, _ = name.partition("/")
    return folder if separator else MODULES
