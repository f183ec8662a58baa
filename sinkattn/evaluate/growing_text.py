"""Texts that grow while they are read, and may never end: a file that is written to, a pipe."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sinkattn.evaluate.text import TextError

# Read at once, so that memory is bounded.
PIECE_BYTES = 2048
# Between two looks at a file that has nothing new.
POLL_SECONDS = 0.1


class OpenPipe:
    """What comes through a pipe, as soon as it comes. Nothing is read ahead: a writer that is faster has to wait.

    What is not UTF-8 becomes U+FFFD, as in `GrowingFile`: a stream that is followed for days should not end with it.

    Attributes:
        behind: None: how much is waiting is not known.
    """

    behind: int | None = None

    def __init__(self, file: BinaryIO, description: str) -> None:
        self._file = file
        self.description = description

    def pieces(self) -> Iterator[str]:
        """The text, a piece whenever something has come, until the other end is closed."""
        decoder = _decoder()
        while data := os.read(self._file.fileno(), PIECE_BYTES):
            if text := decoder.decode(data):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class GrowingFile:
    """A file that is followed as by ``tail -F``, from its beginning.

    It may not exist yet. It may become shorter, and is then read again from its beginning (not if it is longer again at
    the next look, a tenth of a second later). It may be replaced by another file of its name: the old one is read until
    there is something in the new one. Either begins on a new line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = path.name
        self._file: BinaryIO | None = None

    @property
    def behind(self) -> int | None:
        """Bytes of the file that have not been read; None if there is no file."""
        if self._file is None or self._file.closed:
            return None
        return max(0, os.fstat(self._file.fileno()).st_size - self._file.tell())

    def pieces(self) -> Iterator[str]:
        """The text, a piece whenever something has come, without end."""
        while True:
            try:
                self._file = self.path.open("rb", buffering=0)
            except OSError:
                time.sleep(POLL_SECONDS)
                continue
            with self._file:
                yield from self._contents(self._file)

    def _contents(self, file: BinaryIO) -> Iterator[str]:
        """The text of a file until it is cut or replaced."""
        decoder, last = _decoder(), "\n"
        while True:
            is_replaced = self._is_replaced(file)  # before reading: what was written until then is still read
            if data := file.read(PIECE_BYTES):
                if text := decoder.decode(data):
                    last = text[-1]
                    yield text
            elif is_replaced or os.fstat(file.fileno()).st_size < file.tell():
                break
            else:
                time.sleep(POLL_SECONDS)
        rest = decoder.decode(b"", final=True)
        if rest or last != "\n":
            yield rest + "\n"

    def _is_replaced(self, file: BinaryIO) -> bool:
        try:
            new = self.path.stat()
        except OSError:
            return False
        return new.st_size > 0 and not os.path.samestat(new, os.fstat(file.fileno()))


def open_growing(path: Path) -> OpenPipe | GrowingFile:
    """Follow a file, which may not exist yet, or read a pipe that has a name. Raises TextError if it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            return OpenPipe(path.open("rb", buffering=0), path.name)
        if path.exists():
            path.open("rb").close()
    except OSError as error:
        raise TextError(f"follow: cannot read {path}: {error.strerror}") from error
    return GrowingFile(path)


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")
