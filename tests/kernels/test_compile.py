"""Every variant of the Triton kernels that a call can select, compiled for several GPU architectures without a GPU."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from aot import compile_call

CAPABILITIES = (80, 90, 100)
# Maximum shared memory per thread block (CUDA C++ programming guide, technical specifications). Compute capabilities
# 8.6, 8.9 and 12.0 have less than 8.0 and 9.0; variants for 8.0 must also run on 8.6 and 8.9.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn
OPTIONS = {"softcap": 30.0, "sink_logits": True, "alibi_slopes": True, "ragged": True}
# Every configuration of block sizes, warps and stages, compiled for every architecture.
CONFIGS = {
    "bf16": {},
    "many-streams": {"batch": 16},
    "d64": {"head_dim": 64},
    "d64-group71": {"head_dim": 64, "heads": 71, "kv_heads": 1},
    "group32": {"heads": 64},
    "group64": {"heads": 128},
    "d256": {"head_dim": 256},
    "d256-group32": {"head_dim": 256, "heads": 64},
    "fp32": {"dtype": FP32},
    "fp32-d64": {"dtype": FP32, "head_dim": 64},
    "fp32-d64-group32": {"dtype": FP32, "head_dim": 64, "heads": 64},
    "fp32-d256": {"dtype": FP32, "head_dim": 256},
    "few-tokens": {"tokens": 16},
    "chunk": {"tokens": 4096},
    "chunk-few-queries": {"tokens": 64},
    "chunk-d64": {"tokens": 4096, "head_dim": 64},
    "chunk-d256": {"tokens": 4096, "head_dim": 256},
    "backward": {"backward": True},
    "chunk-fp32": {"tokens": 4096, "dtype": FP32},
    "chunk-fp32-d64": {"tokens": 4096, "dtype": FP32, "head_dim": 64},
    "chunk-fp32-d256": {"tokens": 4096, "dtype": FP32, "head_dim": 256},
    "int8": {"cache_dtype": INT8},
}
# Other options of a call, several at once if they do not meet in the code, each compiled for one architecture: they
# change the code before its machine-specific stages.
FEATURES = {
    "fp16-unaligned": (90, {"dtype": FP16, "offset": 1}),
    "d80": (90, {"head_dim": 80}),
    "d96-no-rotation": (80, {"head_dim": 96, "pairs": 0}),
    "group1-partial": (80, {"heads": 2, "pairs": 16}),
    "group16-interleaved": (100, {"heads": 32, "interleaved": True}),
    "options": (90, OPTIONS),
    "many-streams-options": (90, {"batch": 16, "rows": True, **OPTIONS}),
    "few-tokens-d64": (80, {"tokens": 16, "head_dim": 64}),
    "few-tokens-d256": (90, {"tokens": 8, "head_dim": 256}),
    "few-tokens-fp32": (80, {"tokens": 4, "dtype": FP32}),
    "few-tokens-small-gpu": (120, {"tokens": 16}),
    "few-tokens-options": (90, {"tokens": 3, "rows": True, **OPTIONS}),
    "chunk-small-gpu": (120, {"tokens": 4096}),
    "chunk-fp16-interleaved-unaligned": (80, {"tokens": 4096, "dtype": FP16, "interleaved": True, "offset": 1}),
    "chunk-d80-no-rotation": (90, {"tokens": 4096, "head_dim": 80, "pairs": 0}),
    "chunk-options": (90, {"tokens": 4096, **OPTIONS}),
    "backward-d64": (80, {"backward": True, "head_dim": 64}),
    "backward-options": (90, {"backward": True, **OPTIONS}),
    "backward-d256": (90, {"backward": True, "head_dim": 256}),
    "backward-fp32": (80, {"backward": True, "dtype": FP32}),
    "backward-fp32-d64": (90, {"backward": True, "dtype": FP32, "head_dim": 64}),
    "backward-fp16-small-gpu": (120, {"backward": True, "dtype": FP16}),
    "int8-many-streams": (80, {"cache_dtype": INT8, "batch": 16}),
    "int8-d256": (90, {"cache_dtype": INT8, "head_dim": 256}),
    "int8-d32": (80, {"cache_dtype": INT8, "head_dim": 32}),
    "int8-fp32": (80, {"cache_dtype": INT8, "dtype": FP32}),
    "fp8-many-streams-options": (90, {"cache_dtype": FP8, "batch": 16, "rows": True, **OPTIONS}),
    "fp8-few-tokens-fp16": (100, {"cache_dtype": FP8, "tokens": 16, "dtype": FP16}),
    "chunk-int8": (80, {"cache_dtype": INT8, "tokens": 4096}),
    "chunk-int8-d32": (90, {"cache_dtype": INT8, "tokens": 4096, "head_dim": 32}),
    "chunk-fp8": (100, {"cache_dtype": FP8, "tokens": 4096}),
    "chunk-int8-few-queries-fp16": (90, {"cache_dtype": INT8, "tokens": 64, "dtype": FP16}),
    "split-chunk-fp8-options": (90, {"cache_dtype": FP8, "tokens": 64, "split": True, "rows": True, **OPTIONS}),
    "split-chunk-options": (90, {"tokens": 64, "split": True, "rows": True, **OPTIONS}),
    "split-chunk-fp32": (80, {"tokens": 64, "split": True, "dtype": FP32}),
    "split-chunk-d256": (100, {"tokens": 64, "split": True, "head_dim": 256}),
}
VARIANTS = {(name, capability): call for name, call in CONFIGS.items() for capability in CAPABILITIES}
VARIANTS |= {(name, capability): call for name, (capability, call) in FEATURES.items()}


@pytest.fixture(scope="module")
def compiled(request):
    """Future of a variant, compiled in another process: in this one the interpreter is on.

    As many variants as this worker has cores for are compiled ahead.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    pool = ProcessPoolExecutor(max(1, cores), mp_context=multiprocessing.get_context("spawn"))
    calls = (item.callspec.params for item in request.session.items if item.path == request.path)
    selected, futures = [(call["name"], call["capability"]) for call in calls], {}

    def future_of(*variant):
        start = selected.index(variant)
        for each in selected[start : start + max(1, cores)]:
            if each not in futures:
                futures[each] = pool.submit(compile_call, each[1], VARIANTS[each])
        return futures[variant]

    # Nobody reads line tables.
    with patch.dict(os.environ, TRITON_INTERPRET="0", TRITON_DISABLE_LINE_INFO="1"):
        yield future_of
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("name", "capability"), VARIANTS, ids=lambda x: f"sm_{x}" if isinstance(x, int) else x)
def test_compiles_without_spills_in_loops(name, capability, compiled):
    kernels = compiled(name, capability).result()
    first = "quantise_kernel" if "int8" in name or "fp8" in name else "rotate_kernel"
    expected = [first, "chunk_kernel"] if "chunk" in name else ["decode_kernel"]
    if name.startswith("backward"):
        expected = ["query_gradients_kernel", "key_gradients_kernel"]
    assert list(kernels) == expected + ["combine_kernel"] * name.startswith("split")
    for kernel, used in kernels.items():
        print(kernel, used)
        assert used.registers <= 255
        assert used.shared <= SHARED_BYTES[capability], kernel
        if kernel != first:
            assert used.loops
        assert [spills for _, spills, _ in used.loops if spills] == []
