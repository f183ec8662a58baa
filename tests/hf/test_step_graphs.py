"""Decode steps replayed from graphs give what plain steps give, bit for bit, whatever changes; here on a stand-in."""

import copy
import gc
import logging
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import build
from hf_models import random_ids
from recorded_graph import NEW, REPLAYED, WARM, WARM_AGAIN, RecordedGraph, S, W, enabled_pair, greedy, logits, warm
from transformers import AutoModel

import sinkattn
from sinkattn.hf import UnsupportedModelError, decode_steps, stream_tokens
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.swap.captured_step import CudaGraph

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_oss", "bloom", "gptj", "deepseek_v3", "llama4_text"]


@pytest.mark.parametrize(
    ("family", "cache_dtype"), [*((family, None) for family in FAMILIES), ("llama", "int8"), ("gpt_oss", "fp8")]
)
def test_tokens_are_those_of_plain_steps(family, cache_dtype):
    """Past the point where the window is full, and from one graph."""
    plain, model, graphs = enabled_pair(family, cache_dtype=cache_dtype)
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


def test_a_model_that_reads_values_is_never_captured():
    _, model, graphs = enabled_pair()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) if x.abs().sum().item() > 0 else x
    cache = warm(model)
    expected = "not captured: aten._local_scalar_dense.default waits for the device"
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
    prompts = random_ids(4, 6).split(1)
    with ThreadPoolExecutor(len(prompts)) as threads:
        got = list(threads.map(partial(greedy, model), prompts))
    assert all(torch.equal(x, greedy(plain, prompt)) for x, prompt in zip(got, prompts, strict=True))
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
    get_patch(model)._step_graphs._steps[cache][0].captured.graph.calls.clear()  # a CUDA graph holds no tensors
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
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


@pytest.mark.parametrize("ends", [True, False], ids=["valid", "invalid"])
def test_a_capture_that_fails_is_cleaned_up_once(ends, monkeypatch):
    """By the graph, if the capture was ended in order; else by hand, as PyTorch then leaves the allocator as it is."""
    done = []

    class Graph:
        def capture_begin(self, *, pool, **options):
            done.append(f"begin in {pool}")

        def capture_end(self):
            if not ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            done.append("end")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "stream": lambda given: nullcontext(),
        "current_stream": lambda: stream,
        "current_device": lambda: 0,
        "graph_pool_handle": iter("ab").__next__,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda device, pool, name=name: done.append(f"{name} {pool}"), raising=False
        )
    for beside, pool in ((CudaGraph(), "a"), (None, "b")):
        with pytest.raises(ZeroDivisionError):
            CudaGraph(beside).capture(lambda: 1 / 0)
        ended = ["end"] if ends else [f"_cuda_endAllocateToPool {pool}", f"_cuda_releasePool {pool}"]
        assert done == [f"begin in {pool}", *ended]
        done.clear()
    assert CudaGraph._lock.acquire(blocking=False)
    CudaGraph._lock.release()
