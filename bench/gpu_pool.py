"""Many streams on a GPU: the throughput of a `StreamPool`, beside `generate` of the unpatched model on a padded batch.

    make bench-gpu

The model of gpu_model.py, with 4 sinks and a window of 1020. Streams with prompts of 512 to 1020 tokens generate
greedily; what is timed is 16 tokens of each, without the prompts.

* ``pool``, ``pool eager``: a `StreamPool` with a row for each stream; its steps are replayed from graphs, or are not.
* ``padded``: one call of `generate` for all, with prompts padded to the longest, on a DynamicCache that is cropped
  afterwards.
"""

import pytest
import torch
from gpu import Comparison
from gpu_model import NEW_TOKENS, SMALL_WINDOW, TINY_WINDOW, build, enabled_twin, random_ids
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaForCausalLM

import sinkattn
from sinkattn.hf.swap.step_graphs import NUM_COMPARED, STEPS_BEFORE
from sinkattn.hf.versions import GENERATE_CACHE

FIRST_TOKENS = STEPS_BEFORE + NUM_COMPARED + 2  # until steps are replayed
# Rounding turns near ties, of which random weights have many.
MAX_OTHER_TOKENS = 0.25


def pytest_generate_tests(metafunc) -> None:
    metafunc.parametrize("count", [4] if metafunc.config.getoption("rehearse") else [8, 32])


@pytest.fixture(scope="module")
def plain(request) -> LlamaForCausalLM:
    rehearse = request.config.getoption("rehearse")
    return build(torch.device("cpu" if rehearse else "cuda"), rehearse)


class Pool:
    """Streams that have their prompts."""

    def __init__(self, model: LlamaForCausalLM, prompts: list[Tensor]) -> None:
        pool = sinkattn.StreamPool(model, len(prompts))
        streams = [pool.open() for _ in prompts]
        for stream, prompt in zip(streams, prompts, strict=True):
            stream.feed(prompt)
        self.running = [stream.generate() for stream in streams]
        self.first_tokens = self.generate(FIRST_TOKENS)

    def generate(self, tokens: int) -> Tensor:
        return torch.tensor([[next(stream) for stream in self.running] for _ in range(tokens)]).T

    def run(self) -> None:
        self.generate(NEW_TOKENS)


class Padded:
    """A batch that has its prompts, padded at the left."""

    def __init__(self, model: LlamaForCausalLM, prompts: list[Tensor]) -> None:
        self.model, self.cache = model, DynamicCache()
        self.ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        self.mask = pad_sequence([torch.ones_like(x) for x in prompts], batch_first=True, padding_side="left")
        width = self.ids.shape[1]
        self.first_tokens = self.generate(FIRST_TOKENS)[:, width:].cpu()
        self.cache.crop(1 - FIRST_TOKENS)
        self.ids = torch.cat((self.ids, self.first_tokens[:, :1].to(model.device)), dim=1)
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(prompts), 1)), dim=1)

    def generate(self, tokens: int) -> Tensor:
        options = {GENERATE_CACHE: self.cache, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(self.ids, attention_mask=self.mask, **options)

    def run(self) -> None:
        self.generate(NEW_TOKENS)
        self.cache.crop(-NEW_TOKENS)


def test_streams(bench, device, rehearse, plain, count: int) -> None:
    window = TINY_WINDOW if rehearse else SMALL_WINDOW
    lengths = torch.linspace(window // 2, window, count).int().tolist()
    prompts = [*random_ids(plain, sum(lengths))[0].split(lengths)]
    comparison = Comparison(bench, device, f"{count} streams")
    pool = Pool(enabled_twin(plain, window, graphs=True), prompts)
    comparison.add("pool", pool.run, NEW_TOKENS, capture=False)
    for name, make, compared in (
        ("pool eager", lambda: Pool(enabled_twin(plain, window), prompts), FIRST_TOKENS),
        ("padded", lambda: Padded(plain, prompts), 1),
    ):
        method = make()
        differing = (method.first_tokens != pool.first_tokens)[:, :compared].float().mean().item()
        if comparison.check_output(name, differing, MAX_OTHER_TOKENS):
            comparison.add(name, method.run, NEW_TOKENS, capture=False)
    timings = comparison.time_interleaved(rounds=5)
    names = ("pool", "pool eager", "padded")
    ratio = timings.ratio("padded", "pool")
    figures = {
        **{f"{name} tokens/s": count * 1e3 / timings.ms(name) for name in names},
        **{f"{name} / pool": timings.ratio(name, "pool") for name in names[1:]},
    }
    bench.add_row("Whole model, 8 B parameters in bf16, many streams: tokens of all", comparison.shape, figures)
    bench.add_target("many streams: padded / pool at least 1.00", comparison.shape, ratio, ratio >= 1)
    comparison.assert_outputs_match()
