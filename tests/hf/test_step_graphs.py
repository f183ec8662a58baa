"""Decode steps replayed from graphs give what plain steps give, bit for bit, whatever changes; here on a stand-in."""

import copy
import gc
import logging
import pickle
import threading
import weakref

import pytest
import torch
from families import build
from hf_models import random_ids
from recorded_graph import RecordedGraph
from torch.nn.functional import linear
from transformers import AutoModel

import sinkattn
from sinkattn.hf import UnsupportedModelError, decode_steps, stream_tokens
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.swap.captured_step import CudaGraph
from sinkattn.hf.swap.step_graphs import NUM_COMPARED, STEPS_BEFORE

S, W, NEW = 2, 14, 30
REPLAYED = "replayed from a graph"
WARM, WARM_AGAIN = STEPS_BEFORE + NUM_COMPARED, 2 * STEPS_BEFORE + NUM_COMPARED  # steps until replays begin


class Graphs:
    """Makes graphs, and counts their replays."""

    def __init__(self) -> None:
        self.made = []

    def __call__(self) -> RecordedGraph:
        self.made.append(RecordedGraph())
        return self.made[-1]

    @property
    def num_replays(self) -> int:
        # The first ones of each are compared with the step.
        return sum(max(0, graph.num_replays - NUM_COMPARED) for graph in self.made)


def enabled_pair(family: str = "llama", headroom: int = 0, **overrides):
    """The same model, plain and with captured steps, and the graphs of the latter."""
    plain, model = (sinkattn.enable(build(family, **overrides), S, W, headroom) for _ in range(2))
    graphs = Graphs()
    get_patch(model).capture_steps(graphs)
    return plain, model, graphs


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, **{"do_sample": False, **options})


def warm(model, batch: int = 1) -> sinkattn.SinkCache:
    """A cache whose steps are captured, if they can be."""
    cache = sinkattn.SinkCache(model)
    with torch.no_grad():
        for tokens in (3, *[1] * WARM):
            model(random_ids(batch, tokens, seed=tokens), cache=cache)
    return cache


@torch.no_grad()
def logits(model, cache, steps: int = 1, **options) -> torch.Tensor:
    ids = random_ids(len(cache.seen), steps, seed=1)
    return torch.cat([model(step, cache=cache, **options).logits for step in ids.split(1, dim=1)], dim=1)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "bloom", "gptj", "deepseek_v3", "llama4_text"]
)
def test_tokens_are_those_of_plain_steps(family):
    """Past the point where the window is full, and from one graph."""
    plain, model, graphs = enabled_pair(family)
    ids, cache = random_ids(2, 5), sinkattn.SinkCache(model)
    assert torch.equal(greedy(model, ids, cache=cache), greedy(plain, ids))
    assert decode_steps(model, cache) == REPLAYED
    assert len(graphs.made) == 1
    assert graphs.num_replays == NEW - 1 - WARM
    other = sinkattn.SinkCache(plain)
    greedy(plain, ids, cache=other)
    assert torch.equal(logits(model, cache, 20), logits(plain, other, 20))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": 5},
        {"eos_token_id": [5, 11, 17, 30], "pad_token_id": 0},
    ],
    ids=["sampling", "beams", "sampled beams", "processors", "rows that end"],
)
def test_ways_to_generate(options):
    plain, model, graphs = enabled_pair()
    ids = random_ids(3, 6)
    for each, results in ((plain, want := []), (model, got := [])):
        cache = sinkattn.SinkCache(each)
        torch.manual_seed(0)
        first = greedy(each, ids, cache=cache, **options)
        results += [first, greedy(each, torch.cat((first, first[:, -3:]), dim=1), cache=cache, **options)]
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    assert graphs.num_replays


def test_batches_with_padding():
    plain, model, graphs = enabled_pair()
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    assert torch.equal(greedy(model, ids, attention_mask=mask), greedy(plain, ids, attention_mask=mask))
    assert graphs.num_replays
    results = []
    for each in (plain, model):
        # On a GPU the mask is not read, so there may be padding in every step.
        cache = warm(each, 2)
        rows = [[1, 0], [0, 1], [1, 1], [1, 0]]
        results.append([logits(each, cache, attention_mask=torch.tensor(row)[:, None]) for _ in "ab" for row in rows])
        results[-1].append(logits(each, cache))
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))


