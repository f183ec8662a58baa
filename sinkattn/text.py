"""Where the text of a stream comes from, and its token ids, made piece by piece so that no text is held in memory."""

from __future__ import annotations

import hashlib
import io
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from sinkattn.user_errors import require

# Characters read at once; a piece ends at the end of a line, or after as many again.
PIECE = 8192

HELD_OUT_ONE_IN = 20


class TextError(ValueError):
    """A text that cannot be streamed; the message says which and why."""


def path_hash(path: str) -> int:
    """Hash of a file's path relative to the standard library, with forward slashes; the same on every machine."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16)


def is_held_out(path: str) -> bool:
    """Whether a file of the standard library (path as for `path_hash`) was kept from the shipped model's training."""
    return path_hash(path) % HELD_OUT_ONE_IN == 0


class Text(Protocol):
    """A text that can be read as often as needed."""

    description: str

    def pieces(self) -> Iterator[str]:
        """The text from its beginning, a few thousand characters at a time."""


class StandardLibrary:
    """Held-out source files of a Python standard library end to end, in the order of their hashes.

    Args:
        root: folder of the library; default: that of the running Python.

    Raises:
        TextError: if no held-out source files are there.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
        paths = (file.relative_to(self.root) for file in self.root.rglob("*.py"))
        # Installed packages and generated build settings differ between machines.
        names = [
            path.as_posix()
            for path in paths
            if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)
            and not path.name.startswith("_sysconfigdata")
        ]
        self.names = sorted(filter(is_held_out, names), key=path_hash)
        self.description = f"standard library of Python {platform.python_version()}, held-out files"
        if not self.names:
            raise TextError("text: this Python comes without the sources of its standard library; give --text FILE")

    def pieces(self) -> Iterator[str]:
        """The sources in pieces; a file that is not UTF-8 is left out, as it was in training."""
        for name in self.names:
            path = self.root / name
            if _is_utf8(path):
                with path.open(encoding="utf-8") as file:
                    yield from _pieces(file)


class TextFile:
    """A UTF-8 text file. Raises TextError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = path.name
        try:
            path.open("rb").close()
        except OSError as error:
            raise TextError(f"text: cannot read {path}: {error.strerror}") from error

    def pieces(self) -> Iterator[str]:
        """The text in pieces; raises TextError where it is not UTF-8."""
        with self.path.open(encoding="utf-8") as file:
            try:
                yield from _pieces(file)
            except UnicodeDecodeError as error:
                raise TextError(f"text: {self.path} is not UTF-8 text ({error.reason})") from error


class Pipe:
    """A text that can be read only once, such as stdin; what has been read is kept in a temporary file on disk."""

    def __init__(self, source: TextIO) -> None:
        self.description = "stdin"
        self._source = source
        self._kept = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115

    def pieces(self) -> Iterator[str]:
        """The text in pieces: first what was read before, then more of the source."""
        place = 0
        while True:
            self._kept.seek(place)
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
            place = self._kept.tell()
            yield piece


class HubDataset:
    """The texts of a data set of the Hugging Face hub, or of a local folder, read as they are needed.

    Args:
        name: ``NAME`` or ``NAME:CONFIG``.
        split: part of the data set.
        column: that holds the texts.

    Raises:
        TextError: if there is no such data set, part or column.
    """

    def __init__(self, name: str, split: str, column: str) -> None:
        datasets = require("datasets", "datasets")
        self.description = f"{name}, {split}"
        self._column = column
        path, _, config = name.partition(":")
        try:
            self._rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
            first = next(iter(self._rows), None)
        except Exception as error:  # any of many, from as many packages
            lines = str(error).strip().splitlines()
            message = lines[0] if lines else type(error).__name__
            raise TextError(f"dataset: cannot read {self.description}: {message}") from error
        if first is not None and not isinstance(first.get(column), str):
            raise TextError(f"column: {self.description} has no texts in {column!r}, its columns are {sorted(first)}")

    def pieces(self) -> Iterator[str]:
        """The texts in pieces, a line break after each."""
        for row in self._rows:
            if row[self._column] is not None:
                yield from _pieces(io.StringIO(row[self._column] + "\n"))


def open_text(name: str | None, stdin: TextIO) -> Text:
    """Text by its name on the command line: a file, ``-`` for stdin, None for the standard library."""
    if name is None:
        return StandardLibrary()
    return Pipe(stdin) if name == "-" else TextFile(Path(name))


class TokenStream:
    """Token ids of a text, over and over; the first is the tokenizer's start token if it has one.

    Args:
        text: the text.
        tokenizer: a transformers tokenizer. A start token spelled out in the text is taken as text.
        with_start: False leaves the start token out.

    Attributes:
        start_token: id that the stream begins with; None without.
        laps: how often the text has been started over, at most, by any iteration so far.
    """

    def __init__(self, text: Text, tokenizer: Any, with_start: bool = True) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.start_token: int | None = tokenizer.bos_token_id if with_start else None
        self.laps = 0
        # The only memory that would grow with the text: a cache of up to 10,000 words. It saves no time here.
        resize = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "_resize_cache", None)
        if resize is not None:
            resize(0)

    def __iter__(self) -> Iterator[int]:
        """Endless ids from the beginning of the stream. Raises TextError if the text is empty."""
        if self.start_token is not None:
            yield self.start_token
        lap = 0
        while True:
            empty = True
            for piece in self.text.pieces():
                ids = self.tokenizer(
                    piece, add_special_tokens=False, split_special_tokens=True, verbose=False
                ).input_ids
                for token in ids:
                    if empty and lap > self.laps:
                        self.laps = lap
                    empty = False
                    yield token
            if empty:
                raise TextError(f"text: {self.text.description} is empty")
            lap += 1


def _read_piece(file: TextIO) -> str:
    piece = file.read(PIECE)
    return piece if piece.endswith("\n") else piece + file.readline(PIECE)


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
