"""What a learner learns, and how, as text. Needs no transformers, so that a command can parse its arguments first."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

FROZEN = "frozen"
# The fraction of the way back to the first weights after every update, of the variants that decay.
DECAY = 0.01


@dataclass(frozen=True)
class Variant:
    """What a learner learns, and how; written ``lora`` or ``all``, then ``+decay``, ``+reencode``, ``@RATE``."""

    learn: Literal["lora", "all"]
    decay: bool = False
    reencode: bool = False
    rate: float | None = None
    """Learning rate of AdamW; None for the default of `OnlineLearner`."""

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Parse a variant; raises ValueError for any other text."""
        match = re.fullmatch(r"(lora|all)(\+decay)?(\+reencode)?(?:@(.+))?", text)
        if not match:
            raise ValueError(
                f"expected lora or all, then +decay, +reencode, @RATE if wanted, such as lora+decay@0.003, got {text!r}"
            )
        learn: Literal["lora", "all"] = "lora" if match[1] == "lora" else "all"
        return cls(learn, bool(match[2]), bool(match[3]), parse_rate(match[4]) if match[4] else None)

    def __str__(self) -> str:
        parts = [self.learn, *(f"+{name}" for name in ("decay", "reencode") if getattr(self, name))]
        return "".join(parts) + ("" if self.rate is None else f"@{self.rate:g}")


def parse_rate(text: str) -> float:
    """Parse a learning rate; raises ValueError unless it is a number, more than 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"expected a rate, a number more than 0, got {text!r}")
    return number
