"""Arguments of the wrong kind: one error that names the argument, and nothing is changed."""

import pytest
import torch

import sinkattn
from sinkattn import RingKVCache, Rope, sink_attention

X = torch.ones(1, 1, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"batch_size": 2.5}, ValueError, "batch_size: expected a whole number, got 2.5"),
        ({"head_dim": "a"}, ValueError, "head_dim: expected a whole number, got 'a'"),
        ({"window": True}, ValueError, "window: expected a whole number, got True"),
        ({"num_sinks": 2.5}, ValueError, "num_sinks: expected a whole number, got 2.5"),
        ({"headroom": None}, ValueError, "headroom: expected a whole number, got None"),
        ({"layout": (4, 8)}, TypeError, "layout: expected a RingLayout, got tuple"),
        ({"share_seen_with": X}, TypeError, "share_seen_with: expected a RingKVCache, got Tensor"),
    ],
)
def test_a_ring(arguments, kind, message):
    with pytest.raises(kind, match=rf"^{message}$"):
        RingKVCache(**{"batch_size": 1, "kv_heads": 1, "head_dim": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: expected a tensor, got list"),
        ({"value": None}, TypeError, "value: expected a tensor, got NoneType"),
        ({"ring": X}, TypeError, "ring: expected a RingKVCache, got Tensor"),
        ({"rope": 1e4}, TypeError, "rope: expected a Rope or None, got float"),
        ({"lengths": [1]}, TypeError, "lengths: expected a tensor, got list"),
        ({"begins": 3}, TypeError, "begins: expected a tensor, got int"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes: expected a tensor, got float"),
        ({"scale": "a"}, ValueError, "scale: expected a finite number, got 'a'"),
        ({"softcap": "a"}, ValueError, "softcap: expected more than 0, or None, got 'a'"),
    ],
)
def test_attention(arguments, kind, message):
    ring = RingKVCache(1, 1, 2, 1, 4)
    with pytest.raises(kind, match=rf"^{message}$"):
        sink_attention(**{"query": X, "key": X, "value": X, "ring": ring, **arguments})
    assert not ring.seen.any()
    assert not ring.keys.any()
    assert torch.equal(sink_attention(X, X, X, ring), X)


def test_rope():
    with pytest.raises(TypeError, match=r"^inv_freq: expected a tensor, got list$"):
        Rope([1.0])
    with pytest.raises(ValueError, match=r"^scaling: expected a finite number, got 'a'$"):
        Rope(torch.ones(1), scaling="a")


@pytest.mark.parametrize("name", ["enable", "disable", "SinkCache", "StreamPool", "OnlineLearner", "BackgroundLearner"])
def test_a_model_is_asked_for_by_all_in_the_same_way(name):
    with pytest.raises(TypeError, match=r"^model: expected a transformers PreTrainedModel, got str$"):
        getattr(sinkattn, name)("gpt2")
