"""The speed of a model on this machine, to estimate how long a measurement takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkattn.hf.model_config import trained_length

MAX_TOKENS = 1024
# Forwards of a fast model are repeated for so long, and the fastest counts.
REPEAT_SECONDS = 0.5
MAX_REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Seconds of a forward; those of its tokens are proportional to their number."""

    step: float
    """Seconds of a forward of one token."""
    token: float
    """Seconds of each further token in a forward of up to `measured` tokens."""
    measured: int = MAX_TOKENS

    def forward(self, tokens: int) -> float:
        """Seconds of a forward without cache; an upper bound beyond `measured` tokens, where attention takes over."""
        return self.step + tokens * self.token * max(1.0, tokens / self.measured)


@torch.inference_mode()
def measure_speed(model: PreTrainedModel) -> Speed:
    """Time forwards of one token, and of 1,024 or as many as the model was trained for."""
    longest = min(MAX_TOKENS, trained_length(model) or MAX_TOKENS)
    step = _seconds(model, 1)
    return Speed(step, max(0.0, _seconds(model, longest) - step) / longest, longest)


def _seconds(model: PreTrainedModel, tokens: int) -> float:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    times: list[float] = []
    while not times or (len(times) < MAX_REPEATS and sum(times) < REPEAT_SECONDS):
        began = time.perf_counter()
        model(input_ids=ids, use_cache=False).logits[0, -1].argmax().item()
        times.append(time.perf_counter() - began)
    return min(times)
