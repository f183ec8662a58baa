"""What a type checker tells users of the public API: it finds wrong calls, and nothing in right ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]
# Torch and transformers are Any here: checking them takes half a minute.
CONFIG = """
[mypy]
no_implicit_reexport = True
[mypy-torch.*,transformers.*,tokenizers.*]
follow_imports = skip
[mypy-sinkattn.*]
ignore_errors = True
"""
CALLS = """
from collections.abc import Iterator

import torch

import sinkattn

def call(model: torch.nn.Module, ids: torch.Tensor) -> None:
    {}
"""
RIGHT = [
    "sinkattn.enable(model, 4, window=1020, backend='cpu')",
    "cache = sinkattn.SinkCache(model, max_batch_size=2); forks: int = cache.tokens_seen",
    "tokens: Iterator[int] = sinkattn.hf.stream_tokens(model, [1, 2], top_k=3)",
    "k: int = sinkattn.SamplingParams(temperature=0.8, logit_bias={3: -1.0}, grammar='start: /a+/').top_k",
    "name: str = sinkattn.ops.cpu_capability(); width: int = sinkattn.reference.visible(5, 1, 2)[0]",
    "slot: int = sinkattn.RingLayout(4, 60).slot(7)",
    "ring = sinkattn.RingKVCache(1, 2, 8, window=16); out: torch.Tensor = sinkattn.sink_attention(ids, ids, ids, ring)",
]
WRONG = {
    "sinkattn.enable(model, '4')": "arg-type",
    "sinkattn.enable(model, backend='gpu')": "arg-type",
    "sinkattn.enable(model, sinks=4)": "call-arg",
    "sinkattn.Enable(model)": "attr-defined",
    "sinkattn.SinkCache(model).tokens_seen = '4'": "misc",
    "sinkattn.hf.stream_tokens(model, [1, 2], temperature='0')": "arg-type",
    "sinkattn.SamplingParams(min_p='0')": "arg-type",
    "sinkattn.RingLayout(4, 60).slot('7')": "arg-type",
    "sinkattn.RingKVCache(1, 2, 8, 'all')": "arg-type",
    "sinkattn.Rope(ids, style='both')": "arg-type",
}


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Run mypy on calls in one file each, all at once: returns its output by call."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "mypy.ini").write_text(CONFIG)
    names = {f"call_{i}.py": call for i, call in enumerate([*RIGHT, *WRONG])}
    for name, call in names.items():
        (folder / name).write_text(CALLS.format(call))
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *names],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    return {call: "\n".join(line for line in lines if line.startswith(f"{name}:")) for name, call in names.items()}


@pytest.mark.parametrize("call", RIGHT)
def test_nothing_is_found_in_a_right_call(check, call):
    assert check[call] == ""


@pytest.mark.parametrize(("call", "code"), WRONG.items())
def test_a_wrong_call_is_found(check, call, code):
    assert f"[{code}]" in check[call]
