"""The original model during a trial: the same calls, attention in fp32, every layer recorded."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkattn.hf.model_config import attention_implementation
from sinkattn.hf.probe.result import ProbeResult, Rotation
from sinkattn.hf.probe.rotations import without_rotation
from sinkattn.hf.trial.agreement import Record, relative_error
from sinkattn.rope import rotate

NAME = "sinkattn_trial"


# What is on record of an attention module, beside "queries", "keys" and "values".
ATTENTION = "attention"


ROUNDED = "attention of rounded inputs"


@dataclass
class OriginalRun:
    """The model as it was, but for its attention: in fp32, with the rotation that the probe found, and on record."""

    probe_result: ProbeResult
    record: Record
    rounding: float
    """If not 0, attention is also noted for inputs that are off by up to this fraction of themselves, at random."""
    generator: torch.Generator
    default: Callable | None = None
    """What the attention module that runs calls if no other function is asked for."""

    def __post_init__(self) -> None:
        """Choose the model's own attention function; that of its family where it is one that takes no fp32."""
        name = self.probe_result.decoder.config._attn_implementation or "eager"
        takes_no_fp32 = name.startswith(("flash", "flex", "paged")) or "/" in name
        self.implementation = "eager" if takes_no_fp32 else name

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the decoder so."""
        decoder = self.probe_result.decoder
        with ExitStack() as stack:
            for module in self.probe_result.forwards:
                own = module.__dict__.get("forward")
                stack.callback(_put_back, module, own)
                forward = own or partial(type(module).forward, module)
                module.forward = partial(recorded_forward, module, forward, self.record, rounded=self.rounded)
            if self.probe_result.forwards:
                for module in decoder.modules():
                    if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
                        hook = module.register_forward_pre_hook(_widened_arguments, with_kwargs=True)
                        stack.callback(hook.remove)
            else:
                stack.enter_context(_defaults_noted())
                stack.callback(_original.reset, _original.set(self))
                stack.enter_context(attention_implementation(decoder, NAME))
                stack.enter_context(without_rotation(self.probe_result.rotaries))
            yield

    def rounded(self, x: Tensor) -> Tensor:
        """The tensor, off by one more rounding."""
        if not self.rounding:
            return x
        random = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)
        return x * (1 + self.rounding * (2 * random - 1))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options) -> tuple:
        """Attention of one layer as transformers computes it: ``[batch, tokens, heads, head_dim]``, and weights."""
        inputs = {"queries": query, "keys": key, "values": value}
        inputs = [settle_input(self.record, module, *each) for each in inputs.items()]
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = mask.to(inputs[0].dtype)
        function = AttentionInterface().get(self.implementation) or self.default or _eager_attention(module)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple:
            if (rotation := self.probe_result.layers[module].rotation) is not None:
                # Rotations are relative: where the first of these keys is in the stream makes no difference.
                positions = torch.arange(key.shape[2], device=key.device)
                key, query = (_rotated(x, rotation, positions[-x.shape[2] :]) for x in (key, query))
            return function(module, query, key, value, mask, **options)

        out, weights = attention(*inputs)
        out = self.record.settle(module, ATTENTION, out)
        if self.rounding:
            self.record.note(module, ROUNDED, relative_error(attention(*map(self.rounded, inputs))[0], out))
        return out.to(query.dtype), weights


_original: ContextVar[OriginalRun | None] = ContextVar("sinkattn_original", default=None)


_interface_lock = threading.RLock()


@contextmanager
def _defaults_noted() -> Iterator[None]:
    """Note the function that an attention module falls back on: it is handed to nobody else than this lookup."""

    def get_interface(name: str, default: Callable) -> Callable:
        if name == NAME and (original := _original.get()) is not None:
            original.default = default
        return AttentionInterface.get_interface(ALL_ATTENTION_FUNCTIONS, name, default)

    with _interface_lock:
        ALL_ATTENTION_FUNCTIONS.get_interface = get_interface
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS.get_interface


def _attention(module, query, key, value, attention_mask, **options) -> tuple:
    return _original.get().attend(module, query, key, value, attention_mask, **options)


def _mask(*args, **kwargs) -> Any:
    function = AttentionMaskInterface().get(_original.get().implementation)
    return None if function is None else function(*args, **kwargs)


AttentionInterface.register(NAME, _attention)


AttentionMaskInterface.register(NAME, _mask)


def _eager_attention(module: nn.Module) -> Callable:
    # For code that looks up its function in another way: nearly every family has one in its file.
    files = (sys.modules.get(base.__module__) for base in type(module).__mro__)
    function = next((found for file in files if (found := getattr(file, "eager_attention_forward", None))), None)
    return function or AttentionInterface()["sdpa"]


def settle_input(record: Record, module: nn.Module, what: str, x: Tensor) -> Tensor:
    """Queries, keys or values of a layer, ``[batch, heads, tokens, head_dim]``, in fp32, as they are on record."""
    settle = record.settle if what == "queries" else record.settle_with_past
    return settle(module, what, to_fp32(x).transpose(1, 2)).transpose(1, 2)


def _rotated(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    rope, begin = rotation
    cos, sin = rope.tables(positions, x.dtype)
    return torch.cat((x[..., :begin], rotate(x[..., begin:], cos, sin, interleaved=rope.interleaved)), dim=-1)


def to_fp32(x: Any) -> Any:
    """Floats in fp32 at least, in tuples too; anything else as it is."""
    if type(x) is tuple:
        return tuple(map(to_fp32, x))
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(torch.promote_types(x.dtype, torch.float32)) if floats else x


def _widened_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return to_fp32(args), {name: to_fp32(x) for name, x in kwargs.items()}


def _unchanged(x: Tensor) -> Tensor:
    return x


def recorded_forward(
    module: nn.Module,
    forward: Callable,
    record: Record,
    *args,
    wide: bool = True,
    rounded: Callable[[Tensor], Tensor] = _unchanged,
    **kwargs,
) -> tuple:
    """Forward of an attention module, recorded or compared; for families that call no attention function."""
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    arguments = given.arguments
    dtype, residual = arguments["hidden_states"].dtype, arguments.get("residual")
    if residual is not None:
        # Beside a large residual no error would show.
        arguments["residual"] = torch.zeros_like(residual)
    with _in_fp32(module) if wide else nullcontext(False) as widened:
        if widened:
            arguments.update({name: to_fp32(x) for name, x in arguments.items()})
        arguments["hidden_states"] = rounded(arguments["hidden_states"])
        if arguments.get("position_embeddings") is not None:
            arguments["position_embeddings"] = tuple(map(rounded, arguments["position_embeddings"]))
        out, *rest = forward(*given.args[1:], **given.kwargs)
    out = record.settle(module, ATTENTION, to_fp32(out)).to(dtype)
    return (out if residual is None else residual + out), *rest


@contextmanager
def _in_fp32(module: nn.Module) -> Iterator[bool]:
    """Give a module parameters in fp32 for a while; false, and nothing done, if they are quantised."""
    parameters = list(module.parameters())
    before = [parameter.data for parameter in parameters]
    if not all(type(data) is Tensor and data.is_floating_point() for data in before):
        yield False
        return
    try:
        for parameter in parameters:
            parameter.data = to_fp32(parameter.data)
        yield True
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def _put_back(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
