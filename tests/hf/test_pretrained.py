"""A pretrained model, SmolLM2-135M-Instruct: in common dtypes, with int8 weights, and far behind its cache."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import naive
import pytest
import real_model
import torch
from test_trial import FAULTS, a_window_too_short
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import sinkattn
from sinkattn.hf import UnsupportedModelError, enable

FILE = real_model.place()
if not FILE.is_file():
    pytest.skip(f"the pretrained model is not at {FILE}: make test fetches it", allow_module_level=True)
gguf = pytest.importorskip("gguf")

pytestmark = [pytest.mark.real, pytest.mark.slow]

# bfloat16 alone changes the loss of a token by 0.07 (RMS), differently on every processor: average over many tokens.
S, W, TOKENS = 4, 196, 300
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS, ACTIVATIONS = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"
# Not fp16, in which torchao's sums of int8 products overflow in this model.
INT8 = {
    f"{name}-{dtype}": (config, DTYPES[dtype])
    for name, config in (("weights", WEIGHTS), ("activations", ACTIVATIONS))
    for dtype in ("fp32", "bf16")
}


@pytest.fixture(scope="module")
def read_once():
    """Configuration, weights and tokenizer come from one file, which is parsed once.

    The names of its tensors are listed once as well, not for every module.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def load(read_once):
    original = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()

    def load(dtype: torch.dtype, int8: str | None = None):
        """The model as `from_pretrained` returns it in a dtype: buffers stay in fp32."""
        model = copy.deepcopy(original)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        if int8 is not None:
            quantization = pytest.importorskip("torchao.quantization")
            quantization.quantize_(model, getattr(quantization, int8)())
        return model

    return load


@pytest.fixture(scope="module")
def ids(read_once) -> torch.Tensor:
    """English text: int64 ``[1, TOKENS]``."""
    tokenizer = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[1000:4000]
    return tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]


@torch.no_grad()
def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Loss of each token of a stream that is fed in chunks: ``[tokens - 1]``."""
    cache = sinkattn.SinkCache(model)
    logits = torch.cat([model(part, cache=cache).logits for part in ids.split(30, dim=1)], dim=1)[0, :-1]
    return cross_entropy(logits.float(), ids[0, 1:], reduction="none")


@pytest.fixture(scope="module")
def exact(load, ids) -> torch.Tensor:
    return losses(enable(load(torch.float32), S, W), ids)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_it_streams_in_every_dtype(dtype, load, ids, exact):
    model = load(dtype)
    plain = model(ids[:, : S + W]).logits[0, :-1]
    before = cross_entropy(plain.float(), ids[0, 1 : S + W], reduction="none")
    got = losses(enable(model, S, W), ids)
    assert (got[: S + W - 1] - before).mean().abs() < 0.01
    assert (got - exact).mean().abs() < 0.01


@pytest.mark.parametrize("int8", INT8.values(), ids=INT8)
def test_it_streams_with_int8_weights_and_activations(int8, load, ids, exact):
    config, dtype = int8
    model = enable(load(dtype, config), S, W)
    assert (losses(model, ids) - exact).mean().abs() < 0.1  # the effect of int8


def test_values_beyond_float16_are_its_own(load):
    with pytest.raises(UnsupportedModelError, match=r"in torch\.float16 its own values in layer \d+ are not finite"):
        enable(load(torch.float16, WEIGHTS), S, W)


@pytest.mark.parametrize(
    ("dtype", "fault"),
    # All faults where rounding is largest; `test_trial` has all of them in every dtype.
    [*(("bf16", fault) for fault in FAULTS), *((dtype, "a_window_too_short") for dtype in ("fp32", "fp16"))],
)
def test_one_token_off_is_refused_in_every_dtype(dtype, fault, load, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"patched model differs from the original by .* in the attention"):
        enable(load(DTYPES[dtype]), S, W)


@pytest.mark.parametrize("int8", INT8.values(), ids=INT8)
def test_one_token_off_is_refused_with_int8(int8, load, monkeypatch):
    config, dtype = int8
    a_window_too_short(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"patched model differs from the original by .* in the attention"):
        enable(load(dtype, config), S, W)


def test_tokens_far_behind_the_cache_are_predicted_as_by_gathering(load, ids):
    """To 2e-3 nats, from a plain PyTorch model in fp64; the receptive field of 30 layers has passed 150 tokens by."""
    ids, at = ids[:, :201], torch.arange(150, 200)
    expected = naive.losses(load(torch.float32).double(), ids[0], 2, 3, at)
    got = losses(enable(load(torch.float32), 2, 3), ids)[at]
    assert (got - expected).abs().max() < 2e-3
    longer = losses(enable(load(torch.float32), 2, 4), ids)[at]
    assert (longer - expected).abs().max() > 0.1
