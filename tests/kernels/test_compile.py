"""Every variant of the Triton kernels that a call can choose, compiled for GPUs that need not be there."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from aot import compile_call

CAPABILITIES = (80, 90, 100)
# The most shared memory that one program can have (CUDA C++ programming guide, technical specifications). Cards of
# capability 8.6, 8.9 and 12.0 have less than those of 8.0 and 9.0; what these are given is held to that.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPTIONS = {"softcap": 30.0, "sink_logits": True, "alibi_slopes": True, "ragged": True}
# Every choice of blocks, warps and stages, on every architecture.
CONFIGS = {
    "bf16": {},
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
    "chunk-d64": {"tokens": 4096, "head_dim": 64},
    "chunk-d256": {"tokens": 4096, "head_dim": 256},
    "chunk-fp32": {"tokens": 4096, "dtype": FP32},
    "chunk-fp32-d64": {"tokens": 4096, "dtype": FP32, "head_dim": 64},
    "chunk-fp32-d256": {"tokens": 4096, "dtype": FP32, "head_dim": 256},
}
# What else a call can ask for, on one architecture each: it changes the code before the machine's own.
FEATURES = {
    "fp16": (90, {"dtype": FP16}),
    "d80": (90, {"head_dim": 80}),
    "d96": (80, {"head_dim": 96}),
    "group1": (80, {"heads": 2}),
    "group16": (100, {"heads": 32}),
    "one-program": (90, {"batch": 512}),
    "options": (90, OPTIONS),
    "interleaved": (100, {"interleaved": True}),
    "partial": (80, {"pairs": 16}),
    "no-rotation": (100, {"pairs": 0}),
    "unaligned": (90, {"offset": 1}),
    "few-tokens-d64": (80, {"tokens": 16, "head_dim": 64}),
    "few-tokens-d256": (90, {"tokens": 8, "head_dim": 256}),
    "few-tokens-fp32": (80, {"tokens": 4, "dtype": FP32}),
    "few-tokens-small-gpu": (120, {"tokens": 16}),
    "chunk-small-gpu": (120, {"tokens": 4096}),
    "few-tokens-options": (90, {"tokens": 3, **OPTIONS}),
    "chunk-fp16": (80, {"tokens": 4096, "dtype": FP16}),
    "chunk-d80": (90, {"tokens": 4096, "head_dim": 80}),
    "chunk-options": (90, {"tokens": 4096, **OPTIONS}),
    "chunk-interleaved": (80, {"tokens": 4096, "interleaved": True}),
    "chunk-no-rotation": (90, {"tokens": 4096, "pairs": 0}),
    "chunk-unaligned": (80, {"tokens": 4096, "offset": 1}),
}
VARIANTS = {(name, capability): call for name, call in CONFIGS.items() for capability in CAPABILITIES}
VARIANTS |= {(name, capability): call for name, (capability, call) in FEATURES.items()}


@pytest.fixture(scope="module")
def compiled():
    """Futures of all compilations, which go on beside the tests; the interpreter is off where they run."""
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, TRITON_INTERPRET="0"):
        futures = {variant: pool.submit(compile_call, variant[1], call) for variant, call in VARIANTS.items()}
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("name", "capability"), VARIANTS, ids=lambda x: f"sm_{x}" if isinstance(x, int) else x)
def test_compiles_without_spills_in_loops(name, capability, compiled):
    kernels = compiled[name, capability].result()
    assert list(kernels) == (["rotate_kernel", "chunk_kernel"] if name.startswith("chunk") else ["decode_kernel"])
    for kernel, used in kernels.items():
        print(kernel, used)
        assert used.registers <= 255
        assert used.shared <= SHARED_BYTES[capability], kernel
        if kernel != "rotate_kernel":
            assert used.loops
        assert [spills for _, spills, _ in used.loops if spills] == []
