"""The compiled part: ``_C`` (pybind11, the slot arithmetic) and ``_ops`` (the operators, registered when it loads)."""

from pathlib import Path

import torch

try:
    from sinkattn._C import RingLayout, build_info
except ImportError as error:
    raise ImportError(
        "sinkattn: the compiled part is missing; build it with: pip install --no-build-isolation -e . "
        "(or: python setup.py build_ext --inplace)"
    ) from error
torch.ops.load_library(Path(__file__).parents[1] / "_ops.abi3.so")

__all__ = ["RingLayout", "build_info"]
