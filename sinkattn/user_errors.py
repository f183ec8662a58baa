"""Telling a user of the command line, in one line, what to put right."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(Exception):
    """Something the user can put right; the message says what."""


@contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds into a `UserError` with the first line of their message."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has left: nothing to put right
    except kinds as error:
        lines = str(error).strip().splitlines()
        raise UserError(lines[0] if lines else type(error).__name__) from error


def require(name: str, source: str = "'sinkattn[cli]'") -> ModuleType:
    """Import a module that pip installs from ``source``; raises `UserError` saying so if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"this command needs {package}, which is not installed: pip install {source}") from error
