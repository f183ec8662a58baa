"""Launches: which kernel a call runs, with which grid, block sizes and arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sinkattn.attention_arguments import AttentionArguments, EightBit
from sinkattn.kernels.chunk import chunk_kernel, combine_kernel, quantise_kernel, rotate_kernel
from sinkattn.kernels.configs import (
    Config,
    Target,
    block_size,
    chunk_config,
    decode_config,
    fits_decode,
    num_chunk_splits,
    num_kv_splits,
)
from sinkattn.kernels.decode import decode_kernel
from sinkattn.kernels.primitives import LOG2_E

# Calls of more than one token go to the decode kernel up to this many tokens, and queries per KV head.
MAX_DECODE_TOKENS = 16
MAX_DECODE_ROWS = 64
# Whether the keys of chunks of few queries are split over programs. This has not run on a GPU: `make gpu` checks it,
# times it beside what runs by default, and says which is faster.
SPLIT_CHUNKS = False


@functools.cache
def get_target(device: torch.device) -> Target:
    """Target of a device. On the CPU, for the interpreter, one with few enough SMs that tests see split windows too."""
    if device.type != "cuda":
        return Target(90, 64)
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


class CallShape(NamedTuple):
    """What decides how a call is launched: sizes, strides, dtype and options. Equal shapes share one `Launch`."""

    target: Target
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    value_dim: int
    slots: int
    num_sinks: int
    window: int
    pairs: int
    interleaved: bool
    scale: float
    softcap: float | None
    query_strides: tuple[int, ...]
    key_strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    cache_rows: int | None = None
    """Rows of the cache, in calls that name the rows that they use."""
    cache_dtype: torch.dtype | None = None
    """Dtype of a ring of 8 bits."""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def num_kv_rows(self) -> int:
        """Batch size times KV heads: the independent rows of the cache."""
        return self.batch * self.kv_heads

    @property
    def block_dim(self) -> int:
        """The larger of the block sizes of key and value dimensions."""
        return block_size(max(self.head_dim, self.value_dim))

    @property
    def hadamard_block(self) -> int:
        """Block of the transform of keys in a ring of 8 bits (`sinkattn.reference.hadamard_block`); 1 for none."""
        return 1 if self.cache_dtype is None else self.head_dim & -self.head_dim

    @property
    def uses_decode_kernel(self) -> bool:
        """Whether the decode kernel runs this call: one token, or a few whose queries fit into one tile."""
        rows = self.group * self.tokens
        if self.tokens > self.window or not fits_decode(rows, self.block_dim, self.dtype):
            return False
        return self.tokens == 1 or (self.tokens <= MAX_DECODE_TOKENS and rows <= MAX_DECODE_ROWS)


class Launch:
    """A kernel, its grid, and all arguments that are not tensors.

    Triton finds the compiled kernel of a call by all of its arguments, which takes longer than launching it. Here all
    but the tensors are fixed, so it is found by what Triton tells apart in those: device, alignment and None.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: dict[str, Any]) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.tensor_names = [name for name in kernel.arg_names if name not in numbers]
        # In the order of the kernel, all tensors come first.
        self._last_arguments = [numbers[name] for name in kernel.arg_names[len(self.tensor_names) :]]
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def run(self, tensors: dict[str, Tensor | None], *, warmup: bool = False) -> Any:
        """Launch on the current CUDA stream; with ``warmup`` only compile."""
        given = [tensors[name] for name in self.tensor_names]
        variant = tuple([None if x is None else (x.data_ptr() % 16 == 0, x.get_device()) for x in given])
        launch = self._compiled.get(variant)
        if launch is not None:
            return launch(*given, *self._last_arguments)
        compiled = self.kernel.run(grid=self.grid, warmup=warmup, **tensors, **self.numbers)
        if compiled is not None and not warmup:  # the interpreter compiles nothing
            self._compiled[variant] = compiled[(*self.grid, 1, 1)[:3]]
        return compiled


def attend(call: AttentionArguments, shape: CallShape) -> tuple[Tensor, bool]:
    """Output ``[batch, tokens, heads, value_dim]``, and whether the kernel appended the new tokens too.

    The arguments have been checked; ``shape`` is their `call_shape`.
    """
    query, key, value = map(_with_dense_vectors, (call.query, call.key, call.value))
    tokens = shape.tokens
    if tokens > 1 and not _is_aligned(value):
        value = value.contiguous()  # cheaper than narrow loads in every block of queries
        shape = shape._replace(value_strides=value.stride())
    # Heads inside tokens, the order in which models join heads, so that joining copies nothing.
    out = query.new_empty(shape.batch, tokens, shape.heads, shape.value_dim)
    if not out.numel():
        return out, True
    given: dict[str, Tensor | None] = {"query": query, "key": key, "value": value, "out": out}
    names = ("keys", "values", "seen", "lengths", "rows", "row_sinks", "begins", "sink_logits", "alibi_slopes")
    given |= {name: getattr(call, name) for name in names + EightBit._fields}
    # A kernel without pairs never reads the tables, so any pointer will do.
    given["cos"] = call.seen if call.cos is None else call.cos.contiguous()
    given["sin"] = call.seen if call.sin is None else call.sin.contiguous()
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device_of(call.keys):
        for launch, tensors in launches(shape, given, call.arrivals):
            launch.run(tensors)
    return out, tokens == 1 and launch.kernel is decode_kernel


