"""Long runs of generate: memory that does not grow with the stream."""

import psutil
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import sinkattn
from sinkattn.hf.load import load

TOKENS = 3_000  # a cache that kept them all would grow by 6 MB


class MemoryWatch(StoppingCriteria):
    """Record resident memory and cache size during generation."""

    def __init__(self, cache, every: int) -> None:
        self.cache, self.every, self.seen = cache, every, []

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] % self.every == 0:
            self.seen.append((psutil.Process().memory_info().rss, self.cache.nbytes))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.slow
def test_memory_is_flat_over_a_long_generation():
    model, tokenizer = load(device="cpu")
    sinkattn.enable(model, num_sinks=4, window=124)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    cache = sinkattn.SinkCache(model)
    watch = MemoryWatch(cache, TOKENS // 10)
    options = {"max_new_tokens": TOKENS, "do_sample": True, "eos_token_id": None, "cache": cache}
    torch.manual_seed(0)
    out = model.generate(ids, stopping_criteria=StoppingCriteriaList([watch]), **options)
    assert out.shape[1] == ids.shape[1] + TOKENS
    assert cache.get_seq_length() == out.shape[1] - 1
    resident, held = zip(*watch.seen[1:], strict=True)
    assert len(set(held)) == 1
    # `generate` concatenates the ids for every token: 8 bytes each, in several copies.
    assert max(resident) - resident[0] < 2**20 + 8 * 8 * TOKENS
