"""The operators of a variant with the library of the package, which are in the namespace of the package.

In a build of kernel-builder, a file that it writes takes the place of this one.
"""

from pathlib import Path

import torch

_library = Path(__file__).with_name("_sinkattn.abi3.so").resolve()
if hasattr(torch.ops.sinkattn, "append_") and str(_library) not in torch.ops.loaded_libraries:
    raise ImportError(
        "sinkattn: torch.ops.sinkattn is taken already, by the package sinkattn or by another copy of this kernel; a "
        "process can load one of them, unless the kernel was built with kernel-builder"
    )
torch.ops.load_library(_library)
ops = torch.ops.sinkattn


def add_op_namespace_prefix(op_name: str) -> str:
    """Name of an operator with its namespace."""
    return f"sinkattn::{op_name}"
