"""`enable(model, compile=True)`: the compiled decode step gives what the plain one gives, whatever changes."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch._inductor.config
from families import build
from hf_models import SIZES, random_ids
from torch._dynamo.utils import counters

import sinkattn
from sinkattn.hf import UnsupportedModelError, stream_tokens
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.pool import row_cache
from sinkattn.hf.quantize import quantize_weights
from sinkattn.hf.swap import linear_layers
from sinkattn.hf.swap.ring_patch import RingPatch

S, W, NEW = 2, 14, 30

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]


def enabled_pair(family: str, **overrides):
    """The same model, plain and with a compiled decode step."""
    return [sinkattn.enable(build(family, **overrides), S, W, compile=compiled) for compiled in (False, True)]


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt_oss", "bloom", "gptj", "qwen3_next", "falcon_h1", "deepseek_v3", "jetmoe"]
)
def test_tokens_are_those_of_the_plain_step(family):
    """Past the point where the window is full, in one graph."""
    plain, model = enabled_pair(family)
    ids = random_ids(1, 5)
    logits = [
        torch.cat([each(part, cache=cache).logits for part in random_ids(1, 40).split([3] + [1] * 37, dim=1)], dim=1)
        for each in (plain, model)
        for cache in [sinkattn.SinkCache(each)]
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(model, ids), greedy(plain, ids))
    assert num_graphs() == 1


def test_every_caller_shares_one_graph():
    plain, model = enabled_pair("llama")
    ids = random_ids(3, 5)
    want = greedy(plain, ids[:1])[0, 5:].tolist()
    assert greedy(model, ids[:1])[0, 5:].tolist() == want
    assert list(stream_tokens(model, ids[0], max_new_tokens=NEW, temperature=0)) == want
    cache = sinkattn.SinkCache(model)
    with torch.inference_mode():
        model(ids[:1], cache=cache)
        fork = copy.deepcopy(cache)
        first = model(input_ids=ids[1:2, :1], cache=cache).logits
    with torch.no_grad():
        strided = ids[1:2, ::2][:, :1]
        mask = torch.ones(1, 6)
        again = model(input_ids=strided, attention_mask=mask, cache=fork, use_cache=True, return_dict=True).logits
    assert torch.equal(first, again)
    assert num_graphs() == 1
    assert torch.equal(greedy(model, ids), greedy(plain, ids))
    assert num_graphs() == 2  # three streams


def test_a_stream_with_sinks_of_its_own_has_a_graph_of_its_own():
    plain, model = enabled_pair("llama")
    for num_sinks in (S, 5, S):
        want, got = (
            each.generate(random_ids(1, 5), cache=sinkattn.SinkCache(each, num_sinks=num_sinks), max_new_tokens=NEW)
            for each in (plain, model)
        )
        assert torch.equal(got, want)
    assert num_graphs() == 2


def test_steps_of_a_pool_are_compiled():
    """For one and for two streams, of other lengths, sinks and messages; three run plainly."""
    plain, model = enabled_pair("llama")
    tokens = []
    for each in (plain, model):
        pool = sinkattn.StreamPool(each, 3, max_prefix=5)
        streams = [pool.open(random_ids(1, length)[0], evict=evict) for length, evict in ((5, "message"), (1, "token"))]
        streams[0].feed(random_ids(1, 20)[0])
        tokens.append(list(streams[0].generate(20)))
        running = [stream.generate() for stream in (*streams, streams[0].fork())]
        for count in (2, 3):
            tokens[-1] += [next(stream) for _ in range(10) for stream in running[:count]]
    assert tokens[1] == tokens[0]
    assert num_graphs() == 3  # one is of `enable`, with a cache


class RepeatedFunction:
    """In place of a CUDA graph of a compiled step, whose operators nothing records here: runs the step itself again."""

    def __init__(self, beside=None):
        self.num_replays = 0

    def capture(self, function):
        self.function, self.output = function, function()
        return self.output

    def replay(self):
        self.num_replays += 1
        running = inspect.getclosurevars(self.function).nonlocals["fixed"]
        running.num_layers_run, running.tables = 0, {}
        for name, x in self.function().items():
            if isinstance(x, torch.Tensor):
                self.output[name].copy_(x)


def test_compiled_steps_of_a_pool_are_captured(monkeypatch):
    """With an idle row: of three streams."""
    monkeypatch.setattr(row_cache, "COMPILED_SIZES", (4,))
    plain, model = enabled_pair("llama")
    get_patch(model).capture_steps(RepeatedFunction)
    tokens = []
    for each in (plain, model):
        pool = sinkattn.StreamPool(each, 4, max_prefix=12)
        running = [pool.open(random_ids(1, length)[0]).generate() for length in (9, 3, 12)]
        tokens.append([next(stream) for _ in range(NEW) for stream in running])
    assert tokens[1] == tokens[0]
    assert num_graphs() == 2  # one is of `enable`
    [steps] = get_patch(model)._step_graphs._steps.values()
    assert steps[4].captured.graph.num_replays > 5


@torch._dynamo.config.patch(recompile_limit=2)
def test_beyond_the_limit_of_graphs_the_plain_step_runs():
    plain, model = enabled_pair("llama")
    ids = random_ids(3, 5)
    assert torch.equal(greedy(model, ids[:2]), greedy(plain, ids[:2]))
    with pytest.warns(RuntimeWarning, match=r"this decode step is not compiled"):
        got = greedy(model, ids)
    assert torch.equal(got, greedy(plain, ids))
    assert torch.equal(greedy(model, ids[:1]), greedy(plain, ids[:1]))
    assert num_graphs() == 2


def test_batches_with_padding_are_those_of_the_plain_step():
    plain, model = enabled_pair("llama")
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    assert torch.equal(greedy(model, ids, attention_mask=mask), greedy(plain, ids, attention_mask=mask))


def step_logits(model, changed=lambda: None) -> torch.Tensor:
    """Logits of a decode step, with a change between it and the prompt."""
    cache = sinkattn.SinkCache(model)
    with torch.no_grad():
        model(random_ids(1, 5), cache=cache)
        changed()
        return model(random_ids(1, 1, seed=1), cache=cache).logits


def test_nothing_is_frozen():
    plain, model = enabled_pair("llama")
    before = step_logits(model)
    torch.testing.assert_close(before, step_logits(plain))
    for each in (plain, model):
        layer = each.model.layers[1]
        layer.mlp.down_proj.weight.data.mul_(2)
        layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.detach() + 0.1)
        layer.register_forward_hook(lambda module, args, output: output * 1.5)
        each.lm_head.weight.data.add_(0.01)
    after = step_logits(model)
    torch.testing.assert_close(after, step_logits(plain))
    assert (after - before).abs().max() > 0.1
    for each in (plain, model):
        each.to(torch.bfloat16)
    torch.testing.assert_close(step_logits(model), step_logits(plain), rtol=0.1, atol=0.1)


def test_a_copy_has_a_step_of_its_own():
    _, model = enabled_pair("llama")
    before = step_logits(model)
    twin = copy.deepcopy(model)
    saved = pickle.loads(pickle.dumps(model))
    twin.model.layers[0].mlp.down_proj.weight.data.zero_()
    twin.lm_head.weight.data.zero_()
    assert not step_logits(twin).any()
    assert torch.equal(step_logits(model), before)
    assert torch.equal(step_logits(saved), before)


def test_disable_restores_every_forward():
    model = build("llama")
    attributes = [sorted(module.__dict__) for module in model.modules()]
    with torch.no_grad():
        want = model(random_ids(1, 9)).logits
    sinkattn.enable(model, S, W, compile=True)
    sinkattn.disable(model)
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    with torch.no_grad():
        assert torch.equal(model(random_ids(1, 9)).logits, want)


def test_threads_keep_their_streams_apart():
    plain, model = enabled_pair("llama")
    prompts = random_ids(4, 6).split(1)
    with ThreadPoolExecutor(len(prompts)) as threads:
        got = list(threads.map(partial(greedy, model), prompts))
    assert all(torch.equal(x, greedy(plain, prompt)) for x, prompt in zip(got, prompts, strict=True))


def layer_with(layer: torch.nn.Linear, weight: torch.Tensor) -> torch.nn.Linear:
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_give_what_they_give_unpatched(bits, compiled):
    quantization = pytest.importorskip("torchao.quantization")
    if bits == 8:
        config, dtype = quantization.Int8WeightOnlyConfig(set_inductor_config=False), torch.float32
    else:
        int4 = pytest.importorskip("torchao.prototype.quantization.int4")
        config, dtype = int4.PrototypeInt4WeightOnlyConfig(32, set_inductor_config=False), torch.bfloat16
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain, model = (build("llama", dtype, **sizes) for _ in range(2))
    for each in (plain, model):
        quantization.quantize_(
            each, config, lambda module, name: isinstance(module, torch.nn.Linear) and "lm" not in name
        )
    product = linear_layers._quantized_product(model.model.layers[0].mlp.up_proj.weight)
    assert product.func is {8: sinkattn.ops.linear, 4: sinkattn.ops.int4_linear}[bits]
    sinkattn.enable(model, S, W, compile=compiled)
    assert "forward" in model.model.layers[0].mlp.up_proj.__dict__
    assert ("forward" in model.lm_head.__dict__) == (bits == 4)  # not quantized, in bfloat16
    ids = random_ids(1, 12)
    with torch.no_grad():
        want = plain(ids).logits
        cache = sinkattn.SinkCache(model)
        got = torch.cat([model(part, cache=cache).logits for part in ids.split([5] + [1] * 7, dim=1)], dim=1)
    tolerance = 1e-4 if bits == 8 else 0.05
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    layer = model.model.layers[0].mlp.up_proj
    strided = torch.randn(4, 3, 64, dtype=dtype)[:, -1:]
    with torch.no_grad():
        torch.testing.assert_close(layer(strided), type(layer).forward(layer, strided), rtol=tolerance, atol=tolerance)
        assert layer(strided[:0]).shape == (0, 1, 128)
    other = sinkattn.enable(plain, S, W)
    for each in (model, other):  # adapters of peft do so when they are merged
        quantization.quantize_(layer_with(each.model.layers[0].mlp.up_proj, torch.ones(128, 64, dtype=dtype)), config)
    torch.testing.assert_close(step_logits(model), step_logits(other), rtol=tolerance, atol=tolerance)


def test_a_forward_of_the_users_stays():
    model = build("llama")
    layer = model.model.layers[1].mlp.down_proj
    layer.forward = lambda input: torch.zeros(*input.shape[:-1], layer.out_features)
    plain = copy.deepcopy(model)
    sinkattn.enable(model, S, W, compile=True)
    torch.testing.assert_close(step_logits(model), step_logits(sinkattn.enable(plain, S, W)))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_forward_set_later_is_used(quantize):
    plain, model = build("llama", torch.bfloat16), build("llama", torch.bfloat16)
    for each, compiled in ((plain, False), (model, True)):
        if quantize is not None:
            pytest.importorskip("torchao")
            quantize_weights(each, quantize)
        sinkattn.enable(each, S, W, compile=compiled)
    before = step_logits(model)
    for each in (plain, model):
        layer = each.model.layers[1].mlp.down_proj
        layer.forward = lambda input, rows=layer.out_features: input.sum(-1, keepdim=True).expand(
            *input.shape[:-1], rows
        )
    after = step_logits(model)
    torch.testing.assert_close(after, step_logits(plain), rtol=0.05, atol=0.05)
    assert (after - before).abs().max() > 0.1


def test_a_wrong_step_is_refused(monkeypatch):
    step = RingPatch._run_step

    def wrong_step(self, running, kwargs):
        output = step(self, running, kwargs)
        output.last_hidden_state = output.last_hidden_state + 0.01 * output.last_hidden_state.roll(1, dims=-1)
        return output

    monkeypatch.setattr(RingPatch, "_run_step", wrong_step)
    model = build("llama")
    attributes = [sorted(module.__dict__) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"differs from the original by .* in its compiled decode step"):
        sinkattn.enable(model, S, W, compile=True)
    assert [sorted(module.__dict__) for module in model.modules()] == attributes


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
def test_a_step_that_cannot_be_compiled_is_refused():
    model = build("llama", intermediate_size=SIZES["intermediate_size"] + 8)  # nothing of it is in a cache on disk
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: its decode step could not be compiled: \w+: "):
        sinkattn.enable(model, S, W, compile=True)


def test_models_that_encode_their_window_again_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel: .* cannot be compiled"):
        sinkattn.enable(build("gpt2"), S, W, compile=True)
