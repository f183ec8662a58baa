"""Caches of 8 bits compared with full precision: losses, divergences, memory, and what the commands print of them."""

import json
import math

import pytest
import torch

from sinkattn import cli
from sinkattn.evaluate import latency, perplexity
from sinkattn.evaluate.eight_bit import EightBit
from sinkattn.evaluate.methods import CacheSize, Streamed
from sinkattn.evaluate.perplexity import Settings

pytestmark = pytest.mark.usefixtures("few_timed_tokens")

CACHE = CacheSize(4, 28)
SLOT = 2048  # bytes of keys and values of a token in the shipped model: 2 layers, 4 heads of 32 elements, in float32
EIGHT_BIT = 4 * SLOT + 28 * 2 * 4 * 2 * (32 + 4)


def logits_of(method, ids):
    """Of the model of a method on a new stream, in fp64."""
    method.reset()
    with torch.no_grad():
        return method._forward(ids).logits[0].double()


def test_divergences_are_those_of_whole_distributions(model, ids):
    whole = Streamed(model, CACHE)
    method = EightBit(model, whole, "int8")
    assert [whole.name, method.name] == ["4+28", "4+28 int8"]
    divergences, losses = [], []
    for begin, end in ((0, 1), (1, 280)):  # the last one is fed in two forwards
        pieces = ids[begin:end], ids[begin + 1 : end + 1], torch.ones(end - begin, dtype=torch.bool)
        whole.feed(*pieces)
        losses.append(method.feed(*pieces).losses)
        divergences.append(method.divergences)
    p, q = (logits_of(each, ids[:280]).softmax(dim=-1) for each in (whole, method))
    expected = (p * (p / q).log()).sum(dim=-1)
    torch.testing.assert_close(torch.cat(divergences), expected, rtol=1e-2, atol=1e-6)
    assert expected[CACHE.num_sinks :].mean() > 1e-5
    torch.testing.assert_close(torch.cat(losses), -q[torch.arange(280), ids[1:281]].log(), rtol=1e-3, atol=1e-4)


def test_perplexity_and_latency(model, stream):
    settings = Settings((CACHE,), 100, dense_tokens=0, recompute_every=0, cache_dtypes=("int8", "fp8"))
    result = perplexity.run(model, stream, settings, lambda *progress: None)
    whole, *eight_bit = result.tracks
    assert [track.method.name for track in result.tracks] == ["4+28", "4+28 int8", "4+28 fp8"]
    assert [result.whole(track) for track in result.tracks] == [None, whole, whole]
    assert [track.kv_bytes for track in result.tracks] == [32 * SLOT, EIGHT_BIT, EIGHT_BIT]
    assert whole.divergences.mean() is None
    means = [track.divergences.mean() for track in eight_bit]
    assert [mean.tokens for mean in means] == [68, 68]
    assert 0 < means[0].loss < means[1].loss < 0.1  # int8 is the finer one
    costs = latency.by_window(model, 4, latency.Settings((32,), (), 1, cache_dtypes=("fp8",)), lambda *progress: None)
    assert {cost.method: cost.kv_bytes for cost in costs[:2]} == {"sinkattn": 32 * SLOT, "sinkattn fp8": EIGHT_BIT}


def test_commands_print_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ppl = ["ppl", "--tokens", "80", "--cache", "4+28", "--dense-tokens", "0", "--recompute-every", "0"]
    assert cli.main(["eval", *ppl, "--cache-dtype", "int8", "--json", "out.json"]) == 0
    text, methods = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["methods"]
    method = methods["4+28 int8"]
    row = next(line for line in text.splitlines() if "4+28 sinks + window, int8" in line)
    ratio = math.exp(method["minus_full_precision"]["loss"])
    assert ratio == pytest.approx(method["all"]["perplexity"] / methods["4+28"]["all"]["perplexity"])
    assert f"{ratio:.4f}" in row
    assert f"{method['divergence']['nats']:.1e}" in row
    sizes = ["latency", "--sizes", "16", "--lengths", "20", "--rounds", "1"]
    assert cli.main(["eval", *sizes, "--cache-dtype", "int8", "fp8"]) == 0
    rows = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row[:1] in (["int8"], ["fp8"])] == ["int8", "fp8"] * 2
    assert cli.main(["info", "--model", "demo", "--window", "28", "--cache-dtype", "int8"]) == 0
    assert "cache: 23.8 KiB per stream, tokens that are not sinks in int8" in capsys.readouterr().out
