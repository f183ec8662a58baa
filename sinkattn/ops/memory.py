"""Memory of rings."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkattn.ops.library import advise_huge_pages

MIN_BYTES = 4 << 20
"""Of a tensor in huge pages: two of them."""


def zeros(*size: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Like `torch.zeros`; large tensors in CPU memory are in huge pages where Linux gives them on demand.

    A decode step reads all of a ring. In pages of 4 KiB the processor looks up a page for every 64 cache lines.
    """
    if torch.compiler.is_compiling():
        return torch.zeros(size, dtype=dtype, device=device)
    x = torch.empty(size, dtype=dtype, device=device)
    if type(x) is Tensor and x.is_cpu and x.nbytes >= MIN_BYTES:  # a fake tensor has no address
        advise_huge_pages(x.data_ptr(), x.nbytes)
    return x.zero_()
