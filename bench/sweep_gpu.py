"""Tries launch configurations of the Triton kernels on a GPU; sinkattn/kernels/configs.py has those that won.

    python bench/sweep_gpu.py                  # four minutes; into bench/results/DEVICE-DATE-sweep.json
    python bench/sweep_gpu.py --minutes 10
    TRITON_INTERPRET=1 python bench/sweep_gpu.py --rehearse   # two configurations of a tiny shape, on the CPU

Every shape gets an equal part of the time and tries its configurations in a fixed random order, after the one that is
chosen for it now. Each is captured in a CUDA graph over several layers' caches, together several times as large as the
L2 cache, and must give what the chosen one gives. A configuration that does not compile or fit is left out.
"""

import argparse
import datetime
import json
import random
import re
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu import RepeatedLaunch, first_line, relative_error
from gpu_attention_methods import num_layers_beyond_l2

import sinkattn
from sinkattn.evaluate.environment import machine, versions
from sinkattn.kernels import attention
from sinkattn.kernels.configs import Config, block_size

RESULTS = Path(__file__).parent / "results"
NUM_SINKS, DTYPE = 4, torch.bfloat16
MAX_ERROR = 2e-2
REPEATS = 5


@dataclass(frozen=True)
class Shape:
    """Sizes of a call on a full window; ``tokens`` is 1 for decoding."""

    batch: int
    window: int
    tokens: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    cache_dtype: str | None = None


SHAPES = [
    Shape(1, 4096),
    Shape(8, 4096),
    Shape(1, 1024),
    Shape(8, 1024),
    Shape(64, 1024),
    Shape(64, 4096),
    Shape(1, 16384),
    Shape(1, 4096, kv_heads=32),
    Shape(1, 4096, head_dim=64),
    Shape(1, 4096, head_dim=256),
    Shape(1, 4096, cache_dtype="int8"),
    Shape(64, 4096, cache_dtype="int8"),
    Shape(64, 4096, cache_dtype="fp8"),
    Shape(1, 4096, tokens=64),
    Shape(1, 4096, tokens=512),
    Shape(1, 4096, tokens=4096),
]
TINY = [Shape(1, 40, heads=4, kv_heads=2, head_dim=16), Shape(1, 40, tokens=20, heads=4, kv_heads=2, head_dim=16)]
TINY.append(replace(TINY[0], cache_dtype="int8"))


