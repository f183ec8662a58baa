"""Run the original model for the trial: its own attention function in fp32, with every layer recorded."""

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
from sinkattn.hf.trial.agreement import AttentionRecord, relative_error
from sinkattn.rope import rotate

ATTENTION_NAME = "sinkattn_trial"

# Names of recorded tensors, beside "queries", "keys" and "values".
OUTPUT = "attention output"
PERTURBED_OUTPUT = "attention output of perturbed inputs"


@dataclass
class OriginalRun:
    """The original model with its attention recorded and in fp32, and with the rotation that the probe found."""

    probe_result: ProbeResult
    record: AttentionRecord
    noise: float
    """If not 0, also measure attention on inputs that are off by up to this fraction of themselves, at random."""
    generator: torch.Generator
    default_attention: Callable | None = None
    """Function that the current attention module falls back on."""

    def __post_init__(self) -> None:
        """Choose the model's own attention function, or the eager one of its family if that does not take fp32."""
        name = self.probe_result.decoder.config._attn_implementation or "eager"
        refuses_fp32 = name.startswith(("flash", "flex", "paged")) or "/" in name
        self.implementation = "eager" if refuses_fp32 else name

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the recording on the decoder."""
        decoder = self.probe_result.decoder
        with ExitStack() as stack:
            for module in self.probe_result.adapter_forwards:
                previous = module.__dict__.get("forward")
                stack.callback(_restore_forward, module, previous)
                forward = previous or partial(type(module).forward, module)
                module.forward = partial(recorded_forward, module, forward, self.record, perturb=self.perturb)
            if self.probe_result.adapter_forwards:
                for module in decoder.modules():
                    if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
                        hook = module.register_forward_pre_hook(_arguments_to_fp32, with_kwargs=True)
                        stack.callback(hook.remove)
            else:
                stack.enter_context(_capture_default_attention())
                stack.callback(_current_run.reset, _current_run.set(self))
                stack.enter_context(attention_implementation(decoder, ATTENTION_NAME))
                stack.enter_context(without_rotation(self.probe_result.rotary_modules))
            yield

    def perturb(self, x: Tensor) -> Tensor:
        """Change each element by a random fraction of itself, up to ``noise``."""
        if not self.noise:
            return x
        random = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)
        return x * (1 + self.noise * (2 * random - 1))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple:
        """Attention of one layer by transformers: ``[batch, tokens, heads, head_dim]``, and weights."""
        named = {"queries": query, "keys": key, "values": value}
        inputs = [record_or_replay_input(self.record, module, *each) for each in named.items()]
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = mask.to(inputs[0].dtype)
        function = AttentionInterface().get(self.implementation) or self.default_attention or _eager_attention(module)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple:
            if (rotation := self.probe_result.layers[module].rotation) is not None:
                # Scores depend on position differences only, so count positions from the first of these keys.
                positions = torch.arange(key.shape[2], device=key.device)
                key, query = (_rotate(x, rotation, positions[-x.shape[2] :]) for x in (key, query))
            return function(module, query, key, value, mask, **options)

        out, weights = attention(*inputs)
        out = self.record.record_or_replay(module, OUTPUT, out)
        if self.noise:
            perturbed = attention(*map(self.perturb, inputs))[0]
            self.record.note_error(module, PERTURBED_OUTPUT, relative_error(perturbed, out))
        return out.to(query.dtype), weights


_current_run: ContextVar[OriginalRun] = ContextVar("sinkattn_original_run")
_interface_lock = threading.RLock()


@contextmanager
def _capture_default_attention() -> Iterator[None]:
    """Store the default function that an attention module passes to the lookup by name, and to nothing else."""

    def get_interface(name: str, default: Callable) -> Callable:
        if name == ATTENTION_NAME and (run := _current_run.get(None)) is not None:
            run.default_attention = default
        return AttentionInterface.get_interface(ALL_ATTENTION_FUNCTIONS, name, default)

    with _interface_lock:
        ALL_ATTENTION_FUNCTIONS.__dict__["get_interface"] = get_interface
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS.__dict__["get_interface"]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple:
    # The names are those of transformers: some families pass the mask by keyword.
    return _current_run.get().attend(module, query, key, value, attention_mask, **options)


def _mask(*args: Any, **kwargs: Any) -> Any:
    function = AttentionMaskInterface().get(_current_run.get().implementation)
    return None if function is None else function(*args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


def _eager_attention(module: nn.Module) -> Callable:
    # For models that look their function up in another way: nearly every modeling file defines this one.
    files = (sys.modules.get(base.__module__) for base in type(module).__mro__)
    function = next((found for file in files if (found := getattr(file, "eager_attention_forward", None))), None)
    return function or AttentionInterface()["sdpa"]


def record_or_replay_input(record: AttentionRecord, module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Recorded queries, keys or values of a layer, ``[batch, heads, tokens, head_dim]``, in fp32."""
    method = record.record_or_replay if name == "queries" else record.record_or_replay_with_past
    return method(module, name, to_fp32(x).transpose(1, 2)).transpose(1, 2)


def _rotate(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    rope, offset = rotation
    cos, sin = rope.tables(positions, x.dtype)
    return torch.cat((x[..., :offset], rotate(x[..., offset:], cos, sin, interleaved=rope.interleaved)), dim=-1)


def to_fp32(x: Any) -> Any:
    """Convert float tensors to fp32, also in a tuple; leave fp64 and anything else."""
    if type(x) is tuple:
        return tuple(map(to_fp32, x))
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(torch.promote_types(x.dtype, torch.float32)) if is_float else x


def _arguments_to_fp32(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return to_fp32(args), {name: to_fp32(x) for name, x in kwargs.items()}


def _identity(x: Tensor) -> Tensor:
    return x


def recorded_forward(
    module: nn.Module,
    forward: Callable,
    record: AttentionRecord,
    *args: Any,
    in_fp32: bool = True,
    perturb: Callable[[Tensor], Tensor] = _identity,
    **kwargs: Any,
) -> tuple:
    """Run the forward of an attention module and record or replay its output; for families with an adapter."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    arguments = bound.arguments
    dtype, residual = arguments["hidden_states"].dtype, arguments.get("residual")
    if residual is not None:
        # Added below instead: in the sum a large residual would hide an error.
        arguments["residual"] = torch.zeros_like(residual)
    with _parameters_in_fp32(module) if in_fp32 else nullcontext(False) as are_fp32:
        if are_fp32:
            arguments.update({name: to_fp32(x) for name, x in arguments.items()})
        arguments["hidden_states"] = perturb(arguments["hidden_states"])
        if arguments.get("position_embeddings") is not None:
            arguments["position_embeddings"] = tuple(map(perturb, arguments["position_embeddings"]))
        out, *rest = forward(*bound.args[1:], **bound.kwargs)
    out = record.record_or_replay(module, OUTPUT, to_fp32(out)).to(dtype)
    return (out if residual is None else residual + out), *rest


@contextmanager
def _parameters_in_fp32(module: nn.Module) -> Iterator[bool]:
    """Convert the parameters of a module to fp32 temporarily; yields False, unchanged, if some are quantised."""
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


def _restore_forward(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
