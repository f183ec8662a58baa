"""Errors that the user of the command line can correct, each told in one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(Exception):
    """An error that the user can correct; the message says how."""


@contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these types into a `UserError` with the first line of their message."""
    try:
        yield
    except BrokenPipeError:
        raise  # an OSError, but not an error of the user: `main` handles it
    except kinds as error:
        lines = str(error).strip().splitlines()
        raise UserError(lines[0] if lines else type(error).__name__) from error


def require(name: str, source: str = "'sinkattn[cli]'") -> ModuleType:
    """Import a module; raises `UserError` with ``pip install SOURCE`` if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"this command needs {package}, which is not installed: pip install {source}") from error


def discard_stdout() -> None:
    """Redirect stdout to the null device: after a broken pipe, Python's flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
