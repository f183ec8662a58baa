"""A process without the package sinkattn, which runs the kernel that was assembled; and what its test runs, too."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

LAYOUT = {"num_sinks": 2, "window": 6, "headroom": 2}
CALLS = (3, 1, 7, 1, 1, 9)
NUM_TOKENS = sum(CALLS)


def load_by_hand(variant: Path):
    """What `kernels` does with the variant that it has chosen."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_by_kernels(variant: Path):
    from kernels import get_local_kernel

    return get_local_kernel(variant.parents[1])


def results(sinkattn, attend, inputs, inv_freq):
    """A stream in several calls with a rollback, what its ring holds, and the gradients of a call."""
    rope = sinkattn.Rope(inv_freq)
    ring = sinkattn.RingKVCache(2, 2, 16, **LAYOUT)
    outs, done = [], 0
    for count in CALLS:
        outs.append(attend(*(x[:, :, done : done + count] for x in inputs), ring, rope=rope))
        done += count
    ring.rollback(1)
    outs.append(attend(*(x[:, :, -1:] for x in inputs), ring, rope=rope))
    leaves = [x.clone().requires_grad_() for x in inputs]
    attend(*leaves, sinkattn.RingKVCache(2, 2, 16, **LAYOUT), rope=rope).square().sum().backward()
    return [*outs, *ring.linearise(), *(x.grad for x in leaves)]


def main(loader: str, variant: str, file: str) -> None:
    """Run the kernel on the inputs of a file, which gets the results; then try to import the package beside it."""
    inputs = torch.load(file)
    sys.modules["sinkattn"] = None  # an import is an error
    kernel = {"by_hand": load_by_hand, "by_kernels": load_by_kernels}[loader](Path(variant))
    torch.save(results(kernel, kernel.sink_attention, *inputs), file)
    if importlib.util.find_spec("triton"):
        importlib.import_module(f"{kernel.__name__}.kernels.gradients")  # and with it the others
    del sys.modules["sinkattn"]
    try:
        import sinkattn.ops  # noqa: F401
    except ImportError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
