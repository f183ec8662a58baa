"""attention_sinks, on the transformers that it was written for."""

import json
from pathlib import Path
from typing import Any

import torch
from attention_sinks import LlamaForCausalLM
from runner import serve
from torch import Tensor
from torch_runner import TorchRunner
from transformers import LlamaConfig


class AttentionSinks(TorchRunner):
    packages = ("attention_sinks", "torch", "transformers")

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        saved = json.loads((Path(job["model"]) / "config.json").read_text())
        # This transformers has the frequencies of RoPE under an older name.
        config = LlamaConfig(**{**saved, "rope_theta": saved["rope_parameters"]["rope_theta"]})
        model = LlamaForCausalLM.from_pretrained(
            job["model"],
            config=config,
            torch_dtype=getattr(torch, job["dtype"]),
            attention_sink_size=job["sinks"],
            # It evicts after the forward: the new token comes in addition to these.
            attention_sink_window_size=job["cache"] - job["sinks"] - 1,
        )
        # In a call of several tokens each would see all that the cache holds, not only its own window.
        super().__init__(job, model.eval(), chunk=1)

    def reset(self) -> None:
        self.past = None

    def forward(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids[None], past_key_values=self.past, use_cache=True)
        self.past = output.past_key_values
        return output.logits[0]

    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.past for tensor in layer)


if __name__ == "__main__":
    serve(AttentionSinks)
