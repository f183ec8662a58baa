"""What `load` takes, what comes out of it, and one clear line for what cannot be loaded."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from families import FULL, SLIDING, build, random_ids
from gguf_files import write_gguf
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from measures import rms_error
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import sinkattn
from sinkattn.hf.load import DEMO_MODEL, advised_sinks, load
from sinkattn.hf.model_config import default_window
from sinkattn.hf.quantize import quantize_weights, weight_bytes

ARCHITECTURES = ("llama", "gemma3")
EPSILON = 2**-20  # exact in float32, which is what a GGUF file has
# What the format does not say of a Gemma 3: all layers but every sixth slide, and queries are scaled by 1/16.
MIXED = {"num_hidden_layers": 6, "layer_types": [SLIDING] * 5 + [FULL], "query_pre_attn_scalar": 256}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A GGUF file of each architecture, and the models they were written from."""
    folder = tmp_path_factory.mktemp("gguf")
    gemma = build("gemma3_text", rms_norm_eps=EPSILON, **MIXED)
    for name, weights in gemma.named_parameters():
        if name.endswith("norm.weight"):
            weights.data = weights.data.bfloat16().float()  # so that 1 more, which the file has, is exact
    models = {"llama": build("llama", rms_norm_eps=EPSILON), "gemma3": gemma}
    for model in models.values():
        model.set_attn_implementation("sdpa")
    return {name: (write_gguf(folder / f"{name}.gguf", model, name), model) for name, model in models.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gguf_file_is_the_model_it_was_written_from(name, files):
    path, original = files[name]
    model, tokenizer = load(path, device="cpu")
    ids = random_ids(1, 12)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert tokenizer.decode(tokenizer("if x: y").input_ids, skip_special_tokens=True) == "if x: y"
    assert getattr(model.config, "layer_types", None) == getattr(original.config, "layer_types", None)
    sinkattn.enable(model, 4, 20)
    sinkattn.enable(original, 4, 20)
    try:
        stream = random_ids(1, 60)
        assert torch.equal(
            model(stream, cache=sinkattn.SinkCache(model)).logits,
            original(stream, cache=sinkattn.SinkCache(original)).logits,
        )
    finally:
        sinkattn.disable(original)


def test_a_model_from_a_gguf_file_is_an_ordinary_one(files, tmp_path, capfd):
    capfd.readouterr()
    model, tokenizer = load(str(files["llama"][0]), device="cpu", dtype=torch.bfloat16)
    assert capfd.readouterr().err == "", "no progress bars"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path, device="cpu")
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])


def test_a_file_in_a_folder_not_the_one_here(files, tmp_path, monkeypatch):
    path, original = files["llama"]
    write_gguf(tmp_path / path.name, build("llama", seed=1), "llama")
    monkeypatch.chdir(tmp_path)
    model, _ = load(f"{path.parent}:{path.name}", device="cpu")
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_a_gguf_file_is_parsed_once(files, monkeypatch):
    gguf = pytest.importorskip("gguf")
    opened = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path):
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    load(files["llama"][0], device="cpu")
    assert len(opened) == 1
    assert gguf.GGUFReader is Reader, "put back"


