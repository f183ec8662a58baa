"""Which backend runs a call: the C++ kernel, Triton, or plain PyTorch."""

from __future__ import annotations

import functools
import os
import warnings
from importlib.util import find_spec
from typing import Literal

import torch

from sinkattn.ops.library import build_info

Backend = Literal["auto", "cpu", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "cpu", "triton", "reference")


def select_backend(
    device: torch.device, requested: Backend = "auto", dtype: torch.dtype | None = None
) -> Literal["cpu", "triton", "reference"]:
    """Backend that will run on ``device``; the environment variable SINKATTN_BACKEND overrides ``requested``.

    "auto" is the C++ kernel on CPU tensors and Triton on CUDA tensors. Where Triton cannot run, it falls back to plain
    PyTorch with a warning that says why; inside ``torch.compile`` that is an error instead. For a ``dtype`` of float64,
    which the Triton kernels do not support, "auto" is plain PyTorch too.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that cannot run there, saying why.
    """
    override = os.environ.get("SINKATTN_BACKEND")
    source, wanted = ("SINKATTN_BACKEND", override) if override else ("backend", requested)
    if wanted not in BACKENDS:
        raise ValueError(f"{source}: expected one of {BACKENDS}, got {wanted!r}")
    # Dynamo cannot trace the checks of `triton_obstacle`; the operator repeats them when it runs.
    traced = torch.compiler.is_dynamo_compiling()
    if wanted == "auto":
        if device.type == "cpu":
            return "cpu"
        if device.type != "cuda" or dtype == torch.float64:
            return "reference"
        if not traced and (obstacle := triton_obstacle(device)):
            warnings.warn(f"sinkattn: plain PyTorch runs on {device}, slowly: {obstacle}", RuntimeWarning, stacklevel=2)
            return "reference"
        return "triton"
    if wanted == "cpu" and device.type != "cpu":
        raise RuntimeError(f"{source}: 'cpu' runs on CPU tensors, got tensors on {device}")
    if wanted == "triton" and not traced and (obstacle := triton_obstacle(device)):
        raise RuntimeError(f"{source}: 'triton' cannot run: {obstacle}")
    return wanted


@functools.cache
def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "it needs CUDA tensors, or TRITON_INTERPRET=1 set for CPU tensors"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs CUDA tensors, got tensors on {device}"
    if not build_info()["cuda"]:
        return "sinkattn was built without CUDA; build it where nvcc is, with SINKATTN_CUDA=1"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or later, {device} has {major}.{minor}"
    return None


def cpu_capability() -> str:
    """Instruction set that the CPU kernel uses: amx, avx512, avx2, or default (SSE2 or NEON).

    The best that the processor has; the environment variable ATEN_CPU_CAPABILITY, which limits torch, limits it too.
    """
    return torch.ops.sinkattn.cpu_capability()
