"""What the package has in a pybind11 module, which a kernel must not have: the sizes of a ring, and a build's facts."""

from dataclasses import dataclass

import torch

from .._ops import add_op_namespace_prefix


@dataclass(frozen=True)
class RingLayout:
    """Number of slots of a cache: sinks, and a ring for window and headroom."""

    num_sinks: int
    window: int
    headroom: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_sinks", 0), ("window", 1), ("headroom", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")

    @property
    def ring(self) -> int:
        """Slots of the ring: window + headroom."""
        return self.window + self.headroom

    @property
    def slots(self) -> int:
        """Slots of the cache: num_sinks + ring."""
        return self.num_sinks + self.ring


def advise_huge_pages(address: int, bytes: int) -> None:
    """Leaves the pages of memory as they are."""


def build_info() -> dict[str, object]:
    """Whether this build has the CUDA part."""
    operator = add_op_namespace_prefix("append_")
    return {"cuda": torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")}
