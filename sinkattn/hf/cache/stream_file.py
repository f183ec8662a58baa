"""Files of saved streams: written as a whole or not at all, and checked before anything in them is used."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import sinkattn
from sinkattn.argument_checks import check_path

FORMAT = "1"
# Keys in the metadata of the file; the value of the first one is the format.
FORMAT_KEY, HEADER, CHECKSUM = "sinkattn_streams", "header", "checksum"


def write_streams(path: str | Path, tensors: dict[str, Tensor], model: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a file of streams. Who reads ``path`` finds the old file or the new one, also if the process is killed.

    Args:
        path: the file; one that exists is replaced.
        tensors: of the streams, rows first, on any device.
        model: what the model must be, JSON.
        state: the rest of the state, JSON, with the number of ``rows``.

    Raises:
        OSError: the file cannot be written; what was there is left as it was.
    """
    check_path("path", path)
    versions = {module.__name__: module.__version__ for module in (sinkattn, transformers, torch)}
    header = json.dumps({"versions": versions, "model": model, "state": state}, separators=(",", ":"))
    with _replaced(Path(path)) as new:
        write_tensors(new, tensors, header)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: str = "") -> None:
    """Write a file of tensors, on any device, with a checksum; raises OSError if it cannot be written."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {FORMAT_KEY: FORMAT, HEADER: header, CHECKSUM: _checksum(header, tensors)}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # also for a disk that is full
        raise OSError(f"cannot write {path.name}: {error}") from error


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A path to write a file to, which then takes the place of ``path``.

    It is in a folder of its own, where safetensors has temporary files too. The next save to ``path`` removes what a
    killed one has left there.
    """
    path = path.resolve()  # the file that a link names, not the link
    folder = path.with_name(f".{path.name}.saving")
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        # One save at a time. Without locks in this file system, one of two at the same time may raise an error.
        with suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            (folder / "mode").touch()
            yield folder / path.name
            # safetensors writes for the owner alone.
            os.chmod(folder / path.name, (path if path.exists() else folder / "mode").stat().st_mode & 0o777)
            with open(folder / path.name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(folder / path.name, path)
            os.fsync(directory)
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(directory)


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    checksum = zlib.crc32(header.encode())
    for name, x in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {x.dtype} {list(x.shape)}".encode(), checksum)
        checksum = zlib.crc32(x.flatten().view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


class SavedStreams:
    """Streams in a file, or a part of their state. Tensors are checked when they are taken, each once.

    Attributes:
        model: what the model must be.
        fields: the state, or of a part that of this part.
        rows: streams in the file, or in this part.
        converts_dtype: whether keys, values and states are converted to the dtype of the cache.
    """

    def __init__(self, model: Any, fields: Any, tensors: dict[str, Tensor], prefix: str = "", rows: int = 0) -> None:
        self.model, self.fields, self.rows = model, fields, rows
        self.converts_dtype = False
        self._tensors, self._prefix = tensors, prefix

    def part(self, name: str, fields: Any = None, rows: int | None = None) -> SavedStreams:
        """The part of this name, with its fields, by default those under this name, and its rows, by default all."""
        fields = self.fields.get(name, {}) if fields is None else fields
        part = SavedStreams(
            self.model, fields, self._tensors, f"{self._prefix}{name}.", self.rows if rows is None else rows
        )
        part.converts_dtype = self.converts_dtype
        return part

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def field(self, name: str, kind: Any) -> Any:
        """A field of this type; raises ValueError if it is another one."""
        value = self.fields.get(name) if isinstance(self.fields, dict) else None
        if not isinstance(value, kind):
            raise ValueError(f"path: {self._prefix}{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
        return value

    def counts(self, name: str) -> list[int]:
        """A field that is a list of numbers from 0 on; raises ValueError if it is not."""
        values = self.field(name, list)
        if not all(isinstance(value, int) and 0 <= value < 2**62 for value in values):
            raise ValueError(f"path: {self._prefix}{name}: expected numbers from 0 on, got {values}")
        return values

    def count(self, name: str) -> int:
        """A field that is a number from 0 on; raises ValueError if it is not."""
        value = self.field(name, int)
        if not 0 <= value < 2**62:
            raise ValueError(f"path: {self._prefix}{name}: expected a number from 0 on, got {value}")
        return value

    def like(self, name: str, x: Tensor) -> Tensor:
        """A tensor with the shape of ``x`` after the rows, its dtype and its device; see `tensor`."""
        return self.tensor(name, tuple(x.shape[1:]), x.dtype, x.device)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor ``[rows, *shape]`` in memory of its own; raises ValueError if the one in the file is another one."""
        name, shape = self._prefix + name, (self.rows, *shape)
        x = self._tensors.pop(name, None)
        if x is None:
            raise ValueError(f"path: {name}: expected {list(shape)}, got none")
        if tuple(x.shape) != shape:
            raise ValueError(f"path: {name}: expected {list(shape)}, got {list(x.shape)}")
        can_convert = self.converts_dtype and dtype.is_floating_point and x.dtype.is_floating_point
        if x.dtype != dtype and not can_convert:
            raise ValueError(f"path: {name}: expected {dtype}, got {x.dtype}; accept=('dtype',) would convert it")
        return x.to(device, dtype, copy=True)

    @property
    def num_elements(self) -> int:
        """Elements of all tensors that are left in the file."""
        return sum(x.numel() for x in self._tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are left in the file, unchecked."""
        return {**self._tensors}

    def split(self, name: str) -> dict[str, Tensor]:
        """Take the part of this name out: its tensors, unchecked, by their names in it."""
        prefix = f"{self._prefix}{name}."
        return {key.removeprefix(prefix): self._tensors.pop(key) for key in [*self._tensors] if key.startswith(prefix)}

    def check_all_taken(self) -> None:
        """Raise ValueError if tensors are left that nothing has taken."""
        if self._tensors:
            raise ValueError(f"path: expected no tensor besides those of the model's cache, got {min(self._tensors)}")


def read_streams(path: str | Path) -> SavedStreams:
    """Read a file of streams, whose tensors stay in the file until they are taken.

    Raises:
        OSError: the file cannot be read.
        ValueError: it was not written by `write_streams`, or is damaged.
    """
    text, tensors = read_tensors(path)
    header = json.loads(text)
    saved = SavedStreams(header.get("model"), header.get("state"), tensors)
    saved.rows = saved.count("rows")
    return saved


def read_header(path: str | Path) -> Any:
    """The header of a file of streams, JSON, which no checksum vouches for; raises as `read_streams`."""
    with _opened(path) as (_, metadata):
        return json.loads(metadata.get(HEADER, ""))


def read_tensors(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Header and tensors of a file of `write_tensors`; raises OSError and ValueError as `read_streams`."""
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    text, want = metadata.get(HEADER, ""), metadata.get(CHECKSUM)
    got = _checksum(text, tensors)
    if got != want:
        raise ValueError(f"path: checksum: expected {want}, got {got}; {path} is damaged")
    return text, tensors


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file of `write_tensors`, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if FORMAT_KEY not in metadata:
                raise ValueError(f"path: expected a file of saved streams, got {path}, which has something else")
            if metadata[FORMAT_KEY] != FORMAT:
                raise ValueError(f"path: format: expected {FORMAT}, got {metadata[FORMAT_KEY]}, of another sinkattn")
            yield file, metadata
    except SafetensorError as error:
        raise ValueError(f"path: expected a file of saved streams, got {path}: {error}") from error
