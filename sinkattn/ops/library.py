"""The compiled part: ``_C`` (pybind11, the slot arithmetic) and ``_ops`` (the operators, registered when it loads)."""

from pathlib import Path

import torch

try:
    from sinkattn._C import RingLayout, advise_huge_pages, build_info
except ImportError as error:
    raise ImportError(
        "sinkattn: the compiled part is missing; build it with: pip install --no-build-isolation -e . "
        "(or: python setup.py build_ext --inplace)"
    ) from error
_library = (Path(__file__).parents[1] / "_ops.abi3.so").resolve()
if hasattr(torch.ops.sinkattn, "append_") and str(_library) not in torch.ops.loaded_libraries:
    raise ImportError(
        "sinkattn: torch.ops.sinkattn is taken already, by a kernel that hub/assemble.py has made of the package or by "
        "another copy of the package; a process can load one of them"
    )
torch.ops.load_library(_library)

__all__ = ["RingLayout", "advise_huge_pages", "build_info"]
