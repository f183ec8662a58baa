"""What a token costs: every method at every size, with the memory that it keeps."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from sinkattn.evaluate import latency
from sinkattn.evaluate.latency import Settings
from sinkattn.evaluate.methods import CacheSize

SLOT = 2048  # bytes of keys and values of a token in the shipped model


def quiet(*progress):
    pass


def test_costs_by_window(model):
    seen = []
    costs = latency.by_window(model, 4, Settings((16, 64), (), 3), lambda *progress: seen.append(progress))
    assert [(cost.method, cost.size, cost.seen) for cost in costs] == [
        (method, size, size) for size in (16, 64) for method in ("sinkattn", "dense", "recomputed")
    ]
    assert all(cost.seconds > 0 and cost.rounds == 3 and cost.peak_bytes is None for cost in costs)
    assert [cost.kv_bytes for cost in costs] == [
        16 * SLOT,
        16 * SLOT,
        None,
        64 * SLOT,
        64 * SLOT,
        None,
    ]
    assert seen == [(1, 2), (2, 2)]


def test_costs_along_a_stream(model):
    costs = latency.by_length(model, CacheSize(4, 28), Settings((), (20, 21, 600), 2), quiet)
    costs = [cost for cost in costs if cost.seen != 21]
    assert [(cost.method, cost.size, cost.seen) for cost in costs] == [
        ("sinkattn", 20, 20),
        ("dense", 20, 20),
        ("sinkattn", 32, 600),
        ("dense", 600, 600),
    ]
    assert [cost.kv_bytes for cost in costs] == [32 * SLOT, 20 * SLOT, 32 * SLOT, 600 * SLOT]


def test_dense_attention_is_left_out_where_positions_end():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    methods = [cost.method for cost in latency.by_length(model, CacheSize(2, 20), Settings((), (20, 100), 2), quiet)]
    assert methods == ["sinkattn", "dense", "sinkattn"]
    assert [cost.method for cost in latency.by_window(model, 2, Settings((64,), (), 2), quiet)] == [
        "sinkattn",
        "recomputed",
    ]


def test_sizes_that_a_model_cannot_take_are_refused(model):
    with pytest.raises(ValueError, match="sizes: expected more than the 4 sinks, got 4"):
        latency.by_window(model, 4, Settings((4,), (), 1), quiet)
    with pytest.raises(ValueError, match="must not exceed the 256 positions"):
        latency.by_window(model, 4, Settings((300,), (), 1), quiet)