def broken_files(folder, path):
    """Files and folders that are no model, with the reason that `load` gives."""
    data = path.read_bytes()
    (folder / "text.gguf").write_text("hello")
    yield "text.gguf", "the file does not begin with GGUF, so it is none"
    for name, size in (("header", 20), ("metadata", 600), ("tensors", len(data) - 5000)):
        (folder / f"{name}.gguf").write_bytes(data[:size])
        yield f"{name}.gguf", "the GGUF file is truncated or damaged"
    other = data.replace(b"llama", b"lemma")
    (folder / "other.gguf").write_bytes(other)
    yield "other.gguf", "GGUF model with architecture lemma is not supported yet"
    yield "absent.gguf", "there is no such file"
    yield f"{path.parent}:absent.gguf", f"the folder {path.parent} has no file absent.gguf"
    yield "./absent", "there is no such file or folder"
    (folder / "notes.txt").write_text("hello")
    yield "notes.txt", "expected a folder, a GGUF file (.gguf) or a name on the hub, and this is another file"
    (folder / "empty").mkdir()
    yield "empty", "the folder has no config.json"
    (folder / "only").mkdir()
    shutil.copy(path, folder / "only" / "a.gguf")
    yield "only", "the folder has no config.json; to load its GGUF file, give only:a.gguf"
    (folder / "weightless").mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / file, folder / "weightless")
    yield "weightless", "no file named model.safetensors"
    deeper = shutil.copytree(DEMO_MODEL, folder / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    yield "deeper", "it has no weights for model.layers.2."


def test_what_is_no_model_is_one_clear_line(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, reason in broken_files(tmp_path, files["llama"][0]):
        with pytest.raises(ValueError, match=r"^model: cannot load ") as caught:
            load(name, device="cpu")
        assert reason in str(caught.value), name
        assert str(caught.value).startswith(f"model: cannot load {name}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["some/model", "some/model:a.gguf"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GatedRepoError, "it is gated: accept its terms"),
        (RepositoryNotFoundError, "there is no such folder, and no such model on the hub"),
    ],
)
def test_gated_and_absent_models_of_the_hub(error, reason, name, monkeypatch):
    def refuse(*args, **kwargs):
        raise error("401 Client Error", response=SimpleNamespace(headers={}, request=None, status_code=401))

    for download in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(transformers.utils.hub, download, refuse)
    with pytest.raises(ValueError, match=f"^model: cannot load {name}: {reason}"):
        load(name, device="cpu")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_for_gguf_files_that_is_missing(package, files, monkeypatch):
    monkeypatch.setattr(f"sinkattn.hf.gguf_file.is_{package}_available", lambda: False)
    with pytest.raises(ValueError, match=rf"{package}, which is not installed: pip install 'sinkattn\[gguf\]'"):
        load(files["llama"][0], device="cpu")


def test_torchao_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"needs torchao 0\.18 or later: pip install 'sinkattn\[quantize\]'"):
        load(device="cpu", quantize="int8")


def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match=r"^quantize: expected one of int8, int4, got 'int2'$"):
        load(quantize="int2")
    with pytest.raises(ValueError, match=r"quantize: the kernels for int4 need bfloat16, got float32$"):
        load(device="cpu", quantize="int4", dtype=torch.float32)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    options = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    quantized = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=options)
    with pytest.raises(ValueError, match="quantize: the weights of this model are quantized already"):
        quantize_weights(quantized, "int8")


def test_a_checkpoint_keeps_its_own_quantization(monkeypatch):
    given = {}

    def from_pretrained(name, **options):
        given.update(options)
        raise ValueError("stop")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="stop"):
        load(device="cpu")
    assert "quantization_config" not in given  # not even None, which transformers takes for the answer


def patched_error(model, ids):
    """How far the logits of a model are off once it is enabled, as a fraction of their spread."""
    plain = model(ids).logits
    sinkattn.enable(model, 4, 252)
    return rms_error(model(ids, cache=sinkattn.SinkCache(model)).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize(("quantization", "dtype"), [("int8", "auto"), ("int8", "float32"), ("int4", "auto")])
def test_quantized_weights(quantization, dtype):
    dense, tokenizer = load(device="cpu")
    model, _ = load(device="cpu", quantize=quantization, dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    ids = tokenizer((DEMO_MODEL / "config.json").read_text(), return_tensors="pt").input_ids[:, :200]

    def loss(model):
        return cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).item()

    assert abs(loss(model) - loss(dense)) < {"int8": 0.05, "int4": 0.3}[quantization]
    assert weight_bytes(model) < weight_bytes(dense) * {"int8": 0.55, "int4": 0.45}[quantization]
    # All of the text fits, so the same weights unpatched give the same, but for the rounding that dense ones have too.
    assert patched_error(model, ids) < 2 * patched_error(dense.to(model.dtype), ids)


def test_a_tied_head_is_quantized_and_the_embedding_is_not():
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.detach().clone()
    quantize_weights(model, "int8")
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    half_step = embedding.abs().amax(dim=1, keepdim=True) / 254
    error = (model.lm_head.weight.dequantize() - embedding).abs()
    assert (error <= half_step * 1.02).all()  # a scale is rounded up a little, to 127.5 steps
    assert error.max() > 0
    assert not model.config.tie_word_embeddings


def test_advice():
    assert advised_sinks(build("gpt_oss"))[0] == 0
    assert advised_sinks(build("gemma3_text")) == (
        4,
        "as most pretrained models need; `sinkattn eval sinks` measures it",
    )
    sliding, why = advised_sinks(build("mistral", sliding_window=12))
    assert sliding == 4
    assert "all its layers have a sliding window" in why
    assert default_window(build("mistral", sliding_window=12), 4) == 8