def test_turns_rollbacks_forks_and_rows():
    plain, model, graphs = enabled_pair(headroom=4)
    results = []
    for each in (plain, model):
        cache = warm(each, 2)
        parts = [logits(each, cache, 20)]
        cache.crop(-3)
        parts.append(logits(each, cache, 2))
        fork = copy.deepcopy(cache)
        parts += [logits(each, fork, 6), logits(each, cache, 3)]
        with torch.no_grad():
            each(random_ids(2, 9), cache=cache)
        parts.append(logits(each, cache, 3))
        cache.reorder_cache(torch.tensor([1, 0]))
        parts.append(logits(each, cache, 2))
        cache.batch_select_indices(torch.tensor([1]))
        parts.append(logits(each, cache, 6).expand(2, -1, -1))
        cache.reset()
        parts.append(logits(each, cache, 6).expand(2, -1, -1))
        results.append(torch.cat(parts, dim=1))
    assert torch.equal(*results)
    assert len(graphs.made) == 3  # one each for the cache, its fork and the single row


def test_streams_of_tokens():
    plain, model, graphs = enabled_pair()
    options = {"max_new_tokens": NEW, "temperature": 0.7, "seed": 3}
    assert list(stream_tokens(model, [5, 7], **options)) == list(stream_tokens(plain, [5, 7], **options))
    assert graphs.num_replays


def change_values(model):
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)


def change_data(model):
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data * 1.5