def call_shape(call: AttentionArguments) -> CallShape:
    """Shape of a call; that of another call with the same shapes, strides, dtypes, devices and options is the same."""
    query, key, value = map(_with_dense_vectors, (call.query, call.key, call.value))
    batch, heads, tokens, head_dim = query.shape
    _, kv_heads, slots, value_dim = call.values.shape
    return CallShape(
        get_target(call.keys.device),
        call.dtype,
        batch,
        heads,
        kv_heads,
        tokens,
        head_dim,
        value_dim,
        slots if call.sink_keys is None else call.num_sinks + slots,
        call.num_sinks,
        call.window,
        0 if call.cos is None else call.cos.shape[3],
        call.interleaved,
        call.scale,
        call.softcap,
        query.stride(),
        key.stride(),
        value.stride(),
        None if call.rows is None else len(call.keys),
        None if call.sink_keys is None else call.keys.dtype,
    )


def _with_dense_vectors(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def launches(
    shape: CallShape, given: dict[str, Tensor | None], arrivals: Tensor | None
) -> Iterator[tuple[Launch, dict[str, Tensor | None]]]:
    """Launches of a call and the tensors of each: those ``given``, and newly allocated intermediates."""
    query, seen = given["query"], given["seen"]
    assert query is not None
    assert seen is not None
    fresh = query.new_empty
    if shape.uses_decode_kernel:
        launch = decode_launch(shape)
        num_kv_rows, num_splits = launch.grid
        rows = shape.group * shape.tokens if num_splits > 1 else 0
        partials = fresh(num_kv_rows * num_splits * rows * (shape.value_dim + 2), dtype=torch.float32)
        if arrivals is None:
            arrivals = seen.new_zeros(num_kv_rows, dtype=torch.int32)
        yield launch, {**given, "partials": partials, "arrivals": arrivals}
        return
    vectors, stored = (shape.batch, shape.kv_heads, shape.tokens), shape.cache_dtype or shape.dtype
    rest = {**given, "rotated": fresh(*vectors, shape.head_dim, dtype=stored), "partials": None}
    rest |= dict.fromkeys(("new_key_scales", "new_value_scales"))
    if shape.cache_dtype is None:
        yield _with_tensors(rotate_launch(shape), rest)
    else:
        rest |= {name: fresh(vectors, dtype=torch.float32) for name in ("new_key_scales", "new_value_scales")}
        new_values = fresh(*vectors, shape.value_dim, dtype=stored)
        yield _with_tensors(quantise_launch(shape), rest | {"new_values": new_values})
        rest["value"] = new_values
        shape = shape._replace(value_strides=new_values.stride())
    launch = chunk_launch(shape, SPLIT_CHUNKS)
    if (splits := launch.grid[1]) == 1:
        yield _with_tensors(launch, rest)
        return
    rows = splits * shape.num_kv_rows * shape.tokens * shape.group
    rest["partials"] = fresh(rows * (shape.value_dim + 2), dtype=torch.float32)
    yield _with_tensors(launch, rest)
    yield _with_tensors(combine_launch(shape, splits), rest)


def _with_tensors(launch: Launch, tensors: dict[str, Tensor | None]) -> tuple[Launch, dict[str, Tensor | None]]:
    return launch, {name: tensors[name] for name in launch.tensor_names}


@functools.lru_cache(maxsize=256)
def decode_launch(shape: CallShape) -> Launch:
    """Launch of the decode kernel."""
    rows, eight_bit = shape.group * shape.tokens, shape.cache_dtype is not None
    config = decode_config(rows, shape.block_dim, shape.dtype, shape.target, shape.num_kv_rows, eight_bit)
    num_splits = num_kv_splits(shape.num_kv_rows, shape.slots - shape.num_sinks, config, shape.target.num_sms)
    block_rows = triton.next_power_of_2(rows)
    numbers = {
        **_attention_numbers(shape, config),
        **_strides("key", shape.key_strides),
        "APPEND": shape.tokens == 1,
        "BLOCK_NEW": 16,
        "BLOCK_ROWS": block_rows,
        "BLOCK_SPLITS": _splits_at_once(block_rows, shape, config.warps),
    }
    return Launch(decode_kernel, (shape.num_kv_rows, num_splits), numbers)


@functools.lru_cache(maxsize=256)
def rotate_launch(shape: CallShape) -> Launch:
    """Launch of the kernel that rotates the new keys of a chunk."""
    numbers = {
        **_common_numbers(shape, Config(0, 32, warps=4, stages=1)),
        **_strides("key", shape.key_strides),
    }
    return Launch(rotate_kernel, (triton.cdiv(shape.tokens, 32) * shape.num_kv_rows,), numbers)


@functools.lru_cache(maxsize=256)
def quantise_launch(shape: CallShape) -> Launch:
    """Launch of the kernel that rotates the new keys of a chunk and rounds them and their values to 8 bits."""
    numbers = {
        **_common_numbers(shape, Config(0, 32, warps=4, stages=1)),
        **_strides("key", shape.key_strides),
        **_strides("value", shape.value_strides),
        "num_sinks": shape.num_sinks,
        "cache_rows": shape.cache_rows,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_V": block_size(shape.value_dim),
        "HADAMARD": shape.hadamard_block,
    }
    return Launch(quantise_kernel, (triton.cdiv(shape.tokens, 32) * shape.num_kv_rows,), numbers)


@functools.lru_cache(maxsize=256)
def chunk_launch(shape: CallShape, split: bool) -> Launch:
    """Launch of the chunk kernel; with ``split``, several programs share the keys if there are few queries."""
    rows = shape.tokens * shape.group
    eight_bit = shape.cache_dtype is not None
    config = chunk_config(shape.block_dim, shape.dtype, shape.target, shape.num_kv_rows, rows, eight_bit)
    programs = triton.cdiv(rows, config.block_m) * shape.num_kv_rows
    keys = shape.window + shape.tokens
    splits = num_chunk_splits(programs, keys, config, shape.target.num_sms) if split else 1
    numbers = {**_attention_numbers(shape, config), "BLOCK_SINKS": 16}
    return Launch(chunk_kernel, (programs, splits), numbers)


@functools.lru_cache(maxsize=256)
def combine_launch(shape: CallShape, splits: int) -> Launch:
    """Launch of the kernel that combines the ``splits`` of a chunk."""
    config, rows = Config(16, 16, warps=4, stages=1), shape.tokens * shape.group
    names = ("tokens", "kv_heads", "cache_rows", "VALUE_DIM", "GROUP", "BLOCK_M", "BLOCK_V", "UPCAST")
    options = ("num_warps", "num_stages", "enable_fp_fusion")
    numbers = {name: x for name, x in _attention_numbers(shape, config).items() if name in names + options}
    numbers |= {"splits": splits, "BLOCK_SPLITS": _splits_at_once(16, shape, config.warps)}
    return Launch(combine_kernel, (triton.cdiv(rows, 16) * shape.num_kv_rows,), numbers)


def _splits_at_once(block_rows: int, shape: CallShape, warps: int) -> int:
    """Splits combined at once: as many as fit into this many registers per thread beside the running sums.

    Independent of the number of splits, so that all batch sizes share one compiled kernel.
    """
    registers = 64 if block_rows < 16 else 32
    return max(1, 32 * registers * warps // (block_rows * block_size(shape.value_dim)))


def _is_aligned(x: Tensor) -> bool:
    # Whether every vector starts on a 16-byte boundary.
    return x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])


