"""``sinkattn demo``: its losses against independent forwards, and its table, JSON and picture."""

import io
import json
import math
import time
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sinkattn.cli import demo_picture, demo_report, formatting, pictures
from sinkattn.evaluate import demo
from sinkattn.evaluate.demo import Settings
from sinkattn.evaluate.text import Pipe, TextError, TokenStream
from sinkattn.hf.versions import forward_cache

SETTINGS = Settings(tokens=90, num_sinks=3, window=9, dense_tokens=50, samples=20)
SIZE = SETTINGS.cache_tokens
ABOUT = {
    "interrupted": False,
    "model": {
        "name": "tiny",
        "shipped": False,
        "class": "Tiny",
        "dtype": "float32",
        "device": "cpu",
        "trained_length": 64,
    },
    "text": {"description": "pangram", "started_over": 2, "start_token": True},
}


class LetterTokenizer:
    bos_token_id = 0

    def __call__(self, piece, **options):
        return type("Encoding", (), {"input_ids": [ord(letter) % 40 + 1 for letter in piece]})


def make_stream(text="the quick brown fox jumps over the lazy dog"):
    return TokenStream(Pipe(io.StringIO(text)), LetterTokenizer())


@pytest.fixture(scope="module")
def model():
    """One layer: there, what a query sees decides its output, so any streaming can be checked by a fresh forward."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def result(model):
    return demo.run(model, make_stream(), SETTINGS, lambda *progress: None, lambda: 1 << 20)


def visible(position, num_sinks, window):
    return [*range(min(num_sinks, position + 1)), *range(max(num_sinks, position - window + 1), position + 1)]


@pytest.fixture(scope="module")
def expected(model):
    """Loss at every position by every method, from the model as transformers has it."""
    ids = torch.tensor(list(islice(make_stream(), SETTINGS.tokens + 1)))

    @torch.no_grad()
    def loss(position, seen):
        logits = model(input_ids=ids[seen][None], use_cache=False).logits[0, -1]
        return F.cross_entropy(logits, ids[position + 1]).item()

    layouts = {
        "sinkattn": (SETTINGS.num_sinks, SETTINGS.window),
        "window": (0, SIZE),
        "dense": (0, SETTINGS.tokens),
        "recompute": (1, SIZE - 1),
    }
    return {
        name: np.array([loss(position, visible(position, *layout)) for position in range(SETTINGS.tokens)])
        for name, layout in layouts.items()
    }


@pytest.mark.parametrize("name", ["sinkattn", "window", "dense", "recompute"])
def test_losses_are_those_of_fresh_forwards(result, expected, name):
    method = result.methods[name]
    got = method.recorder.sample_losses
    reached = method.recorder.samples < (SETTINGS.dense_tokens if name == "dense" else SETTINGS.tokens)
    assert np.isnan(got[~reached]).all()
    np.testing.assert_allclose(got[reached], expected[name][method.recorder.samples[reached]], rtol=1e-4)


@pytest.mark.parametrize("name", ["sinkattn", "window", "dense"])
def test_series_cover_the_whole_stream(result, expected, name):
    end = SETTINGS.dense_tokens if name == "dense" else SETTINGS.tokens
    series = result.methods[name].recorder.series()
    assert [bucket["begin"] for bucket in series[1:]] == [bucket["end"] for bucket in series[:-1]]
    assert (series[0]["begin"], series[-1]["end"]) == (0, end)
    for bucket in series:
        assert bucket["tokens"] == bucket["end"] - bucket["begin"]
        want = expected[name][bucket["begin"] : bucket["end"]].mean()
        assert bucket["loss"] == pytest.approx(want, rel=1e-4)


def test_methods_differ_once_the_window_is_full(expected):
    for name in ("window", "dense", "recompute"):
        np.testing.assert_allclose(expected[name][:SIZE], expected["sinkattn"][:SIZE], rtol=1e-4)
        assert np.abs(expected[name] - expected["sinkattn"])[SIZE:50].max() > 0.01


def test_caches(result, model):
    per_token = 2 * 4 * 8 * 4  # keys and values, heads, head_dim, fp32
    sizes = {name: method.cache_bytes for name, method in result.methods.items()}
    assert sizes == {
        "sinkattn": SIZE * per_token,
        "window": SIZE * per_token,
        "dense": SETTINGS.dense_tokens * per_token,
        "recompute": None,
    }
    assert "_sinkattn" not in model.__dict__, "the model is given back as it came"


def test_turns_tell_a_stream_that_slows_down(result, model):
    assert (result.turns.rounds, result.turns.young_seen, result.turns.old_seen) == (9, SIZE, SETTINGS.tokens)

    def slow(module, args, kwargs):
        if (cache := kwargs.get(forward_cache(module))) is not None and cache.get_seq_length() >= SETTINGS.tokens:
            time.sleep(0.02)

    handle = model.register_forward_pre_hook(slow, with_kwargs=True)
    try:
        turns = demo.run(model, make_stream(), SETTINGS, lambda *progress: None, lambda: 0).turns
    finally:
        handle.remove()
    assert turns.change > 1
    assert turns.old - turns.young > 0.01


def test_dense_stops_when_its_time_is_over(model, monkeypatch):
    monkeypatch.setattr(demo, "DENSE_SECONDS", 0.0)
    result = demo.run(model, make_stream(), SETTINGS, lambda *progress: None, lambda: 0)
    dense = result.methods["dense"]
    assert dense.recorder.end < 5
    assert dense.stopped == "time budget of 0 s"
    figures = demo_report.as_dict(result, ABOUT)
    assert figures["methods"]["dense"]["scored"] == []
    assert [part["begin"] for part in figures["methods"]["sinkattn"]["scored"]] == [SETTINGS.dense_tokens]
    assert "time budget" in printed(result)
    assert "with a full window; for dense, 0." in "\n".join(demo_report.remarks(result, ABOUT))


def test_dense_may_reach_the_end(model):
    settings = Settings(tokens=40, num_sinks=3, window=9, dense_tokens=5000, samples=5)
    result = demo.run(model, make_stream(), settings, lambda *progress: None, lambda: 0)
    assert result.methods["dense"].stopped is None
    assert [len(method["scored"]) for method in demo_report.as_dict(result, ABOUT)["methods"].values()] == [1] * 4
    assert "ran all tokens" in printed(result)


def test_settings_and_texts_that_cannot_be_compared(model):
    def run(settings, text="abc"):
        demo.run(model, make_stream(text), settings, lambda *progress: None, lambda: 0)

    with pytest.raises(ValueError, match=r"tokens: expected more than num_sinks \+ window \(128\), got 128"):
        run(Settings(tokens=128))
    with pytest.raises(ValueError, match="dense_tokens: expected more than"):
        run(Settings(dense_tokens=100))
    with pytest.raises(ValueError, match="samples: expected 1 or more, got 0"):
        run(Settings(samples=0))
    with pytest.raises(ValueError, match="must not exceed the 64 positions"):
        run(Settings())
    with pytest.raises(TextError, match="text: stdin is empty"):
        run(SETTINGS, text="")


# Output


def printed(result):
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    console.print(demo_report.table(result))
    return console.file.getvalue()


def test_figures(result, expected):
    figures = json.loads(json.dumps(demo_report.as_dict(result, ABOUT)))
    assert set(figures) == {
        *("interrupted", "model", "text", "versions", "machine", "build", "settings", "sinkattn_constant", "methods"),
    }
    assert set(figures["versions"]) == {"sinkattn", "python", "torch", "transformers"}
    assert figures["machine"]["threads"] == torch.get_num_threads()
    assert figures["machine"]["processor"]
    assert figures["settings"]["window"] == 9
    assert figures["sinkattn_constant"]["resident_growth_bytes"] == 0
    assert [method["tokens"] for method in figures["methods"].values()] == [90, 90, 50, 40]
    for name, method in figures["methods"].items():
        for part in method["scored"]:
            samples = result.methods[name].recorder.samples
            at = samples[(samples >= part["begin"]) & (samples < part["end"])]
            assert part["samples"] == len(at) == 20
            assert part["loss"] == pytest.approx(expected[name][at].mean(), rel=1e-4)
            assert part["perplexity"] == pytest.approx(math.exp(part["loss"]))
    assert [len(method["scored"]) for method in figures["methods"].values()] == [2, 2, 1, 2]


def test_table_shows_the_figures(result):
    scored = demo_report.as_dict(result, ABOUT)["methods"]["sinkattn"]["scored"]
    text = printed(result)
    assert f"{scored[0]['loss']:.3f} ({scored[0]['perplexity']:.1f})" in text
    assert f"{scored[1]['loss']:.3f}" in text
    assert "not reached" in text
    assert "stopped at 50: budget of 50 tokens" in text
    remarks = "\n".join(demo_report.remarks(result, ABOUT))
    assert "same 20 + 20 tokens" in remarks
    assert "A fresh forward over the start token, and the last 11 tokens." in remarks
    assert "1.0 MiB when the window was full, at most 0 B more" in remarks
    assert "started over 2 times" in remarks


def test_sizes_for_people():
    sizes = {512: "512 B", 2048: "2.0 KiB", 3 << 20: "3.0 MiB", 5 << 30: "5.00 GiB"}
    assert {count: formatting.size_text(count) for count in sizes} == sizes


def test_merged_buckets_hold_enough_tokens():
    series = [
        {"begin": begin, "end": begin + 4, "tokens": 4, "loss": float(begin), "seconds": None}
        for begin in range(0, 40, 4)
    ]
    assert pictures.merge_buckets(series, "loss", min_tokens=12) == ([6.0, 18.0, 30.0], [4.0, 16.0, 28.0])
    assert pictures.merge_buckets(series, "seconds") == ([], [])


def test_picture(result, tmp_path):
    demo_picture.draw(demo_report.as_dict(result, ABOUT), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nonsense"):
        demo_picture.draw(demo_report.as_dict(result, ABOUT), tmp_path / "demo.nonsense")