class Layers:
    """A call on each of several layers' caches."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        itemsize = 1 if shape.cache_dtype else DTYPE.itemsize
        layer_bytes = 2 * shape.batch * shape.kv_heads * shape.window * shape.head_dim * itemsize
        self.rings = [self._ring(shape, device) for _ in range(num_layers_beyond_l2(device, layer_bytes))]
        new = [(shape.heads, shape.tokens), (shape.kv_heads, shape.tokens), (shape.kv_heads, shape.tokens)]
        self.new = [torch.randn(shape.batch, *size, shape.head_dim, dtype=DTYPE, device=device) for size in new]
        rope = sinkattn.Rope(5e5 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim))
        self.tables = rope.stream_tables(self.rings[0].seen, shape.tokens, num_sinks=NUM_SINKS, window=shape.window)
        self.options = {"num_sinks": NUM_SINKS, "window": shape.window, "scale": shape.head_dim**-0.5}

    @staticmethod
    def _ring(shape: Shape, device: torch.device) -> sinkattn.RingKVCache:
        # Headroom, so that a chunk overwrites nothing that it sees when it comes again.
        headroom = 0 if shape.tokens == 1 else shape.tokens
        sizes = (shape.batch, shape.kv_heads, shape.head_dim, NUM_SINKS, shape.window, headroom)
        ring = sinkattn.RingKVCache(*sizes, dtype=DTYPE, device=device, cache_dtype=shape.cache_dtype)
        for name, x in ring.tensors.items():
            if "scales" in name:
                x.fill_(1 / 40)
            else:
                x.copy_((torch.randn(x.shape, device=device) * (40 if x.itemsize == 1 else 1)).clamp(-127, 127))
        ring.seen.fill_(NUM_SINKS + 2 * shape.window)
        return ring

    def call(self, ring: sinkattn.RingKVCache) -> torch.Tensor:
        """One layer; the counters stay, so every call writes the same tokens to the same slots."""
        return sinkattn.ops.sink_attention_(
            ring.keys, ring.values, *self.new, ring.seen, *self.tables, **self.options,
            arrivals=ring.arrivals, backend="triton", **ring.eight_bit,
        )  # fmt: skip

    def run(self) -> None:
        for ring in self.rings:
            self.call(ring)


@dataclass(frozen=True)
class Candidate:
    """A configuration; ``splits`` of the keys, in decoding without the program for sinks and new tokens."""

    config: Config
    splits: int


def candidates(shape: Shape, num_sms: int) -> list[Candidate]:
    """All configurations to try, in a fixed random order."""
    rows = shape.heads // shape.kv_heads * shape.tokens
    if shape.tokens > 1:
        blocks = [(m, n) for m in (64, 128) for n in (32, 64, 128)]
        configs = [Config(m, n, warps, stages) for m, n in blocks for warps in (4, 8) for stages in (2, 3, 4)]
        # With many queries there are enough programs.
        found = [Candidate(config, splits) for config in configs for splits in ((1, 2, 4, 8) if rows <= 512 else (1,))]
    else:
        configs = [
            Config(block_size(rows), n, warps, stages)
            for n in (32, 64, 128)
            for warps in (2, 4, 8)
            for stages in (2, 3, 4)
        ]
        kv_rows = shape.batch * shape.kv_heads
        per_sm = {max(1, round(x * num_sms / kv_rows) - 1) for x in (0.5, 0.75, 1, 1.5, 2, 3, 4)}
        found = [Candidate(config, splits) for config in configs for splits in sorted(per_sm)]
    random.Random(0).shuffle(found)
    return found


def chosen(candidate: Candidate | None) -> Any:
    """A context in which launches use a candidate; None for those of sinkattn."""
    attention.decode_launch.cache_clear()
    attention.chunk_launch.cache_clear()
    if candidate is None:
        return nullcontext()
    parts = 1 if candidate.splits == 1 else candidate.splits + 1
    return patch.multiple(
        attention,
        decode_config=lambda *args: candidate.config,
        chunk_config=lambda *args: candidate.config,
        num_kv_splits=lambda *args: parts,
        SPLIT_CHUNKS=True,
        num_chunk_splits=lambda *args: candidate.splits,
    )


def microseconds(layers: Layers, device: torch.device) -> float:
    """Median time of a layer."""
    timed = RepeatedLaunch(layers.run, device, len(layers.rings))
    if timed.capture_error:
        raise RuntimeError(timed.capture_error)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        timed.run()
        seconds.append((time.perf_counter() - start) / timed.steps)
    return 1e6 * statistics.median(seconds)


def sweep(shape: Shape, device: torch.device, until: float, most: int | None) -> dict[str, Any]:
    """Times of the candidates of a shape, best first, until a time."""
    layers = Layers(shape, device)
    with chosen(None):
        want, default = layers.call(layers.rings[0]).clone(), microseconds(layers, device)
    results, failed, left = [], [], candidates(shape, attention.get_target(device).num_sms)[:most]
    while left and time.time() < until:
        candidate = left.pop(0)
        try:
            with chosen(candidate):
                error = relative_error(layers.call(layers.rings[0]), want)
                if error > MAX_ERROR:
                    raise RuntimeError(f"differs by {error:.1e}")
                results.append([round(microseconds(layers, device), 2), *candidate.config, candidate.splits])
        except Exception as error:
            failed.append([*candidate.config, candidate.splits, first_line(error)])
    results.sort(key=lambda row: row[0])
    return {**asdict(shape), "default": round(default, 2), "results": results, "failed": failed, "untried": len(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description="try launch configurations of the Triton kernels")
    parser.add_argument("--minutes", type=float, default=4, help="time for all shapes (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/DEVICE-DATE-sweep.json")
    parser.add_argument("--rehearse", action="store_true", help="two configurations of tiny shapes, on the CPU")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("sweep: torch sees no CUDA device here")
    device = torch.device("cpu" if args.rehearse else "cuda")
    name = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    out = args.json or RESULTS / f"{slug}-{datetime.date.today()}-sweep.json"
    begin, shapes, report = time.time(), TINY if args.rehearse else SHAPES, []
    for index, shape in enumerate(shapes):
        until = begin + 60 * args.minutes * (index + 1) / len(shapes)
        report.append(sweep(shape, device, until, 2 if args.rehearse else None))
        best = report[-1]["results"][:1]
        print(f"{shape}: chosen {report[-1]['default']} us, best of those tried {best}", flush=True)
        out.write_text(
            json.dumps(
                {
                    "columns": ["us", "block_m", "block_n", "warps", "stages", "splits"],
                    "machine": {**machine(), **versions()},
                    "shapes": report,
                }
            )
            + "\n"
        )
    print(f"sweep: {out}")


if __name__ == "__main__":
    main()
