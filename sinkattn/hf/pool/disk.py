"""`OnDisk`: what a parked stream has in memory, in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.stream_file import read_tensors, write_tensors
from sinkattn.hf.pool.moved import moved, tensors_in, with_tensors


class OnDisk:
    """Contents of a `StreamMemory`, and logits, in a file, which is gone with this object.

    Not written through to the disk, as nobody reads it after this process.

    Args:
        contents: tensors, or a cache.
        logits: those after the last token of the stream; None if they are not known.
        folder: the file gets one of its own in it; None for the system's folder for temporary files.

    Raises:
        OSError: the file cannot be written; nothing is left of it.

    Attributes:
        outline: the contents without the data of their tensors.
    """

    def __init__(self, contents: Any, logits: Tensor | None, folder: Path | None) -> None:
        self.outline, self._has_logits = moved(contents, "meta"), logits is not None
        tensors = [*tensors_in(contents), *([] if logits is None else [logits])]
        try:
            # A folder, as safetensors has temporary files, too.
            own = tempfile.mkdtemp(prefix="sinkattn-", dir=folder)
            remove = weakref.finalize(self, _remove, own, os.getpid())
            self._path = Path(own) / "stream.safetensors"
            try:
                write_tensors(self._path, {str(i): x for i, x in enumerate(tensors)})
            except BaseException:
                remove()
                raise
        except OSError as error:
            raise OSError(f"pool: a stream cannot be parked on disk: {error}") from error

    def read(self) -> tuple[Any, Tensor | None]:
        """Contents and logits, in host memory; raises OSError if the file is not there any more, or damaged."""
        try:
            _, named = read_tensors(self._path)
        except (OSError, ValueError) as error:
            raise OSError(f"stream: cannot come back from disk; reset() begins it anew: {error}") from error
        with torch.inference_mode(False):
            tensors = [named[str(i)].clone() for i in range(len(named))]  # not in the file any more
        logits = tensors.pop() if self._has_logits else None
        return with_tensors(self.outline, tensors), logits


def _remove(folder: str, process: int) -> None:
    """Remove a folder, unless this process is a fork of the one that has made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
