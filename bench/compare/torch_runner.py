"""What the peers on PyTorch share: a token in, the likeliest next one out; losses of a text."""

from typing import Any

import torch
import torch.nn.functional as F
from runner import time_steps
from torch import Tensor

CHUNK_TOKENS = 256


class TorchRunner:
    """Base of the peers on PyTorch, see `runner.Runner`.

    Args:
        job: the job.
        model: the model, ready to generate.
        chunk: tokens per forward when a text is scored; 1 where longer calls would see other tokens.
    """

    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, job: dict[str, Any], model: torch.nn.Module, chunk: int = CHUNK_TOKENS) -> None:
        self.model, self.chunk = model, chunk
        self.cache_size = job["cache"]
        self.ids, self.prompt = torch.tensor(job["ids"]), job["prompt"]
        self._token: int | None = None

    def reset(self) -> None:
        """Begin a new stream."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[tokens, vocabulary]`` after each of the tokens ``[tokens]``, the next ones of the stream."""
        raise NotImplementedError

    def prefill(self, ids: Tensor) -> Tensor:
        """Begin a new stream with these tokens; logits ``[vocabulary]`` after the last of them."""
        self.reset()
        return self.forward(ids)[-1]

    def step(self, token: int) -> int:
        """Feed a token of a generated text; the likeliest next one. This is what is timed."""
        return int(self.forward(torch.tensor([token]))[-1].argmax())

    @torch.inference_mode()
    def time(self, tokens: int, seconds: float) -> list[float]:
        """See `runner.Runner.time`; the stream goes on from turn to turn."""
        if self._token is None:
            self._token = int(self.prefill(self.ids[: self.prompt]).argmax())
        ms, self._token = time_steps(self.step, self._token, tokens, seconds)
        return ms

    @torch.inference_mode()
    def score(self, tokens: int) -> tuple[list[float | None], list[int | None]]:
        """See `runner.Runner.score`."""
        targets = self.ids[self.prompt : self.prompt + tokens]
        last = self.prefill(self.ids[: self.prompt])[None]
        losses: list[float] = []
        likeliest: list[int] = []
        for fed in targets.split(self.chunk):
            # Each token is predicted by the logits after the one before it.
            logits = torch.cat((last, self.forward(fed)))
            losses += F.cross_entropy(logits[:-1].float(), fed, reduction="none").tolist()
            likeliest += logits[:-1].argmax(dim=-1).tolist()
            last = logits[-1:]
        return losses, likeliest
