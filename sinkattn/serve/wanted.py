"""`Wanted`: what a request wants of a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.serve.metrics import FirstToken


class Wanted(NamedTuple):
    """What a request wants of a reply."""

    first: FirstToken
    """Of the request."""
    sampling: SamplingParams
    """How tokens are chosen."""
    max_tokens: int
    """The most tokens."""
    stop: Sequence[str]
    """Texts that end it."""
