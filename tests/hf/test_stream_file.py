"""Saved streams: they go on bit for bit, in every family; files are whole, and refused where they do not fit."""

import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from continued import FedTokenCounter, left_padded
from hf_models import build, enabled, interrupted, random_ids, tensors_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import sinkattn
from sinkattn.hf.cache.state import SAVED_COUNTS, SAVED_FLAGS, SharedCacheState
from sinkattn.hf.cache.stream_file import HEADER, read_streams, write_streams
from sinkattn.hf.fingerprint import fingerprint
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.versions import GENERATE_CACHE, forward_cache

S, W, R = 4, 20, 3
# Rings; sliding windows and tied weights; states within an attention layer, and between them; re-encoding.
FAMILIES = ["llama", "gemma2", "falcon_h1", "qwen3_next", "lfm2", "gpt2"]
WITH_STATES = ("falcon_h1", "qwen3_next", "lfm2")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stream.safetensors"


@torch.no_grad()
def feed(model, cache, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask, **{forward_cache(model): cache}).logits


def fed(model, tokens: int = 60, rows: int = 1):
    """A cache that has seen tokens, in two calls."""
    cache = sinkattn.SinkCache(model)
    for ids in random_ids(rows, tokens).split(max(1, tokens // 2), dim=1):
        feed(model, cache, ids)
    return cache


def assert_same(a: sinkattn.SinkCache, b: sinkattn.SinkCache) -> None:
    assert a.state_fields() == b.state_fields()
    mine, others = a.state_tensors(), b.state_tensors()
    assert mine.keys() == others.keys()
    for name, x in mine.items():
        assert torch.equal(x, others[name]), name
        assert x.dtype == others[name].dtype, name


def reload(model, cache, path, **options) -> sinkattn.SinkCache:
    cache.save(path)
    loaded = sinkattn.load_stream(model, path, **options)
    assert_same(cache, loaded)
    return loaded


@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize("family", FAMILIES)
def test_streams_go_on_bit_for_bit(family, tokens, path):
    """Ragged rows where the family has them, before and after eviction."""
    model, cache = enabled(family, S, W, R), sinkattn.SinkCache(enabled(family, S, W, R))
    if family not in WITH_STATES:
        ids, mask = left_padded([*random_ids(1, tokens), *random_ids(1, tokens + 7, seed=1)])
        feed(model, cache, ids, mask)
    for ids in random_ids(2, tokens, seed=2).split(40, dim=1):
        feed(model, cache, ids)
    loaded, new = reload(model, cache, path), random_ids(2, 64, seed=3)
    want = [feed(model, cache, ids) for ids in new.split(1, dim=1)]
    got = [feed(model, loaded, ids) for ids in new.split(1, dim=1)]
    assert all(map(torch.equal, got, want))
    assert_same(cache, loaded)
    other = feed(model, fed(model, 90 + tokens, rows=2), new[:, :1])
    assert not torch.equal(other, want[0])  # the past does matter


def same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are equal, memory that nothing was written to included."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_share_nothing(family, path):
    model = enabled(family, S, W, R)
    cache = fed(model, rows=2)
    own = tensors_of(cache)
    before, fields = [x.clone() for x in own], copy.deepcopy(cache.state_fields())
    assert sum(x.nbytes for x in own) >= cache.nbytes
    for fork in (copy.deepcopy(cache), reload(model, cache, path)):
        assert sum(x.nbytes for x in tensors_of(fork)) >= cache.nbytes
        feed(model, fork, random_ids(2, 40, seed=5))
        for x in tensors_of(fork):
            x.fill_(1)
        assert cache.state_fields() == fields
        assert all(same_bytes(x, y) for x, y in zip(own, before, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_loaded_cache_is_an_ordinary_one(family, path):
    model = enabled(family, S, W, R)
    cache = fed(model, 60, rows=3)
    cache.crop(-2)
    loaded = reload(model, cache, path)
    for change in (
        lambda x: x.crop(-1),
        lambda x: x.reorder_cache(torch.tensor([2, 0, 0])),
        lambda x: x.batch_select_indices(torch.tensor([1, 2])),
        lambda x: x.batch_repeat_interleave(2),
        lambda x: feed(model, x, random_ids(4, 30, seed=6)),
        lambda x: x.reset(),
    ):
        change(cache)
        change(loaded)
        assert_same(cache, loaded)
    twin = sinkattn.enable(build(family), S, W, R)
    with pytest.raises(ValueError, match=r"made for another model"):
        feed(twin, loaded, random_ids(4, 1))
    assert sinkattn.load_stream(twin, path).patch_id == require_patch(twin).id


def test_a_rollback_before_the_save_counts(path):
    model = enabled("llama", S, W, R)
    cache = fed(model)
    cache.crop(-2)
    loaded = reload(model, cache, path)
    with pytest.raises(RuntimeError, match=r"can roll back 1 tokens more"):
        loaded.crop(-2)
    loaded.crop(-1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2"])
def test_generate_goes_on_from_all_ids(family, path):
    """It matches the ids of a conversation with those that the file has recorded, and feeds only what is new."""
    model = enabled(family, S, W, R)
    options = {"do_sample": False, "max_new_tokens": 6}
    cache = sinkattn.SinkCache(model)
    ids = model.generate(random_ids(1, 100), **options, **{GENERATE_CACHE: cache})
    loaded = reload(model, cache, path)
    counter = FedTokenCounter(model)
    try:
        ids = torch.cat((ids, random_ids(1, 5, seed=8)), dim=1)
        want = model.generate(ids, **options, **{GENERATE_CACHE: cache})
        num_fed = counter.take()
        assert torch.equal(model.generate(ids, **options, **{GENERATE_CACHE: loaded}), want)
        assert counter.take() == num_fed < 20
    finally:
        counter.hook.remove()
    assert_same(cache, loaded)


def test_rows_that_have_ended(path):
    """The padding that `generate` returned last, and has not fed."""
    model, cache = enabled("llama", S, W, R), sinkattn.SinkCache(enabled("llama", S, W, R))
    prompt = random_ids(2, 30)
    first = model.generate(prompt, do_sample=False, max_new_tokens=1)[0, -1].item()
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": first, "pad_token_id": 0}
    ids = model.generate(prompt, **options, **{GENERATE_CACHE: cache})
    assert cache.state.unfed_padding is not None
    assert cache.has_padding
    loaded = reload(model, cache, path)
    assert torch.equal(loaded.state.unfed_padding[0], torch.tensor([True, False]))
    new = torch.cat((ids[:, -1:], random_ids(2, 3, seed=4)), dim=1)
    options["max_new_tokens"] = 2
    want, got = (model.generate(new, **options, **{GENERATE_CACHE: each}) for each in (cache, loaded))
    assert torch.equal(got, want)
    assert_same(cache, loaded)


def test_unknown_ids_and_flags(path):
    model, cache = enabled("llama", S, W, R), sinkattn.SinkCache(enabled("llama", S, W, R), max_batch_size=2)
    embeddings = model.get_input_embeddings()(random_ids(1, 40))
    mask = torch.ones(1, 40, dtype=torch.int64)
    mask[0, 3:9] = 0
    with torch.no_grad():
        model(inputs_embeds=embeddings, attention_mask=mask, **{forward_cache(model): cache})
    cache.state.unusable_reason, cache.state.only_ids = "out of order", False
    loaded = reload(model, cache, path)
    assert torch.equal(loaded.state.history.column_ids, cache.state.history.column_ids)
    with pytest.raises(RuntimeError, match=r"cache: out of order"):
        feed(model, loaded, random_ids(1, 1))
    loaded.reset()
    with pytest.raises(ValueError, match=r"max_batch_size is 2"):
        feed(model, loaded, random_ids(3, 1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_h1"])
def test_a_cache_without_tokens(family, path):
    model = enabled(family, S, W, R)
    used = fed(model)
    used.reset()
    for cache in (sinkattn.SinkCache(model), used):
        loaded = reload(model, cache, path)
        assert loaded.nbytes == loaded.tokens_seen == 0
        ids = random_ids(3, 30)
        assert torch.equal(feed(model, loaded, ids), feed(model, sinkattn.SinkCache(model), ids))


def test_whatever_else_the_state_holds_is_empty_between_two_calls():
    saved = {"layout", "history", "counter_ring", *SAVED_COUNTS, *SAVED_FLAGS, "unusable_reason"}
    saved |= {"last_prompt_span", "unfed_padding"}
    model, cache = enabled("llama", S, W, R), sinkattn.SinkCache(enabled("llama", S, W, R))
    model.generate(random_ids(2, 30), do_sample=False, max_new_tokens=3, **{GENERATE_CACHE: cache})
    for field in dataclasses.fields(SharedCacheState):
        assert field.name in saved or getattr(cache.state, field.name) == field.default, field.name


def test_inference_mode_training_mode_and_autocast(path):
    model = sinkattn.enable(build("llama"), S, W, R)
    cache = fed(model)
    cache.save(path)
    model.train()
    random_state = torch.get_rng_state()
    with torch.inference_mode():
        loaded = sinkattn.load_stream(model, path)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    model.eval()
    assert torch.equal(feed(model, loaded, random_ids(1, 30)), feed(model, cache, random_ids(1, 30)))
    with torch.autocast("cpu", torch.bfloat16):
        cache = fed(model)
        loaded = reload(model, cache, path)
        assert loaded.layers[0].keys.dtype == torch.bfloat16
        assert torch.equal(feed(model, loaded, random_ids(1, 30)), feed(model, cache, random_ids(1, 30)))
    with pytest.raises(ValueError, match=r"^path: layers.0.keys: expected torch.float32, got torch.bfloat16; accept"):
        sinkattn.load_stream(model, path)


OTHER_PROCESS = """
import sys, torch, sinkattn
sys.path.insert(0, "tests/hf")
torch.set_num_threads(1)
from hf_models import build, random_ids
from sinkattn.hf.versions import forward_cache
outputs = []
for family, path in zip(sys.argv[2::2], sys.argv[3::2]):
    model = sinkattn.enable(build(family), 4, 20, 3)
    cache = sinkattn.load_stream(model, path)
    with torch.no_grad():
        for ids in random_ids(2, 64, seed=3).split(1, dim=1):
            outputs.append(model(input_ids=ids, **{forward_cache(model): cache}).logits)
torch.save(outputs, sys.argv[1])
"""


def test_another_process(tmp_path):
    arguments, want = [], []
    for family in ("llama", "falcon_h1", "gpt2"):
        model = enabled(family, S, W, R)
        cache = fed(model, rows=2)
        cache.save(tmp_path / family)
        arguments += [family, str(tmp_path / family)]
        want += [feed(model, cache, ids) for ids in random_ids(2, 64, seed=3).split(1, dim=1)]
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "outputs"), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    got = torch.load(tmp_path / "outputs")
    assert len(got) == len(want) == 3 * 64
    assert all(map(torch.equal, got, want))


def test_a_killed_save_leaves_the_old_file_or_the_new_one(path):
    model = enabled("llama", S, W, R)
    caches = [fed(model, tokens, rows=8) for tokens in (50, 60)]
    started = time.perf_counter()
    caches[0].save(path)
    longest = 3 * (time.perf_counter() - started)
    found, interrupted, rng = set(), 0, random.Random(0)
    for begin in range(50):
        child = os.fork()
        if not child:
            try:
                for i in range(begin, 10**6):
                    caches[i % 2].save(path)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        interrupted += len(os.listdir(path.parent)) > 1
        loaded = sinkattn.load_stream(model, path)
        assert_same(caches[loaded.tokens_seen == 60], loaded)
        found.add(loaded.tokens_seen)
        if len(found) < 2:
            longest *= 1.2  # a save may take longer in a new process than it took here
    assert found == {50, 60}
    assert interrupted > 10  # kills do hit saves
    caches[0].save(path)
    assert os.listdir(path.parent) == [path.name]


def test_what_is_on_disk_before_the_file_is_replaced(path, monkeypatch):
    calls = []

    def recorded(name, call):
        monkeypatch.setattr(os, name, lambda *args: calls.append(name) or call(*args))

    recorded("fsync", os.fsync)
    recorded("replace", os.replace)
    fed(enabled("llama", S, W, R)).save(path)
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_save_that_fails_changes_nothing(kind, path, monkeypatch):
    model = enabled("llama", S, W, R)
    fed(model).save(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("sinkattn.hf.cache.stream_file.save_file", lambda *_: (_ for _ in ()).throw(kind("disk full")))
        with pytest.raises(OSError, match=r"disk full"):
            fed(model, 10).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError):
        fed(model, 10).save(path.parent / "absent" / "stream")


def test_saves_to_one_path_from_several_threads(path):
    model = enabled("llama", S, W, R)
    caches = [fed(model, tokens) for tokens in (40, 50, 60)]
    errors = []

    def save(cache):
        try:
            for _ in range(8):
                cache.save(path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sinkattn.load_stream(model, path).tokens_seen in (40, 50, 60)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_damaged_files_are_refused(family, path):
    """Cut anywhere; any bit of the header flipped, and some of the data."""
    model = enabled(family, S, W, R)
    fed(model).save(path)
    whole, rng = path.read_bytes(), random.Random(0)
    end_of_header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, end_of_header - 1, end_of_header, end_of_header + 1, len(whole) - 1}
    cuts |= {rng.randrange(len(whole)) for _ in range(20)}
    damaged = [whole[:cut] for cut in sorted(cuts)] + [whole + b"\0", whole[8:], b"\0" * len(whole)]
    flips = [*range(64), *(rng.randrange(64, 8 * end_of_header) for _ in range(150))]
    flips += [rng.randrange(8 * end_of_header, 8 * len(whole)) for _ in range(20)]
    for bit in flips:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^path: "):
            sinkattn.load_stream(model, path)
    path.write_bytes(whole)
    sinkattn.load_stream(model, path)


def changed(model, change):
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(change(x))
    return model


MISMATCHES = {
    "layout": (
        lambda: sinkattn.enable(build("llama"), S, W - 1, R),
        r"layout: expected \[4, 19, 3\],.*got \[4, 20, 3\]",
    ),
    "headroom": (lambda: sinkattn.enable(build("llama"), S, W), r"layout: expected \[4, 20, 0\],.*got \[4, 20, 3\]"),
    "class": (lambda: enabled("qwen2", S, W, R), "class: expected Qwen2ForCausalLM.*got LlamaForCausalLM"),
    "config": (
        lambda: sinkattn.enable(build("llama", rope_parameters={"rope_theta": 5e3, "rope_type": "default"}), S, W, R),
        r"config.rope_parameters: expected .*5000.0.*got .*10000.0",
    ),
    "shapes": (
        lambda: sinkattn.enable(build("llama", num_key_value_heads=4), S, W, R),
        "config.num_key_value_heads: expected 4, as this model has it, got 2",
    ),
    "dtype": (
        lambda: sinkattn.enable(build("llama", torch.bfloat16), S, W, R),
        "dtype: expected torch.bfloat16, as this model has it, got torch.float32; accept=",
    ),
    "checkpoint": (lambda: sinkattn.enable(build("llama", seed=1), S, W, R), "weights: expected [0-9a-f]{16}.*got"),
    "fine-tuned": (
        lambda: changed(sinkattn.enable(build("llama"), S, W, R), lambda x: x + 1e-6 * x.abs().mean()),
        "weights: expected",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_files_of_another_model_are_refused(name, path):
    make, message = MISMATCHES[name]
    model = make()
    cache, new = fed(model), random_ids(1, 8, seed=3)
    want = feed(model, copy.deepcopy(cache), new)
    fed(enabled("llama", S, W, R)).save(path)
    with pytest.raises(ValueError, match=rf"^path: {message}"):
        sinkattn.load_stream(model, path)
    assert torch.equal(feed(model, cache, new), want)


def test_other_files_are_refused(path):
    model = enabled("llama", S, W, R)
    with pytest.raises(FileNotFoundError):
        sinkattn.load_stream(model, path)
    path.write_text("not a file of this kind")
    with pytest.raises(ValueError, match=r"^path: expected a file of saved streams, got .*: .*header"):
        sinkattn.load_stream(model, path)
    save_file({"seen": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"^path: expected a file of saved streams, got .*, which has something else"):
        sinkattn.load_stream(model, path)
    cache = fed(model)
    cache.save(path)
    with pytest.raises(ValueError, match=r"expected a model prepared by sinkattn.enable"):
        sinkattn.load_stream(build("llama"), path)
    with pytest.raises(ValueError, match=r"^accept: expected some of \('dtype', 'weights'\), got \('model',\)"):
        sinkattn.load_stream(model, path, accept=("model",))


def forged(path, model, cache, tensors=None, **fields) -> None:
    """A file with a valid checksum, but other tensors and fields than the cache has."""
    tensors = {name: x for name, x in {**cache.state_tensors(), **(tensors or {})}.items() if x is not None}
    write_streams(path, tensors, fingerprint(require_patch(model)), {**cache.state_fields(), **fields})


def test_forged_files_are_refused_before_memory_is_allocated(path):
    model = enabled("llama", S, W, R)
    cache = fed(model)
    keys = cache.layers[0].keys
    forged(path, model, cache)
    assert_same(cache, sinkattn.load_stream(model, path))
    for tensors, fields, message in [
        ({}, {"rows": 10**12}, r"history.prefix_ids: expected \[1000000000000, 65\], got \[1, 65\]"),
        ({}, {"rows": -1}, "rows: expected a number from 0 on, got -1"),
        ({}, {"rows": "1"}, "rows: expected int, got '1'"),
        ({}, {"num_columns": None}, "num_columns: expected int, got None"),
        ({}, {"only_ids": 1}, "only_ids: expected bool, got 1"),
        ({}, {"history": []}, "history.peak_columns: expected int, got None"),
        ({}, {"peak_columns": 59}, r"seen: expected 0 to 59 tokens, got \[60\]"),
        ({"seen": torch.tensor([-5])}, {}, r"seen: expected 0 to 60 tokens, got \[-5\]"),
        ({"peak": torch.tensor([2**40])}, {}, "peak: expected 0 to 60 tokens, got"),
        ({"seen": torch.tensor([60.0])}, {}, "seen: expected torch.int64, got torch.float32"),
        ({"layers.0.keys": keys[:, :1]}, {}, r"layers.0.keys: expected \[1, 2, 27, 8\], got \[1, 1, 27, 8\]"),
        ({"layers.0.keys": keys[:, :, 1:]}, {}, r"layers.0.keys: expected \[1, 2, 27, 8\], got \[1, 2, 26, 8\]"),
        ({"layers.0.keys": keys.double()}, {}, "layers.0.keys: expected torch.float32, got torch.float64"),
        ({"layers.1.values": None}, {}, r"layers.1.values: expected \[1, 2, 27, 8\], got none"),
        ({"layers.2.keys": keys.clone()}, {}, "expected no tensor besides .* got layers.2.keys"),
    ]:
        forged(path, model, cache, tensors, **fields)
        with pytest.raises(ValueError, match=rf"^path: {message}"):
            sinkattn.load_stream(model, path)


def test_forged_lanes_are_refused(path):
    model = enabled("gpt2", S, W, R)
    cache = fed(model)
    [lane] = cache.state_fields()["lanes"]
    for change, message in [
        ({"rows": [0] * 10**4}, r"lanes.0.ids: expected \[10000, \d+\], got \[1, "),
        ({"rows": [1]}, r"lanes: expected each of 1 rows in one of them, got rows \[1\]"),
        ({"rows": [-1]}, "lanes.0.rows: expected numbers from 0 on"),
        ({"seen": lane["seen"] + 1}, "lanes.0.ids: expected"),
        ({"first_kept": 0}, "lanes: expected a context"),
        ({"encoded": [4, 10**9]}, "lanes: expected a context"),
        ({"encoded": [4, 2]}, "lanes.0.keys.0: expected"),
    ]:
        forged(path, model, cache, lanes=[{**lane, **change}])
        with pytest.raises(ValueError, match=rf"^path: {message}"):
            sinkattn.load_stream(model, path)


def test_another_format_is_refused(path, monkeypatch):
    model = enabled("llama", S, W, R)
    with monkeypatch.context() as patch:
        patch.setattr("sinkattn.hf.cache.stream_file.FORMAT", "2")
        fed(model).save(path)
    with pytest.raises(ValueError, match=r"^path: format: expected 1, got 2"):
        sinkattn.load_stream(model, path)


@pytest.mark.parametrize("family", ["llama", "falcon_h1", "gpt2"])
@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_another_dtype_if_asked(family, before, after, path):
    old, new = build(family, torch.bfloat16).to(before), build(family, torch.bfloat16).to(after)
    if before == torch.float32:  # its values are not those of bfloat16
        changed(old, lambda x: x * (1 + 1e-4))
        new.load_state_dict(old.state_dict())
    old, new = (sinkattn.enable(model, S, W, R) for model in (old, new))
    cache = fed(old)
    cache.save(path)
    loaded = sinkattn.load_stream(new, path, accept=("dtype",))
    for name, x in loaded.state_tensors().items():
        saved = cache.state_tensors()[name]
        assert torch.equal(x, saved.to(x.dtype)), name
        assert x.dtype == fed(new).state_tensors()[name].dtype
    feed(new, loaded, random_ids(1, 30))
    changed(new, lambda x: x * 1.1)
    with pytest.raises(ValueError, match=r"^path: weights: expected"):
        sinkattn.load_stream(new, path, accept=("dtype",))


def test_other_weights_if_asked(path):
    """A learner's model goes on learning; streams that were saved before go on with it."""
    model = sinkattn.enable(build("llama"), S, W, R)
    cache = fed(model)
    cache.save(path)
    learner = sinkattn.OnlineLearner(model, chunk=8, learn="all")
    learner.step(random_ids(1, 20))
    with pytest.raises(ValueError, match=r"^path: weights: .*; accept=\('weights',\) goes on with the model's"):
        sinkattn.load_stream(model, path)
    loaded = sinkattn.load_stream(model, path, accept=("weights",))
    assert_same(cache, loaded)
    assert torch.equal(feed(model, loaded, random_ids(1, 30)), feed(model, cache, random_ids(1, 30)))


def test_adapters_of_peft(path):
    peft = pytest.importorskip("peft")

    def adapted(seed):
        plain, config = build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        return sinkattn.enable(peft.get_peft_model(plain, config).eval(), S, W, R)

    model = adapted(1)
    cache, new = fed(model), random_ids(1, 30, seed=3)
    cache.save(path)
    for twin in (model, adapted(1)):
        fork = copy.deepcopy(cache) if twin is model else fed(twin)
        assert torch.equal(feed(twin, sinkattn.load_stream(twin, path), new), feed(twin, fork, new))
    others = {"none": sinkattn.enable(build("llama"), S, W, R), "other": adapted(2)}
    sinkattn.disable(model)
    others["merged"] = sinkattn.enable(copy.deepcopy(model).merge_and_unload(), S, W, R)
    with model.disable_adapter():
        for other in (*others.values(), sinkattn.enable(model, S, W, R)):
            with pytest.raises(ValueError, match=r"^path: weights: expected"):
                sinkattn.load_stream(other, path)


def test_quantized_weights(path):
    quantization = pytest.importorskip("torchao.quantization")

    def quantized(seed):
        model = build("llama", seed=seed)
        quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
        return sinkattn.enable(model, S, W, R)

    model = quantized(0)
    cache, new = fed(model), random_ids(1, 30, seed=3)
    cache.save(path)
    twin = quantized(0)
    assert torch.equal(feed(twin, sinkattn.load_stream(twin, path), new), feed(model, cache, new))
    for other in (quantized(1), enabled("llama", S, W, R)):
        with pytest.raises(ValueError, match=r"^path: weights: expected"):
            sinkattn.load_stream(other, path)


def test_a_save_in_the_middle_of_a_call_is_refused(path):
    model = sinkattn.enable(build("llama"), S, W, R)
    cache, messages = sinkattn.SinkCache(model), []

    def save(*args):
        with pytest.raises(RuntimeError) as error:
            cache.save(path)
        messages.append(str(error.value))

    handle = model.model.layers[1].register_forward_pre_hook(save)
    feed(model, cache, random_ids(1, 5))
    handle.remove()
    cache.reset()
    model.get_decoder().register_forward_pre_hook(save)
    model.generate(random_ids(1, 5), max_new_tokens=1, **{GENERATE_CACHE: cache})
    assert messages == [
        f"cache: is in the middle of {call}, in this thread or another; save it afterwards"
        for call in ("a forward", "generate")
    ]
    assert not path.exists()


def test_the_model_must_be_enabled_still(path):
    model = sinkattn.enable(build("llama"), S, W, R)
    cache = fed(model)
    twin = copy.deepcopy(model)
    sinkattn.disable(model)
    cache.save(path)  # a copy of an enabled model is enabled
    assert_same(cache, sinkattn.load_stream(twin, path))
    sinkattn.disable(twin)
    with pytest.raises(RuntimeError, match=r"expected its model to be enabled still"):
        cache.save(path)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_file_has_the_bytes_of_the_cache(model, rows, path):
    """The shipped model, with its small default cache: the smallest that one would stream with."""
    model = sinkattn.enable(copy.deepcopy(model), window=124)
    cache = sinkattn.SinkCache(model)
    ids = model.generate(random_ids(rows, 300), max_new_tokens=5, do_sample=False, **{GENERATE_CACHE: cache})
    assert ids.shape == (rows, 305)
    cache.save(path)
    assert path.stat().st_size <= 1.01 * cache.nbytes


def test_nothing_in_a_file_is_pickled(path):
    cache = fed(enabled("llama", S, W, R))
    cache.save(path)
    assert load_file(path).keys() == cache.state_tensors().keys()
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    content = json.loads(header["__metadata__"][HEADER])
    assert content["versions"]["torch"] == torch.__version__
    assert content["model"]["layout"] == [S, W, R]
    assert read_streams(path).rows == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_after_anything_that_a_cache_can_do(family, path):
    model, rng = enabled(family, S, W, R), random.Random(3)
    cache = sinkattn.SinkCache(model)
    blocks = next(x for x in model.get_decoder().children() if isinstance(x, torch.nn.ModuleList))
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    for step in range(40):
        rows = 3 if cache.seen is None else len(cache.seen)
        ids, action = random_ids(rows, rng.choice([1, 2, 9, 40]), seed=step), rng.randrange(8)
        if action < 3:
            mask = torch.rand(ids.shape) < 0.7 if action else torch.ones_like(ids)
            feed(model, cache, ids, mask.to(torch.int64))
        elif action == 3:
            model.generate(ids, attention_mask=torch.ones_like(ids), **options, **{GENERATE_CACHE: cache})
        elif action == 4 and cache.tokens_seen > 1:
            with suppress(RuntimeError):  # beyond the headroom
                cache.crop(-1)
        elif action == 5 and cache.tokens_seen:
            cache.reorder_cache(torch.tensor([rng.randrange(rows) for _ in range(rows)]))
        elif action == 6 and cache.tokens_seen:
            cache.batch_select_indices(torch.tensor([rng.randrange(rows) for _ in range(rng.randint(1, 4))]))
        elif action == 7 and cache.tokens_seen:
            with interrupted(blocks[1], 0, ZeroDivisionError):
                feed(model, cache, ids)
        if not cache.is_usable:
            reload(model, cache, path)
            cache.reset()
        elif rng.random() < 0.5:
            cache = reload(model, cache, path)
    reload(model, cache, path)


def test_the_mode_and_the_target_of_a_link_stay(tmp_path):
    cache = sinkattn.SinkCache(enabled("llama", 4, 28))
    (tmp_path / "plain").touch()
    cache.save(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    cache.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
