"""Let transformers read a GGUF file: checked beforehand, parsed once, and without its progress bar."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

# What is replaced here belongs to the process, so one file is read at a time.
_lock = Lock()


@contextmanager
def opened(path: Path) -> Iterator[str]:
    """Check a GGUF file; within the context transformers reads it as the argument ``gguf_file`` that is yielded.

    Raises:
        ValueError: if the file is no complete GGUF file, or lacks what transformers needs to know of the model.
        ImportError: if a package that this needs is not installed.
    """
    reader = _open(path)
    # The bar for the conversion of the tensors cannot be switched off.
    with _lock, _parsed_once(reader), redirect_stderr(io.StringIO()):
        try:
            # By its full path: transformers prefers a file of the same name in the current folder.
            yield str(path.absolute())
        except (LookupError, NotImplementedError, TypeError) as error:
            raise ValueError(f"transformers cannot read its metadata: {type(error).__name__}: {error}") from error


def _open(path: Path) -> Any:
    """A GGUFReader of a file that has all the bytes it announces."""
    for package, is_available in (("gguf", is_gguf_available), ("accelerate", is_accelerate_available)):
        if not is_available():
            raise ImportError(f"a GGUF file needs {package}, which is not installed: pip install 'sinkattn[gguf]'")
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("the file does not begin with GGUF, so it is none")
    try:
        return GGUFReader(path)
    except (LookupError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"the GGUF file is truncated or damaged ({error})") from error


@contextmanager
def _parsed_once(reader: Any) -> Iterator[None]:
    """Give transformers a file that is parsed already.

    It would parse the file three times, and build the table of tensor names once for each module.
    """
    import gguf

    names = {"GGUFReader": lambda path: reader, "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    originals = {name: getattr(gguf, name) for name in names}
    vars(gguf).update(names)
    try:
        yield
    finally:
        vars(gguf).update(originals)
