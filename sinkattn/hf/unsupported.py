"""The error for models that cannot be enabled."""

from __future__ import annotations

from sinkattn.hf.versions import untested


class UnsupportedModelError(ValueError):
    """The model does something that sinkattn cannot prove it computes exactly; the message says what."""

    def __str__(self) -> str:
        """The message, and what was tested if a newer transformers is installed."""
        return super().__str__() + untested()
