"""sinkattn: sinks and a window in a ring."""

from typing import Any

import torch
from runner import serve
from torch import Tensor
from torch_runner import TorchRunner

from sinkattn import SinkCache, enable
from sinkattn.hf.load import load
from sinkattn.hf.versions import forward_cache


class Streamed(TorchRunner):
    packages = ("sinkattn", "torch", "transformers")

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        model, _ = load(job["model"], device="cpu", dtype=job["dtype"], quantize=job["options"]["quantize"])
        enable(model, job["sinks"], job["cache"] - job["sinks"], compile=job["options"]["compile"])
        super().__init__(job, model)

    def reset(self) -> None:
        self.cache = SinkCache(self.model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids[None], **{forward_cache(self.model): self.cache}).logits[0]

    def kv_bytes(self) -> int:
        return self.cache.nbytes


if __name__ == "__main__":
    serve(Streamed)
