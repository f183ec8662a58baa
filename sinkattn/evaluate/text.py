"""Texts to stream, and their token ids. Texts are read in pieces, so that none is held in memory as a whole."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from sinkattn.hf.tokenize_stream import keep_no_words, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A piece ends at the first line break after this many characters, or after twice as many.
PIECE_CHARACTERS = 8192
# The same for a source that is read as it comes, so that what has come is soon used.
FEED_CHARACTERS = 512

# One file in this many of the standard library was held out from the training of the shipped model.
HELD_OUT_ONE_IN = 20


class TextError(ValueError):
    """A text cannot be streamed; the message says which and why."""


def path_hash(path: str) -> int:
    """Hash of a file's path relative to the standard library, with forward slashes; the same on every machine."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16)


def is_held_out(path: str) -> bool:
    """Whether a standard library file was held out from the shipped model's training; path as for `path_hash`."""
    return path_hash(path) % HELD_OUT_ONE_IN == 0


class Text(Protocol):
    """A text that can be read repeatedly."""

    description: str

    def pieces(self) -> Iterator[str]:
        """The text from its beginning, a few thousand characters at a time."""


class StandardLibrary:
    """The held-out source files of a Python standard library, concatenated in the order of their hashes.

    Args:
        root: folder of the library; default: that of the running Python.

    Raises:
        TextError: if the folder has no held-out source files.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
        names = []
        for folder, folders, files in os.walk(self.root):
            # Installed packages and generated build settings differ between machines.
            folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
            path = Path(folder).relative_to(self.root)
            names += [
                (path / name).as_posix()
                for name in files
                if name.endswith(".py") and not name.startswith("_sysconfigdata")
            ]
        self.names = sorted(filter(is_held_out, names), key=path_hash)
        self.description = f"standard library of Python {platform.python_version()}, held-out files"
        if not self.names:
            raise TextError("text: this Python comes without the sources of its standard library; give --text FILE")

    def pieces(self) -> Iterator[str]:
        """The sources in pieces. Files that are not UTF-8 are skipped, as they were in training."""
        for name in self.names:
            path = self.root / name
            if _is_utf8(path):
                with path.open(encoding="utf-8") as file:
                    yield from _pieces(file)


class TextFile:
    """A UTF-8 text file. Raises TextError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = path.name
        try:
            path.open("rb").close()
        except OSError as error:
            raise TextError(f"text: cannot read {path}: {error.strerror}") from error

    def pieces(self) -> Iterator[str]:
        """The text in pieces. Raises TextError if it is not UTF-8."""
        with self.path.open(encoding="utf-8") as file:
            try:
                yield from _pieces(file)
            except UnicodeDecodeError as error:
                raise TextError(f"text: {self.path} is not UTF-8 text ({error.reason})") from error


class Pipe:
    """A source that can be read only once, such as stdin. Text that was read is kept in a temporary file on disk."""

    def __init__(self, source: TextIO) -> None:
        self.description = "stdin"
        self._source = source
        self._kept = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115

    def pieces(self) -> Iterator[str]:
        """The text in pieces: first those read before, then more of the source."""
        position = 0
        while True:
            self._kept.seek(position)
            piece = _read_piece(self._kept)
            if not piece:
                try:
                    piece = _read_piece(self._source)
                except UnicodeDecodeError as error:
                    raise TextError(f"text: stdin is not UTF-8 text ({error.reason})") from error
                if not piece:
                    return
                self._kept.seek(0, io.SEEK_END)
                self._kept.write(piece)
            position = self._kept.tell()
            yield piece


class Feed:
    """A source that is read once, as it comes, and of which nothing is kept: a pipe that may never end."""

    def __init__(self, source: TextIO) -> None:
        self.description = "stdin"
        self._source = source

    def pieces(self) -> Iterator[str]:
        """What has not been read yet, about a chunk at a time."""
        try:
            while piece := _read_piece(self._source, FEED_CHARACTERS):
                yield piece
        except UnicodeDecodeError as error:
            raise TextError(f"text: stdin is not UTF-8 text ({error.reason})") from error


class HubDataset:
    """The texts of a data set, from the Hugging Face hub or a local folder, streamed row by row.

    Args:
        name: ``NAME`` or ``NAME:CONFIG``.
        split: split of the data set.
        column: column that holds the texts.

    Raises:
        TextError: if the data set, split or column does not exist.
        ImportError: without the package `datasets`.
    """

    def __init__(self, name: str, split: str, column: str) -> None:
        import datasets

        self.description = f"{name}, {split}"
        self._column = column
        path, _, config = name.partition(":")
        try:
            self._rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
            first = next(iter(self._rows), None)
        except Exception as error:  # loaders raise many types, from several packages
            lines = str(error).strip().splitlines()
            message = lines[0] if lines else type(error).__name__
            raise TextError(f"dataset: cannot read {self.description}: {message}") from error
        if first is not None and not isinstance(first.get(column), str):
            raise TextError(f"column: {self.description} has no texts in {column!r}, its columns are {sorted(first)}")

    def pieces(self) -> Iterator[str]:
        """The texts in pieces, with a line break after each text."""
        for row in self._rows:
            if row[self._column] is not None:
                yield from _pieces(io.StringIO(row[self._column] + "\n"))


class TokenStream:
    """Endless token ids of a text, which is started over whenever it ends.

    Args:
        text: the text.
        tokenizer: a transformers tokenizer. Special tokens spelled out in the text are tokenized as ordinary text.
        with_start: False omits the start token.

    Attributes:
        start_token: first id of the stream: the tokenizer's start token; None if it has none, or without `with_start`.
        restarts: how many times the text has been started over; the maximum over all iterations so far.
    """

    def __init__(self, text: Text, tokenizer: PreTrainedTokenizerBase, with_start: bool = True) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.start_token: int | None = tokenizer.bos_token_id if with_start else None
        self.restarts = 0
        keep_no_words(tokenizer)

    def __iter__(self) -> Iterator[int]:
        """Endless ids from the beginning of the stream. Raises TextError if the text is empty."""
        yield from self._start()
        for restarts in count():
            for token in self._read():
                # Counted at the first token that is read again.
                self.restarts = max(self.restarts, restarts)
                yield token

    def once(self) -> Iterator[int]:
        """The ids up to the end of the text. Raises TextError if it is empty."""
        yield from self._start()
        yield from self._read()

    def _start(self) -> list[int]:
        return [] if self.start_token is None else [self.start_token]

    def _read(self) -> Iterator[int]:
        empty = True
        for piece in self.text.pieces():
            for token in text_ids(self.tokenizer, piece):
                empty = False
                yield token
        if empty:
            raise TextError(f"text: {self.text.description} is empty")


def _read_piece(file: TextIO, characters: int = PIECE_CHARACTERS) -> str:
    piece = file.read(characters)
    return piece if piece.endswith("\n") else piece + file.readline(characters)


def _pieces(file: TextIO) -> Iterator[str]:
    while piece := _read_piece(file):
        yield piece


def _is_utf8(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            for _ in _pieces(file):
                pass
    except UnicodeDecodeError:
        return False
    return True
