"""Models under torch.autocast: as close to fp32 as without sinkattn, and streams that enter or leave it."""

import families
import pytest
import torch
from families import random_ids
from measures import S, W, rms_error, seen_by, silence_others

import sinkattn

# Families for each way to stream, and for each combination of dtypes of queries, keys and values.
FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox", "gpt_oss", "deepseek_v3", "lfm2", "falcon", "bloom", "gpt2", "opt"]
# A router picks other experts when rounding reorders two close scores, which is no rounding error. With all experts
# picked, only their weights are rounded.
ALL_EXPERTS = {"deepseek_v3": {"num_experts_per_tok": 4}}
ONE_LAYER = ["llama", "mistral", "qwen3", "gemma2", "gpt_neox", "gpt_oss", "deepseek_v3", "falcon"]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("family", ONE_LAYER)
def test_as_near_to_fp32_as_the_model_as_it_was(family):
    model = families.build(family, **ALL_EXPERTS.get(family, {}))
    ids, tokens = random_ids(2, 60), list(range(3, 60, 4))
    layer = families.FAMILIES[family].lone[0]
    silence_others(model, layer)

    def gathered() -> torch.Tensor:
        rows = [model(ids[:, seen_by(model, layer, token)], use_cache=False).logits[:, -1] for token in tokens]
        return torch.stack(rows, dim=1)

    want = gathered()
    with bf16():
        own = rms_error(gathered().float(), want)
        sinkattn.enable(model, S, W)
        got = model(ids).logits[:, tokens]
        cache = sinkattn.SinkCache(model)
        cut = torch.cat([model(part, cache=cache).logits for part in ids.split(7, dim=1)], dim=1)[:, tokens]
    assert own > 1e-3
    assert rms_error(got.float(), want) < 1.5 * own
    assert rms_error(cut.float(), want) < 1.5 * own


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["enters", "leaves"])
def test_a_stream_goes_on_when_it_enters_or_leaves_autocast(family, order):
    model, ids = sinkattn.enable(families.build(family), S, W), random_ids(1, 60)
    want, cache, logits = model(ids).logits, sinkattn.SinkCache(model), []
    for i, part in enumerate(ids.split(12, dim=1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=(i < 2) == (order == "leaves")):
            logits.append(model(part, cache=cache).logits.float())
    assert rms_error(torch.cat(logits, dim=1), want) < 0.1
    with bf16():
        text = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert text.shape == (1, 90)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_enabling_under_autocast_is_enabling_without(family):
    model, ids = families.build(family), random_ids(1, 40)
    with bf16():
        sinkattn.enable(model, S, W)
    assert torch.equal(model(ids).logits, sinkattn.enable(families.build(family), S, W)(ids).logits)
