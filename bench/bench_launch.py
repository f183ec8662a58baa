"""Host time of a layer's attention in a decode step on a GPU, measured without one.

    python -m pytest bench/bench_launch.py

Until a step is replayed from a graph, or where it cannot be, each layer costs the host its checks and its launch. Here
everything runs as for CUDA tensors, but on CPU tensors, and up to the point where Triton's launcher would call the
driver; compiled for compute capability 9.0.

* ``sinkattn``: the operator: rotates, appends and attends.
* ``sdpa``: PyTorch's attention of one token over one token, which is nearly all host time, in its place.

PyTorch's dispatcher, which would add some microseconds to the operator on a GPU, is not in it.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_attention import HEAD_DIM, HEADS, KV_HEADS, NUM_SINKS, SCALE

import sinkattn
from sinkattn import ops
from sinkattn.ops import attention, backends

triton = pytest.importorskip("triton")

WINDOW, STEPS, ROUNDS = 4092, 200, 30
MAX_MICROSECONDS = 15


class NoDevice:
    """A Triton driver of a GPU that is not there: everything but the call of the driver."""

    utils = SimpleNamespace(
        load_binary=lambda *args: (object(), 0, 0, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: object, metadata: object) -> object:
        return lambda *args: None


@pytest.fixture
def no_device(monkeypatch) -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("the kernels were imported for Triton's interpreter")
    for module in (attention, backends):
        monkeypatch.setattr(module, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())


def test_host_time(bench, no_device) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ring = sinkattn.RingKVCache(1, KV_HEADS, HEAD_DIM, NUM_SINKS, WINDOW, dtype=torch.bfloat16)
    query, key, value = (
        torch.randn(1, 1, heads, HEAD_DIM, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    rope = sinkattn.Rope(5e5 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    tables = rope.stream_tables(ring.seen, 1, num_sinks=NUM_SINKS, window=WINDOW)
    options = {"num_sinks": NUM_SINKS, "window": WINDOW, "scale": SCALE, "arrivals": ring.arrivals}

    def launch() -> None:
        for _ in range(STEPS):
            ops.sink_attention_(
                ring.keys, ring.values, query, key, value, ring.seen, *tables, **options, backend="triton"
            )

    def sdpa() -> None:
        for _ in range(STEPS):
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    launch()
    methods = {"sinkattn": lambda: launch, "sdpa": lambda: sdpa}
    timings = bench.time_interleaved(methods, ROUNDS, {"sinkattn": STEPS, "sdpa": STEPS})
    ours, other = (1e3 * timings.ms(name) for name in ("sinkattn", "sdpa"))
    shape = "one layer, one token"
    bench.add_row("Host time in microseconds", shape, {"sinkattn us": ours, "sdpa us": other, "more us": ours - other})
    bench.add_target(
        f"host time: at most {MAX_MICROSECONDS} us more than sdpa",
        shape,
        ours - other,
        ours - other <= MAX_MICROSECONDS,
    )
