"""Throughput of many streams: a `StreamPool` beside the other ways to run them.

    python -m pytest bench/bench_pool.py --benchmark-json=pool.json

A Llama of 116 million random parameters. Every stream gets a prompt of 64 to 256 tokens, and generates greedily:

* ``pool``: a `StreamPool` with a row for each stream, 4 sinks and a window of 1020.
* ``one by one``: a call of `generate` for each stream, of the same enabled model.
* ``padded``: one call of `generate` of the unpatched model for all, with prompts padded to the longest.
* ``continuous``: transformers' continuous batching (`generate_batch`) of the unpatched model, whose manager stays.

All have the same prompts and generate the same number of tokens, which are compared first. No stream is longer than
the window, for the last two would have to keep it all.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from bench_generate import CONFIG, random_ids
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import sinkattn

NUM_SINKS, WINDOW = 4, 1020
NEW_TOKENS, ROUNDS = 32, 3
PADDING = 0
POOL, ONE_BY_ONE, PADDED, CONTINUOUS = "pool", "one by one", "padded", "continuous"
OTHERS = (ONE_BY_ONE, PADDED, CONTINUOUS)
# Rounding may turn a near tie of two tokens, from which on the texts of a stream differ.
MIN_EQUAL = 0.75


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        plain = LlamaForCausalLM(LlamaConfig(**CONFIG, eos_token_id=None, pad_token_id=PADDING)).eval()
        return sinkattn.enable(copy.deepcopy(plain), NUM_SINKS, WINDOW), plain


def in_pool(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    with sinkattn.StreamPool(model, len(prompts)) as pool:
        streams = [pool.open() for _ in prompts]
        for stream, prompt in zip(streams, prompts, strict=True):
            stream.feed(prompt)
        running, tokens = [stream.generate(NEW_TOKENS) for stream in streams], [[] for _ in streams]
        for _ in range(NEW_TOKENS):
            for own, stream in zip(tokens, running, strict=True):
                own.append(next(stream))
    return tokens


def one_by_one(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def padded(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PADDING] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[:, width:].tolist()


def continuous(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=PADDING)
    outputs = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=1024),
        persistent_manager=True,
        warmup=False,
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


@pytest.mark.parametrize("count", [8, 32])
def test_streams(bench, models, count: int) -> None:
    enabled, plain = models
    torch.manual_seed(count)
    prompts = [random_ids(int(torch.randint(64, 257, ())))[0].tolist() for _ in range(count)]
    with torch.inference_mode(False), torch.no_grad():
        ways: dict[str, Callable[[], list[list[int]]]] = {
            POOL: lambda: in_pool(enabled, prompts),
            ONE_BY_ONE: lambda: one_by_one(enabled, prompts),
            PADDED: lambda: padded(plain, prompts),
            CONTINUOUS: lambda: continuous(plain, prompts),
        }
        want = ways[ONE_BY_ONE]()
        for name, way in ways.items():
            got = way()
            assert [len(tokens) for tokens in got] == [NEW_TOKENS] * count
            assert sum(x == y for x, y in zip(got, want, strict=True)) >= MIN_EQUAL * count, name
        timings = bench.time_interleaved({name: lambda way=way: way for name, way in ways.items()}, rounds=ROUNDS)
    figures = {
        **{f"{name} tokens/s": count * NEW_TOKENS / timings.ms(name) * 1e3 for name in ways},
        **{f"{name} / {POOL}": timings.ratio(name, POOL) for name in OTHERS},
    }
    bench.add_row("Many streams, a prompt and 32 tokens each", f"{count} streams", {**timings.figures(), **figures})
    best = min(figures[f"{name} / {POOL}"] for name in OTHERS)
    bench.add_target("time of the best other way / pool at least 1.00", f"{count} streams", best, best >= 1)
