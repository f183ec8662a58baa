"""Ahead-of-time compilation of the kernels, without a GPU, and the resources that the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sinkattn.attention_arguments import EightBit
from sinkattn.kernels import attention, gradients
from sinkattn.kernels.attention import CallShape, Launch, launches
from sinkattn.kernels.configs import Target

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SPILL = re.compile(r"\b(LDL|STL)\b")


class AbsentDriver:
    """The part of a Triton driver that compilation needs: the target GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel: registers and stack bytes per thread, shared memory bytes, spill instructions.

    loops: for each loop in order, the number of instructions, spill instructions and matrix instructions.
    """

    registers: int
    stack: int
    shared: int
    spills: int
    loops: tuple[tuple[int, int, int], ...]


def compile_for(launch: Launch, tensors: dict[str, torch.Tensor | None], capability: int) -> Any:
    """Compile the kernel of a launch with the same specialisation of arguments as a real launch."""
    with patch.object(driver, "_active", AbsentDriver(capability)):
        kernel = launch.run(tensors, warmup=True)
        return kernel.result() if hasattr(kernel, "result") else kernel


def resources(kernel: Any, cubin: Path) -> Resources:
    """Resources of a compiled kernel, whose binary is written to ``cubin``."""
    cubin.write_bytes(kernel.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "-res-usage", cubin))
    blocks = list(_blocks(_run("nvdisasm", "-c", cubin)))
    loops = []
    for members in _natural_loops(blocks):
        lines = [line for i in members for line in blocks[i].lines]
        loops.append((len(lines), sum(map(_is_spill, lines)), sum("MMA" in line for line in lines)))
    spills = sum(_is_spill(line) for block in blocks for line in block.lines)
    return Resources(int(usage[1]), int(usage[2]), kernel.metadata.shared, spills, tuple(loops))


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _is_spill(line: str) -> bool:
    return SPILL.search(line) is not None


@dataclass
class Block:
    """A basic block: its instructions, and the indices of the blocks that may follow."""

    label: str | None
    lines: list[str]
    following: list[int]


def _blocks(text: str) -> Iterator[Block]:
    found = [Block(None, [], [])]
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            found.append(Block(label[1], [], []))
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            found[-1].lines.append(line)
            if re.search(r"\b(BRA|EXIT|RET|BREAK)\b", line):
                found.append(Block(None, [], []))
    number = {block.label: i for i, block in enumerate(found) if block.label}
    for i, block in enumerate(found):
        last = block.lines[-1] if block.lines else ""
        if target := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", last):
            block.following.append(number[target[1]])
        leaves = re.search(r"\b(BRA|EXIT|RET)\b", last) and not re.search(r"@!?U?P\d|BRA\.\w+ !?U?P|BRA U?!?U?P", last)
        if not leaves and i + 1 < len(found):
            block.following.append(i + 1)
    return iter(found)


def _natural_loops(blocks: list[Block]) -> Iterator[set[int]]:
    """Blocks of each natural loop, found by its back edge: the target of the edge dominates its source."""
    reached, waiting = set(), [0]
    while waiting:
        if (i := waiting.pop()) not in reached:
            reached.add(i)
            waiting += blocks[i].following
    before = {i: [j for j in reached if i in blocks[j].following] for i in reached}
    dominators = {i: reached if i else {0} for i in reached}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = {i} | set.intersection(*(dominators[j] for j in before[i]))
            changed |= new != dominators[i]
            dominators[i] = new
    for i in sorted(reached):
        for head in blocks[i].following:
            if head in dominators[i]:
                members, waiting = {head}, [i]
                while waiting:
                    if (j := waiting.pop()) not in members:
                        members.add(j)
                        waiting += before[j]
                yield members


def launches_for(capability: int, call: dict[str, Any]) -> list[tuple[Launch, dict[str, torch.Tensor | None]]]:
    """Launches, with meta tensors, of a call of these sizes on a GPU with 132 multiprocessors."""
    batch, tokens, dtype = call.get("batch", 1), call.get("tokens", 1), call.get("dtype", torch.bfloat16)
    heads, kv_heads = call.get("heads", 8), call.get("kv_heads", 2)
    head_dim, slots, offset = call.get("head_dim", 128), call.get("slots", 4100), call.get("offset", 0)
    pairs = call.get("pairs", head_dim // 2)

    def tensor(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def new(heads: int, offset: int = offset) -> torch.Tensor:
        # With an offset, neither the pointer nor the strides are multiples of 16 bytes.
        memory = tensor(batch, tokens, heads * head_dim + offset)[..., offset:]
        return memory.unflatten(2, (heads, head_dim)).transpose(1, 2)

    def per_head(name: str) -> torch.Tensor | None:
        return tensor(heads, dtype=torch.float32) if call.get(name) else None

    query, key, seen = new(heads), new(kv_heads), tensor(batch, dtype=torch.int64)
    value = new(kv_heads, offset if tokens == 1 else 0)  # unaligned values are copied if there are several
    tables = tensor(2, batch, tokens, pairs, dtype=torch.float32) if pairs else seen
    given = {"query": query, "key": key, "value": value, "seen": seen, "cos": tables, "sin": tables}
    cache_dtype = call.get("cache_dtype")
    given |= dict.fromkeys(EightBit._fields)
    if cache_dtype is None:
        given |= {name: tensor(batch, kv_heads, slots, head_dim) for name in ("keys", "values")}
    else:
        cache = tensor(batch, kv_heads, slots - 4, head_dim, dtype=cache_dtype)
        scales = tensor(batch, kv_heads, slots - 4, 1, dtype=torch.float32)
        given |= {"keys": cache, "values": cache, "key_scales": scales, "value_scales": scales}
        given |= {name: tensor(batch, kv_heads, 4, head_dim) for name in ("sink_keys", "sink_values")}
    given |= {name: per_head(name) for name in ("sink_logits", "alibi_slopes")}
    given |= {"lengths": seen if call.get("ragged") else None, "out": tensor(batch, tokens, heads, head_dim)}
    given |= {name: seen if call.get("rows") else None for name in ("rows", "row_sinks", "begins")}
    layout = (slots, 4, slots - 4, pairs, call.get("interleaved", False), 0.1, call.get("softcap"))
    strides = (query.stride(), key.stride(), value.stride())
    sizes = (batch, heads, kv_heads, tokens, head_dim, head_dim)
    cache_rows = 64 if call.get("rows") else None
    shape = CallShape(Target(capability, 132), dtype, *sizes, *layout, *strides, cache_rows, cache_dtype)
    with patch.object(attention, "SPLIT_CHUNKS", call.get("split", False)):
        return list(launches(shape, given, None))


def backward_launches_for(capability: int, call: dict[str, Any]) -> list[tuple[Launch, dict[str, torch.Tensor | None]]]:
    """Launches, with meta tensors, of the gradients of a call of 512 tokens on a full window."""
    dtype, head_dim = call.get("dtype", torch.bfloat16), call.get("head_dim", 128)
    kv_heads, group, tokens, num_sinks, window = 2, 4, 512, 4, 1020

    def tensor(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def per_head(name: str) -> torch.Tensor | None:
        return tensor(kv_heads * group, dtype=torch.float32) if call.get(name) else None

    rows, keys = (1, kv_heads, tokens * group), (1, kv_heads, num_sinks + window + tokens, head_dim)
    vectors, sums = (*rows, head_dim), tensor(*rows, dtype=torch.float32)
    seen = tensor(1, dtype=torch.int64)
    inputs = gradients.GradientInputs(
        tensor(*vectors), tensor(*vectors), tensor(*keys), tensor(*keys), tensor(*vectors), sums, seen,
        seen if call.get("ragged") else None, per_head("sink_logits"), per_head("alibi_slopes"), tokens, num_sinks,
        window, 0.1, call.get("softcap"),
    )  # fmt: skip
    found = [
        tensor(1, kv_heads, count, head_dim, dtype=torch.float32) for count in (tokens * group,) * 2 + (tokens,) * 2
    ]
    with patch.object(gradients, "get_target", lambda device: Target(capability, 132)):
        return gradients.launches(inputs, gradients.Gradients(*found, sums))


def compile_call(capability: int, call: dict[str, Any]) -> dict[str, Resources]:
    """Compile all kernels that a call launches, and return the resources of each."""
    found = backward_launches_for if call.get("backward") else launches_for
    with tempfile.TemporaryDirectory() as folder:
        return {
            launch.kernel.__name__: resources(compile_for(launch, tensors, capability), Path(folder) / "cubin")
            for launch, tensors in found(capability, call)
        }