def _strides(tensor: str, strides: tuple[int, ...]) -> dict[str, int]:
    return {f"{tensor}_{name}": stride for name, stride in zip(("row", "head", "token"), strides, strict=False)}


def _common_numbers(shape: CallShape, config: Config) -> dict[str, Any]:
    return {
        "tokens": shape.tokens,
        "kv_heads": shape.kv_heads,
        "HEAD_DIM": shape.head_dim,
        "PAIRS": shape.pairs,
        "INTERLEAVED": shape.interleaved,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_size(shape.head_dim),
        "UPCAST": shape.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,  # explicit, as the default differs between Triton versions
    }


def _attention_numbers(shape: CallShape, config: Config) -> dict[str, Any]:
    softcap = shape.softcap
    return {
        **_common_numbers(shape, config),
        **_strides("query", shape.query_strides),
        **_strides("value", shape.value_strides),
        "slots": shape.slots,
        "window": shape.window,
        "num_sinks": shape.num_sinks,
        "cache_rows": shape.cache_rows,
        "scale": shape.scale * LOG2_E if softcap is None else shape.scale / softcap,
        "cap": None if softcap is None else softcap * LOG2_E,
        "VALUE_DIM": shape.value_dim,
        "GROUP": shape.group,
        "BLOCK_M": config.block_m,
        "BLOCK_V": block_size(shape.value_dim),
        "HADAMARD": shape.hadamard_block,
    }
