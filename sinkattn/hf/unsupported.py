"""The error for models that `enable` refuses."""

from __future__ import annotations

from sinkattn.hf.versions import untested_version_note


class UnsupportedModelError(ValueError):
    """The model is not supported; the message says why."""

    def __str__(self) -> str:
        """The message, with the tested versions if a newer transformers is installed."""
        return super().__str__() + untested_version_note()
