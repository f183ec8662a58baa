"""transformers as it is: a DynamicCache that grows, the same kept at one length, and recomputation of the window."""

from typing import Any

import torch
from runner import serve
from torch import Tensor
from torch_runner import TorchRunner
from transformers import AutoModelForCausalLM, DynamicCache

from sinkattn.hf.versions import forward_cache

# Predictions of recomputation in a text, evenly spread: each takes as long as a prompt.
RECOMPUTATIONS = 50


class Growing(TorchRunner):
    """A DynamicCache, which grows."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        super().__init__(job, AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"]).eval())

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids[None], use_cache=True, **{forward_cache(self.model): self.cache}).logits[0]

    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in (layer.keys, layer.values))


class Kept(Growing):
    """The same, kept at the length of the others' caches: for its time alone, the text that it sees is none."""

    def step(self, token: int) -> int:
        if self.cache.get_seq_length() == self.cache_size:
            self.cache.crop(-1)
        return super().step(token)

    def score(self, tokens: int) -> tuple[list[None], list[None]]:
        return [None] * tokens, [None] * tokens


class Recomputed(Growing):
    """A forward without a cache over the tokens in sight, for every new one."""

    def reset(self) -> None:
        self.recent = torch.empty(0, dtype=torch.int64)

    def forward(self, ids: Tensor) -> Tensor:
        self.recent = torch.cat((self.recent, ids))[-self.cache_size :]
        return self.model(input_ids=self.recent[None], use_cache=False, logits_to_keep=1).logits[0]

    def kv_bytes(self) -> None:
        return None

    @torch.inference_mode()
    def score(self, tokens: int) -> tuple[list[float | None], list[int | None]]:
        losses, likeliest = [None] * tokens, [None] * tokens
        for at in range(0, tokens, max(1, tokens // RECOMPUTATIONS)):
            end = self.prompt + at
            logits = self.prefill(self.ids[max(0, end - self.cache_size) : end]).float()
            losses[at] = float(torch.nn.functional.cross_entropy(logits, self.ids[end]))
            likeliest[at] = int(logits.argmax())
        return losses, likeliest


METHODS = {"growing": Growing, "kept": Kept, "recomputed": Recomputed}

if __name__ == "__main__":
    serve(lambda job: METHODS[job["options"]["method"]](job))
