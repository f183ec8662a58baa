"""One decode step captured in a CUDA graph, and what has to stay as it was for the graph to be right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils.generic import ModelOutput

from sinkattn.hf.cache.layers import SinkLayer
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.probe.rotations import identity_rotation_hook
from sinkattn.hf.swap.layer_attention import Padding, RunningForward
from sinkattn.hf.swap.model_state import ModelState, unseen_tensors

# Values of arguments that a graph may depend on.
PLAIN_VALUES = (bool, int, float, str, type(None))

_aten = torch.ops.aten
WAITING_OPERATORS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}
INDEXING_OPERATORS = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}

Step = Callable[[RunningForward, dict[str, Any]], Any]


class NotCapturableError(Exception):
    """A step cannot be captured; the message says why."""


class Graph(Protocol):
    """Records what a function does on a device, to do it again."""

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record the function; returns its result, whose tensors every replay writes."""

    def replay(self) -> None:
        """Do what was recorded, on the current stream."""


NewGraph = Callable[[Any], Graph]
"""Makes a graph. It may use the memory of another one, or None, that it made and that never runs at the same time."""


class CudaGraph:
    """A `Graph` on the current CUDA device.

    Args:
        beside: another one, whose memory it uses as well, and which must be there while this one is captured. A replay
            of either overwrites what the other one has written.
    """

    # Of any thread: PyTorch records one graph at a time.
    _lock = threading.Lock()

    def __init__(self, beside: CudaGraph | None = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside._pool

    def capture(self, function: Callable[[], Any]) -> Any:
        """See `Graph`. Other threads may use the device, but must not wait for all of it."""
        # Not torch.cuda.graph: that empties the allocator's cache, may choose a stream of another device, and stays on
        # it if the capture fails.
        device, stream = torch.cuda.current_device(), torch.cuda.Stream()
        with self._lock:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = function()
                    self._graph.capture_end()
                except BaseException:
                    self._abandon(device)
                    raise
            torch.cuda.current_stream().wait_stream(stream)
        return result

    def _abandon(self, device: int) -> None:
        """End a capture that failed, with the allocator as it was before."""
        try:
            self._graph.capture_end()
        except RuntimeError:
            # It left the allocator as it is while a graph is captured, unless the first call raises an error too. In
            # all other cases the graph itself releases the pool, and must not find it released.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, self._pool)
                torch._C._cuda_releasePool(device, self._pool)

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


class WaitRecorder(TorchDispatchMode):
    """Notes the first operator that waits for the device: such a step must not be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        output = operator(*args, **(kwargs or {}))
        if self.name is None and _waits(operator, args, output):
            self.name = str(operator)
        return output


def _waits(operator: Any, args: Any, output: Any) -> bool:
    """Whether an operator waits: for a value, for a number of elements, or for a copy from one device to another."""
    if operator in WAITING_OPERATORS:
        return True
    given, made = ([x for x in tree_leaves(each) if isinstance(x, Tensor)] for each in (args, output))
    if operator in INDEXING_OPERATORS and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:]):
        return True
    devices = {x.device.type for x in given}
    # Operators take numbers in tensors of the host.
    return len({x.device.type for x in given if x.ndim}) > 1 or bool(
        devices and {x.device.type for x in made} - devices
    )


class CapturedStep:
    """A decode step in a graph.

    Args:
        step: the step, as `StepGraphs.fixed_step`.
        state: of the decoder, from before the step that has just run.
        graph: a new graph.
        running, kwargs: of that step, whose token the capture may write again.

    Raises:
        NotCapturableError: what a graph cannot hold, or a model that is not in that state any more.
    """

    def __init__(
        self, step: Step, state: ModelState, graph: Graph, running: RunningForward, kwargs: dict[str, Any]
    ) -> None:
        self.graph = graph
        self._inputs = {name: x.clone() for name, x in input_tensors(running, kwargs).items()}
        self._constants = constants(running, kwargs)
        fixed = replace(running, positions=self._inputs["position_ids"], num_layers_run=0, tables={})
        if running.padding is not None:
            # The order of tokens is None: there is only one.
            fixed.padding = Padding(self._inputs["num_new"], self._inputs["token_mask"], None)
        given = {name: self._inputs.get(name, x) for name, x in kwargs.items()}
        output = graph.capture(lambda: step(fixed, given))
        self._output_class = type(output)
        # Not the cache itself, with which the graph would never go.
        self._output = {name: x for name, x in output.items() if x is not running.cache}
        self._cache_fields = output.keys() - self._output.keys()
        if others := [name for name, x in self._output.items() if not isinstance(x, Tensor)]:
            raise NotCapturableError(f"the decoder returns {', '.join(others)}")
        self._num_layers_run = fixed.num_layers_run
        self._rings = ring_addresses(running.cache)
        self._state = state
        if not state.is_same():
            raise NotCapturableError("the modules of the model change in every step")

    def spoil_output(self) -> None:
        """Overwrite the output of the capture, so that only a replay gives it."""
        for x in self._output.values():
            x.fill_(torch.nan)

    def replay(self, running: RunningForward, kwargs: dict[str, Any]) -> ModelOutput | None:
        """Output of the step for these inputs; None if the graph is not one of this step any more."""
        given = input_tensors(running, kwargs)
        if (
            {name: (x.shape, x.dtype) for name, x in given.items()}
            != {name: (x.shape, x.dtype) for name, x in self._inputs.items()}
            or constants(running, kwargs) != self._constants
            or ring_addresses(running.cache) != self._rings
            or not self._state.has_same_tensors()
        ):
            return None
        for name, x in given.items():
            self._inputs[name].copy_(x)
        self.graph.replay()
        if not self._state.is_same():
            return None
        running.num_layers_run = self._num_layers_run
        # Copies: the next replay overwrites its output.
        output = {name: x.clone() for name, x in self._output.items()}
        return self._output_class(**output, **dict.fromkeys(self._cache_fields, running.cache))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a step returns; raises NotCapturableError for another kind of output."""
    if not isinstance(output, ModelOutput):
        raise NotCapturableError(f"the decoder returns a {type(output).__name__}")
    return [x for x in output.values() if isinstance(x, Tensor)]


def check_capturable(decoder: nn.Module, cache: SinkCache, kwargs: dict[str, Any]) -> None:
    """Raise NotCapturableError for what a replay would leave out or get wrong: hooks, states on the host, autocast."""
    if cache.has_states:
        raise NotCapturableError("some layers have a convolutional or recurrent state")
    for name, x in kwargs.items():
        if not (x is cache or isinstance(x, (Tensor, *PLAIN_VALUES))):
            raise NotCapturableError(f"the decoder gets {name}, a {type(x).__name__}")
    assert cache.seen is not None
    device = cache.seen.device
    if torch.is_autocast_enabled(device.type):
        raise NotCapturableError("autocast keeps converted weights")
    if _has_any_global_hook():
        raise NotCapturableError("there is a hook on all modules")
    for name, module in decoder.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if "_hf_hook" in module.__dict__ or not all(map(_is_harmless, hooks)):
            raise NotCapturableError(f"there is a hook on {name or 'the decoder'}")
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        if tensor.device != device:
            raise NotCapturableError(f"{name} is on {tensor.device}")
    if (unseen := unseen_tensors(decoder)) is not None:
        raise NotCapturableError(f"there are tensors inside {unseen}")


def _is_harmless(hook: Any) -> bool:
    # transformers leaves hooks that record hidden states, if a call asks for them, which its output shows.
    return hook is identity_rotation_hook or getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def input_tensors(running: RunningForward, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a step reads: arguments of the decoder, positions and padding."""
    tensors = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
    tensors["position_ids"] = running.positions
    if running.padding is not None:
        tensors |= {"num_new": running.padding.num_new, "token_mask": running.padding.token_mask}
    return tensors


def constants(running: RunningForward, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The other arguments of the decoder except the cache, and settings of torch that change a step."""
    others = {name: x for name, x in kwargs.items() if not isinstance(x, Tensor) and x is not running.cache}
    return {
        **{name: x if isinstance(x, PLAIN_VALUES) else id(x) for name, x in others.items()},
        "autocast": torch.is_autocast_enabled(running.positions.device.type),
        "hooks of all modules": _has_any_global_hook(),
        "modes": torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack(),
        "precision of products": torch.backends.cuda.matmul.fp32_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def ring_layers(cache: SinkCache) -> Iterator[SinkLayer]:
    """Layers of a cache that have a ring."""
    return (layer for layer in cache.layers if isinstance(layer, SinkLayer))


def ring_addresses(cache: SinkCache) -> list[tuple[int, ...] | None]:
    """Where the rings of a cache lie."""
    rings = ((layer.ring, layer.tensors.values()) for layer in ring_layers(cache))
    return [
        None if ring is None else tuple(x.data_ptr() for x in (*tensors, ring.seen, ring.arrivals))
        for ring, tensors in rings
    ]


def newest_tokens(cache: SinkCache) -> list[Tensor]:
    """Copies of the keys and values that the step in progress has written.

    What is rounded to 8 bits, with its scales, comes in a dtype of about that precision: it may be off by one step.
    """
    return [x[at].bfloat16() if is_rounded else x[at] for x, at, _, is_rounded in _newest_slots(cache)]


def erase_newest_tokens(cache: SinkCache, num_new: Tensor | None) -> None:
    """Overwrite what the step in progress has written, so that only a replay writes it.

    num_new: int64 ``[batch]``, 0 for rows that have got padding.
    """
    for x, at, is_written, _ in _newest_slots(cache):
        if num_new is not None:
            is_written = is_written & (num_new > 0)
        if x.dtype == torch.float8_e4m3fn:
            x = x.view(torch.uint8)  # zero as well, and not every operator takes float8
        x[at] = torch.where(is_written[:, None, None], 0, x[at])


class _NewestSlots(NamedTuple):
    """Where a step writes the vectors of the newest token of each row, in one tensor of a ring."""

    tensor: Tensor
    place: tuple[Tensor, slice, Tensor]
    """Of the vectors ``[batch, KV heads, dim]``."""
    is_written: Tensor
    """Whether the token of a row is in this tensor: bool ``[batch]``."""
    is_rounded: bool
    """Whether it holds what was rounded to 8 bits, or its scales."""


def _newest_slots(cache: SinkCache) -> Iterator[_NewestSlots]:
    for layer in ring_layers(cache):
        ring, layout = layer.ring, layer.layout
        assert ring is not None
        seen, _ = cache.ring_counters(ring)
        options = cache.row_options(layout)
        rows, num_sinks = options.get("rows"), options.get("row_sinks")
        rows = torch.arange(len(seen), device=seen.device) if rows is None else rows
        num_sinks = layout.num_sinks if num_sinks is None else num_sinks
        slots = torch.where(seen < num_sinks, seen, layout.num_sinks + (seen - num_sinks) % layout.ring)
        for name, x in ring.tensors.items():
            # With 8 bits the sinks are in tensors of their own, and the others begin with the ring.
            is_rounded = bool(ring.eight_bit) and not name.startswith("sink_")
            slot = slots - layout.num_sinks if is_rounded else slots
            if count := x.shape[2]:
                is_written = (slot >= 0) & (slot < count)
                yield _NewestSlots(x, (rows, slice(None), slot.clamp(0, count - 1)), is_written, is_rounded)
