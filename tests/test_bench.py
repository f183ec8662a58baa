"""The GPU benchmarks, rehearsed on the CPU: what only a GPU can show is left to a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "run_gpu.py"
TITLES = [
    "Decode: one token per stream, one layer, bf16\n",
    "Decode: one token per stream, one layer, bf16: time of sinkattn / time of\n",
    "Chunk: new tokens at once on a full window",
    "Append alone",
    "Whole model, 8 B parameters in bf16, one stream: a token\n",
    "Constancy",
    "Whole model, 8 B parameters in bf16, many streams: tokens of all\n",
    "Whole model, 8 B parameters in bf16, one stream: a token of generate\n",
    "Decode: one token per stream, one layer, bf16, with flex\n",
    "Whole model, 8 B parameters in bf16, one stream: a token, with torch.compile\n",
    "Forward and backward of a chunk on a full window, one layer, bf16\n",
]
BENCHMARKS = {
    *("test_decode", "test_chunk", "test_append", "test_token", "test_constancy", "test_generate"),
    *("test_backward", "test_flex_decode", "test_flex_chunk", "test_static_cache", "test_streams"),
}
# What cannot run on a CPU, or need not be installed.
LEFT_OUT = ("sdpa cudnn", "flash-attn", "flashinfer", "flex, B=1 W=24 T=24: left out: NotImplementedError")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    # Benchmarks do not run beside others: pytest-benchmark would see a worker of pytest-xdist, and leave them out.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_rehearsal_leaves_tables_and_json(tmp_path):
    result = run("--rehearse", "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.txt"]

    report = (tmp_path / "out.txt").read_text()
    assert [title for title in TITLES if f"\n{title}" not in report] == []
    left_out = [line for line in report.splitlines() if "left out" in line or "not installed" in line]
    assert [line for line in left_out if not line.startswith(LEFT_OUT)] == []

    content = json.loads((tmp_path / "out.json").read_text())
    assert content["unfinished"] == []
    figures = {row["name"]: row["extra_info"] for row in content["benchmarks"]}
    assert {name.partition("[")[0] for name in figures} == BENCHMARKS
    assert figures["test_decode[B1-W16-H32-Hkv8-D128]"]["sinkattn us"] > 0


def test_what_an_unfinished_part_had_found_is_kept(tmp_path):
    spec = importlib.util.spec_from_file_location("run_gpu", SCRIPT)
    run_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_gpu)
    out = tmp_path / "out.1"
    Path(f"{out}-attention.json").write_text('{"version": "5", "benchmarks": [1, 2]}')
    Path(f"{out}-model.json").touch()  # as pytest-benchmark leaves it when it is ended
    Path(f"{out}-model.jsonl").write_text('{"test": "test_token"}\n')
    for part in ("attention", "model"):
        Path(f"{out}-{part}.txt").write_text(f"{part}\n")
    run_gpu.join(out, ["attention", "model", "compiled"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.1.json", "out.1.txt"]
    assert json.loads((tmp_path / "out.1.json").read_text()) == {
        "version": "5",
        "benchmarks": [1, 2],
        "unfinished": [{"test": "test_token"}],
    }
    assert (tmp_path / "out.1.txt").read_text() == "attention\n\n\nmodel\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    result = run()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "bench-gpu: torch sees no CUDA device here; ARGS=--rehearse tries the benchmarks out on the CPU\n"
    )
