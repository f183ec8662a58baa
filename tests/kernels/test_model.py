"""A transformers model enabled with the Triton backend, against the same on the CPU kernel."""

import pytest
import torch
import transformers

import sinkattn

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_model_gives_what_it_gives_on_the_cpu_kernel():
    """Chunks and single tokens, over several wraps; the answer is the same token by token."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(97, (2, 70))
    logits = []
    for device, backend in (("cpu", "cpu"), (DEVICE, "triton")):
        sinkattn.enable(model.to(device), num_sinks=2, window=12, headroom=3, backend=backend)
        cache = sinkattn.SinkCache(model)
        with torch.inference_mode():
            calls = ids.to(device).split([30, *[1] * 14, 4, 1, 20, 1], dim=1)
            outputs = []
            for i, call in enumerate(calls):
                outputs.append(model(input_ids=call, cache=cache).logits.cpu())
                if i == 16:  # taken back, and given again
                    cache.crop(-3)
                    again = model(input_ids=ids[:, 46:49].to(device), cache=cache).logits.cpu()
                    torch.testing.assert_close(again[:, -1:], outputs[-1], atol=1e-5, rtol=0)
            cache.reorder_cache(torch.tensor([1, 0], device=device))
            outputs.append(model(input_ids=ids[:, :1].to(device), cache=cache).logits.cpu())
        logits.append(torch.cat(outputs, dim=1))
        sinkattn.disable(model)
    torch.testing.assert_close(*logits, atol=1e-5 if DEVICE == "cpu" else 1e-4, rtol=0)
    assert torch.equal(logits[0].argmax(dim=-1), logits[1].argmax(dim=-1))