def change_parameter(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def change_module(model):
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()


def change_attribute(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def change_forward(model):
    layer = model.model.layers[1].mlp.down_proj
    layer.forward = lambda x: linear(x, layer.weight) * 1.5


def change_hooks(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


def change_dtype(model):
    model.double()


def change_tensor_in_a_list(model):
    model.model.layers[1].mlp.factors[0].data = torch.full((), 2.0)


CHANGES = [
    change_values, change_data, change_parameter, change_module, change_attribute, change_forward, change_hooks,
    change_dtype, change_tensor_in_a_list,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_the_model_take_effect(change):
    plain, model, graphs = enabled_pair()
    for each in (plain, model):
        mlp = each.model.layers[1].mlp
        mlp.factors = [torch.ones(())]
        mlp.forward = lambda x, mlp=mlp: type(mlp).forward(mlp, x) * mlp.factors[0]
    caches = warm(plain), warm(model)
    before = logits(plain, caches[0]), logits(model, caches[1])
    assert torch.equal(*before)
    assert decode_steps(model, caches[1]) == REPLAYED
    for each in (plain, model):
        change(each)
    after = logits(plain, caches[0], WARM_AGAIN + 1), logits(model, caches[1], WARM_AGAIN + 1)
    assert torch.equal(*after)
    assert (after[0][:, 0] - before[0][:, 0]).abs().max() > 1e-2
    description = decode_steps(model, caches[1])
    assert description == ("not captured: there is a hook on layers.1.mlp" if change is change_hooks else REPLAYED)
    assert len(graphs.made) == (1 if change in (change_values, change_hooks) else 2)


def test_adapters_are_switched():
    peft = pytest.importorskip("peft")
    plain, model = (
        peft.get_peft_model(
            build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).eval()
        for _ in range(2)
    )
    other = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    results = []
    for each in (plain, model):
        torch.manual_seed(0)
        each.add_adapter("other", other)
        for name, parameter in each.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter.data, std=0.2)
        sinkattn.enable(each, S, W)
        if each is model:
            get_patch(each).capture_steps(RecordedGraph)
        cache = warm(each.get_base_model())
        parts = [logits(each, cache, 2)]
        each.set_adapter("other")
        parts.append(logits(each, cache, 9))
        with each.disable_adapter():
            parts.append(logits(each, cache, 2))
        each.set_adapter("default")
        parts.append(logits(each, cache, 2))
        each.get_base_model().model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
        parts.append(logits(each, cache, 2))
        results.append(torch.cat(parts, dim=1))
    assert torch.equal(*results)


def test_without_the_comparison_changes_would_be_lost(monkeypatch):
    """The stand-in shows what a CUDA graph would do."""
    plain, model, _ = enabled_pair()
    caches = warm(plain), warm(model)
    monkeypatch.setattr("sinkattn.hf.swap.model_state.ModelState.is_same", lambda self: True)
    monkeypatch.setattr("sinkattn.hf.swap.model_state.ModelState.has_same_tensors", lambda self: True)
    for each in (plain, model):
        change_parameter(each)
    assert not torch.equal(logits(plain, caches[0]), logits(model, caches[1]))


def test_frequent_changes_are_captured_less_and_less():
    _, model, graphs = enabled_pair()
    cache = warm(model)
    for step in range(200):
        model.model.layers[0].note = step
        logits(model, cache)
    assert 3 <= len(graphs.made) <= 8
    logits(model, cache, 200)
    assert decode_steps(model, cache) == REPLAYED


def assert_given_up(graph_class) -> None:
    """Whether a graph that is wrong in some way is refused, and tokens are those of plain steps."""
    plain, model, _ = enabled_pair()
    get_patch(model).capture_steps(graph_class)
    ids, cache = random_ids(3, 5), sinkattn.SinkCache(model)
    with pytest.warns(RuntimeWarning, match="LlamaModel are not replayed from a CUDA graph, as a replay gave other"):
        got = greedy(model, ids, cache=cache)
    assert torch.equal(got, greedy(plain, ids))
    assert decode_steps(model, cache) == "not captured: a replay gives other values than the step itself"


def test_a_replay_that_differs_is_not_used():
    class Wrong(RecordedGraph):
        def replay(self):
            super().replay()
            self.calls[-1][-1][0].mul_(1.01)

    assert_given_up(Wrong)


def test_a_replay_that_does_nothing_is_not_used():
    class Empty(RecordedGraph):
        def replay(self):
            pass

    assert_given_up(Empty)


def test_a_replay_that_writes_no_token_is_not_used():
    class Forgetful(RecordedGraph):
        def replay(self):
            self.calls = [call for call in self.calls if "sink_attention_" not in str(call[0])]
            super().replay()

    assert_given_up(Forgetful)


def test_a_replay_that_is_wrong_in_one_row_is_not_used():
    class WrongInOneRow(RecordedGraph):
        def replay(self):
            super().replay()
            self.calls[-1][-1][0][2].zero_()

    assert_given_up(WrongInOneRow)


def test_a_replay_of_the_captured_inputs_alone_is_not_used():
    class Frozen(RecordedGraph):
        def capture(self, function):
            result = super().capture(function)
            self.copies = [(x, x.clone()) for call in self.calls for x in call[-1]]
            return result

        def replay(self):
            for x, copy_of_x in self.copies:
                x.copy_(copy_of_x)

    plain, model, _ = enabled_pair()
    get_patch(model).capture_steps(Frozen)
    with pytest.warns(RuntimeWarning, match="a replay gave other values"):
        got = greedy(model, random_ids(1, 5))
    assert torch.equal(got, greedy(plain, random_ids(1, 5)))


class Counting(torch.nn.Module):
    """Changes in every call, and gives other results from the twelfth on."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        return self.module(x) * (2 if self.calls > 12 else 1)


def test_modules_that_change_in_every_step_are_not_captured():
    _, model, graphs = enabled_pair()
    model.model.layers[1].mlp = Counting(model.model.layers[1].mlp)
    cache = warm(model)
    assert decode_steps(model, cache) == "not captured: the modules of the model change in every step"
    logits(model, cache, 40)
    assert graphs.num_replays == 0


def test_settings_of_the_configuration_and_of_classes_take_effect(monkeypatch):
    plain, model, _ = enabled_pair()
    caches = warm(plain), warm(model)
    for each in (plain, model):
        each.config.output_hidden_states = each.model.config.output_hidden_states = True
    with torch.no_grad():
        outputs = [each(random_ids(1, 1), cache=cache) for each, cache in zip((plain, model), caches, strict=True)]
    assert all(len(output.hidden_states) == 3 for output in outputs)
    for each in (plain, model):
        each.config.output_hidden_states = each.model.config.output_hidden_states = False
    caches = warm(plain), warm(model)
    assert decode_steps(model, caches[1]) == REPLAYED
    norm = type(model.model.norm)
    monkeypatch.setattr(norm, "forward", lambda self, x, forward=norm.forward: 1.5 * forward(self, x))
    assert torch.equal(logits(plain, caches[0], 3), logits(model, caches[1], 3))


def test_other_products_are_another_graph():
    """Also by the setting with which torch refuses to return the older one."""
    plain, model, graphs = enabled_pair()
    caches = warm(plain), warm(model)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert torch.equal(logits(plain, caches[0], WARM_AGAIN), logits(model, caches[1], WARM_AGAIN))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(graphs.made) == 2


def test_an_error_of_one_capture_leaves_other_graphs():
    _, model, graphs = enabled_pair()
    cache = warm(model)

    def fails(error):
        class Fails(RecordedGraph):
            def capture(self, function):
                raise error

        return Fails

    for error in (torch.OutOfMemoryError("out of memory"), RuntimeError("no graph today")):
        step_graphs = get_patch(model)._step_graphs
        step_graphs._arguments = (*step_graphs._arguments[:3], fails(error))
        other = warm(model, 2)
        assert decode_steps(model, other).endswith(str(error))
        assert decode_steps(model, cache) == REPLAYED
    step_graphs._arguments = (*step_graphs._arguments[:3], graphs)
    assert decode_steps(model, warm(model)).endswith("no graph today")  # for good, as it may be the model's


def test_values_that_are_not_finite_are_no_reason_to_give_up():
    _, model, _ = enabled_pair()
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    weight.data[0, 0] = torch.nan
    cache = warm(model)
    assert decode_steps(model, cache) == "not captured: there are values that are not finite"
    weight.data.copy_(kept)
    cache.reset()
    logits(model, cache, WARM_AGAIN)
    assert decode_steps(model, cache) == REPLAYED


def test_quantized_weights_that_move_are_noticed():
    quantization = pytest.importorskip("torchao.quantization")
    results = []
    for graphs in (False, True):
        model = build("llama", hidden_size=64, intermediate_size=128)
        config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        quantization.quantize_(model.model, config)
        sinkattn.enable(model, S, W)
        if graphs:
            get_patch(model).capture_steps(RecordedGraph)
        cache = warm(model)
        parts = [logits(model, cache, 2)]
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.scale.data = weight.scale * 1.5  # as `module.to` changes what a weight consists of
        parts.append(logits(model, cache, 3))
        results.append(torch.cat(parts, dim=1))
    assert torch.equal(*results)


def test_tensors_that_cannot_be_compared_are_not_captured():
    class State:
        def __init__(self):
            self.code = torch.ones(3)

    _, model, _ = enabled_pair()
    model.model.layers[1].mlp.quant_state = State()
    assert decode_steps(model, warm(model)) == "not captured: there are tensors inside layers.1.mlp.quant_state"


def test_a_model_that_reads_values_is_never_captured():
    _, model, graphs = enabled_pair()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) if x.abs().sum().item() > 0 else x
    cache = warm(model)
    expected = "not captured: RuntimeError: aten._local_scalar_dense.default waits for the device"
    assert decode_steps(model, cache) == expected
    assert not graphs.made


def test_what_waits_for_the_device_runs_as_it_is(monkeypatch):
    plain, model, _ = enabled_pair("jetmoe")  # its routing reads counts on the host
    cache, lines = sinkattn.SinkCache(model), []
    monkeypatch.setattr(logging.getLogger("sinkattn"), "info", lambda text, *args: lines.append(text % args))
    for _ in range(2):
        assert torch.equal(greedy(model, random_ids(1, 5), cache=cache), greedy(plain, random_ids(1, 5)))
        cache.reset()
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert decode_steps(model, cache) == f"not captured: {reason}"
    assert lines == [f"decode steps are not captured in a graph: {reason}"]


@torch.no_grad()
def test_other_outputs_are_not_captured():
    _, model, _ = enabled_pair()
    alone = sinkattn.enable(AutoModel.from_config(build("llama").config).eval(), S, W)
    get_patch(alone).capture_steps(RecordedGraph)
    for each, options, reason in (
        (model, {"output_hidden_states": True}, "the decoder returns hidden_states"),
        (alone, {"return_dict": False}, "the decoder returns a tuple"),
    ):
        cache = sinkattn.SinkCache(each)
        for tokens in (3, *[1] * WARM):
            each(random_ids(1, tokens), cache=cache, **options)
        assert decode_steps(each, cache) == f"not captured: {reason}"
        for _ in range(WARM_AGAIN):  # transformers' own hooks for hidden states stay
            each(random_ids(1, 1), cache=cache)
        assert decode_steps(each, cache) == REPLAYED


def test_hybrids_and_autocast_are_not_captured():
    _, model, _ = enabled_pair("falcon_h1")
    assert decode_steps(model, warm(model)) == "not captured: some layers have a convolutional or recurrent state"
    _, model, _ = enabled_pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_steps(model, warm(model)) == "not captured: autocast keeps converted weights"


def test_autocast_and_global_hooks_end_replays():
    plain, model, graphs = enabled_pair()
    caches, seen = (warm(plain), warm(model)), []
    results = []
    for each, cache in zip((plain, model), caches, strict=True):
        parts = [logits(each, cache)]
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(logits(each, cache))
        parts.append(logits(each, cache, WARM_AGAIN + 1))
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        parts.append(logits(each, cache))
        hook.remove()
        results.append(torch.cat(parts, dim=1))
    assert torch.equal(*results)
    assert len(seen) % 2 == 0
    assert len(seen) > 20
    assert len(graphs.made) == 2


@torch.no_grad()
def test_outputs_stay_after_the_next_step():
    model = sinkattn.enable(AutoModel.from_config(build("llama").config).eval(), S, W)
    get_patch(model).capture_steps(RecordedGraph)
    cache = warm(model)
    assert decode_steps(model, cache) == REPLAYED
    first = model(random_ids(1, 1), cache=cache)
    kept = first.last_hidden_state.clone()
    model(random_ids(1, 1, seed=2), cache=cache)
    assert torch.equal(first.last_hidden_state, kept)
    assert any(x is cache for x in first.values())


def test_inference_mode_comes_and_goes():
    plain, model, graphs = enabled_pair()
    results = []
    for each in (plain, model):
        with torch.inference_mode():
            cache = warm(each)
            parts = [logits(each, cache, 2)]
        parts.append(logits(each, cache, 2))
        with torch.inference_mode():
            results.append(torch.cat([*parts, logits(each, cache, 2)], dim=1))
    assert torch.equal(*results)
    assert len(graphs.made) == 1


def test_an_interrupted_replay_is_no_token(monkeypatch):
    plain, model, _ = enabled_pair()
    caches = warm(plain), warm(model)

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordedGraph, "replay", interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, caches[1])
    assert torch.equal(logits(plain, caches[0], 20), logits(model, caches[1], 20))


def test_threads_have_graphs_of_their_own():
    plain, model, graphs = enabled_pair()
    prompts = random_ids(4, 6)
    want = [greedy(plain, prompt[None]) for prompt in prompts]
    got = [None] * len(prompts)

    def run(index: int) -> None:
        got[index] = greedy(model, prompts[index][None])

    workers = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for each, expected in zip(got, want, strict=True):
        assert torch.equal(each, expected)
    assert len(graphs.made) == len(prompts)


def test_graphs_go_with_their_cache_and_keep_no_weights():
    _, model, graphs = enabled_pair()
    cache = warm(model)
    graph, kept = weakref.ref(graphs.made.pop()), weakref.ref(cache)
    assert graph() is not None
    del cache
    gc.collect()
    assert kept() is None
    assert graph() is None
    cache = warm(model)
    graphs.made.clear()
    get_patch(model)._step_graphs._steps[cache].captured._graph.calls.clear()  # a CUDA graph holds no tensors
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    change_module(model)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(1, 1)
    gc.collect()
    assert weight() is None


def test_copies_have_graphs_of_their_own():
    _, model, _ = enabled_pair()
    cache = warm(model)
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.zero_()
    assert not logits(twin, warm(twin)).any()
    assert logits(model, cache).any()
    get_patch(model).capture_steps(RecordedGraph)
    saved = pickle.loads(pickle.dumps(model))
    assert decode_steps(saved, warm(saved)) == REPLAYED


def test_disable_ends_them():
    _, model, _ = enabled_pair()
    attributes = [sorted(module.__dict__) for module in build("llama").modules()]
    warm(model)
    sinkattn.disable(model)
    assert [sorted(module.__dict__) for module in model.modules()] == attributes


def test_the_option():
    with pytest.raises(ValueError, match=r"graphs: expected True, False or 'auto', got 'yes'"):
        sinkattn.enable(build("llama"), S, W, graphs="yes")
    with pytest.raises(ValueError, match=r"graphs: expected True, False or 'auto', got 1"):
        sinkattn.enable(build("llama"), S, W, graphs=1)
    with pytest.raises(ValueError, match=r"graphs: expected False or 'auto' for a model on cpu"):
        sinkattn.enable(build("llama"), S, W, graphs=True)
    model = sinkattn.enable(build("llama"), S, W)
    assert decode_steps(model, warm(model)) == "launched one by one"
    model = sinkattn.enable(build("gpt2"), S, W)
    assert decode_steps(model, sinkattn.SinkCache(model)).startswith("launched one by one, as their context")
    other = sinkattn.enable(build("llama"), S, W)
    with pytest.raises(ValueError, match="cache: this SinkCache was made for another model"):
        decode_steps(other, sinkattn.SinkCache(model))


def test_absolute_positions_are_refused(monkeypatch):
    monkeypatch.setattr("sinkattn.hf.api._graph_class", lambda device, graphs: CudaGraph)
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel: .* cannot be captured in graphs"):
        sinkattn.enable(build("gpt2"), S, W, graphs=True)
