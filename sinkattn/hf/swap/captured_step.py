"""One decode step captured in a CUDA graph, and what has to stay as it was for the graph to be right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils.generic import ModelOutput

from sinkattn.hf.cache.layers import SinkLayer
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.probe.rotations import identity_rotation_hook
from sinkattn.hf.swap.layer_attention import Padding, RunningForward
from sinkattn.hf.swap.model_state import ModelState

# Values of arguments that a graph may depend on.
PLAIN_VALUES = (bool, int, float, str, type(None))

Step = Callable[[RunningForward, dict[str, Any]], Any]


class NotCapturableError(Exception):
    """A step cannot be captured; the message says why."""


class Graph(Protocol):
    """Records what a function does on a device, to do it again."""

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record the function; returns its result, whose tensors every replay writes."""

    def replay(self) -> None:
        """Do what was recorded, on the current stream."""


class CudaGraph:
    """A `Graph` on the current CUDA device."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Any]) -> Any:
        """See `Graph`."""
        # Other threads may go on working with the device.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


class CapturedStep:
    """A decode step in a graph.

    Args:
        step: the step, as `StepGraphs.fixed_step`.
        decoder: the decoder.
        graph: a new graph.
        running, kwargs: of a step that has just run, whose token the capture may write again.
    """

    def __init__(
        self, step: Step, decoder: nn.Module, graph: Graph, running: RunningForward, kwargs: dict[str, Any]
    ) -> None:
        self._graph = graph
        self._inputs = {name: x.clone() for name, x in input_tensors(running, kwargs).items()}
        self._constants = constants(running, kwargs)
        fixed = replace(running, positions=self._inputs["position_ids"], num_layers_run=0, tables={})
        if running.padding is not None:
            # The order of tokens is None: there is only one.
            fixed.padding = Padding(self._inputs["num_new"], self._inputs["token_mask"], None)
        given = {name: self._inputs.get(name, x) for name, x in kwargs.items()}
        output = graph.capture(lambda: step(fixed, given))
        if not isinstance(output, ModelOutput):
            raise NotCapturableError(f"the decoder returns a {type(output).__name__}")
        self._output_class = type(output)
        # Not the cache itself, with which the graph would never go.
        self._output = {name: x for name, x in output.items() if x is not running.cache}
        self._cache_fields = output.keys() - self._output.keys()
        if others := [name for name, x in self._output.items() if not isinstance(x, Tensor)]:
            raise NotCapturableError(f"the decoder returns {', '.join(others)}")
        self._num_layers_run = fixed.num_layers_run
        self._rings = ring_addresses(running.cache)
        self._state = ModelState(decoder)

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
        self._graph.replay()
        if not self._state.is_same():
            return None
        running.num_layers_run = self._num_layers_run
        # Copies: the next replay overwrites its output.
        output = {name: x.clone() for name, x in self._output.items()}
        return self._output_class(**output, **dict.fromkeys(self._cache_fields, running.cache))


def check_capturable(decoder: nn.Module, cache: SinkCache) -> None:
    """Raise NotCapturableError for what a replay would leave out or get wrong: hooks, states on the host, autocast."""
    if cache.has_states:
        raise NotCapturableError("some layers have a convolutional or recurrent state")
    assert cache.seen is not None
    if torch.is_autocast_enabled(cache.seen.device.type):
        raise NotCapturableError("autocast keeps converted weights")
    if _has_any_global_hook():
        raise NotCapturableError("there is a hook on all modules")
    for name, module in decoder.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if "_hf_hook" in module.__dict__ or not all(map(_is_harmless, hooks)):
            raise NotCapturableError(f"there is a hook on {name or 'the decoder'}")


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
    """The other arguments of the decoder, where the cache is None, and settings of torch that change a step."""
    values = {name: None if x is running.cache else x for name, x in kwargs.items() if not isinstance(x, Tensor)}
    for name, x in values.items():
        if not isinstance(x, PLAIN_VALUES):
            raise NotCapturableError(f"the decoder gets {name}, a {type(x).__name__}")
    return {
        **values,
        "autocast": torch.is_autocast_enabled(running.positions.device.type),
        "hooks of all modules": _has_any_global_hook(),
        "precision of products": torch.get_float32_matmul_precision(),
    }


def ring_layers(cache: SinkCache) -> Iterator[SinkLayer]:
    """Layers of a cache that have a ring."""
    return (layer for layer in cache.layers if isinstance(layer, SinkLayer))


def ring_addresses(cache: SinkCache) -> list[tuple[int, ...] | None]:
    """Where the rings of a cache lie."""
    rings = (layer.ring for layer in ring_layers(cache))
    return [
        None if ring is None else tuple(x.data_ptr() for x in (ring.keys, ring.values, ring.seen, ring.arrivals))
        for ring in rings
    ]


def newest_tokens(cache: SinkCache) -> Iterator[Tensor]:
    """Copies of the keys and values that the step in progress has written."""
    for layer in ring_layers(cache):
        ring, layout = layer.ring, layer.layout
        assert ring is not None
        in_ring = layout.num_sinks + (ring.seen - layout.num_sinks) % layout.ring
        slot = torch.where(ring.seen < layout.num_sinks, ring.seen, in_ring)[:, None, None, None]
        for x in (ring.keys, ring.values):
            yield x.gather(2, slot.expand(*x.shape[:2], 1, x.shape[3]))
