"""Trying a swap out: on a short stream an enabled model must agree with what it was, layer by layer.

Original and swap run the same calls, the original with a cache of transformers, so that everything but attention is
computed alike, shape by shape. Attention runs in fp32 on both sides, on what the model's own dtype gives as queries,
keys and values. The original rotates them by what the probe found: the probe has compared that with the model's own
rotation, which is rounded to the model's dtype. In half precision the swap runs once more as it will be used.
"""

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
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkattn import ops
from sinkattn.hf.agreement import BOUND, Record, check_agreement, relative_error
from sinkattn.hf.cache import SinkCache
from sinkattn.hf.enabled import sample_ids
from sinkattn.hf.probe import (
    PROBE_TOKENS,
    Findings,
    Rotation,
    UnsupportedModelError,
    attention_implementation,
    without_rotation,
)
from sinkattn.hf.swap import Swap
from sinkattn.rope import rotate

NAME = "sinkattn_trial"

# What is on record of an attention module, beside "queries", "keys" and "values".
ATTENTION = "attention"
ROUNDED = "attention of rounded inputs"

# Few, so that the ring is tried as well.
TRIAL_SINKS = 2
# Several tokens to begin, several that follow on several, and a decode step.
TRIAL_CALLS = (4, 3, 1)
# Draws of a random rounding: one alone may be small by luck.
DRAWS = 3


def try_out(model: PreTrainedModel, layout: ops.RingLayout, backend: ops.Backend, findings: Findings) -> None:
    """Refuse a model that does not agree with itself once it is swapped; it is left as it was.

    Raises:
        UnsupportedModelError: saying where the two differ, and by how much.
    """
    name, decoder, eps = type(model).__name__, findings.decoder, torch.finfo(model.dtype).eps
    # All tokens are in sight, but only just: a window that is too short by one shows.
    sinks = min(layout.num_sinks, TRIAL_SINKS)
    trial = Trial(model, ops.RingLayout(sinks, PROBE_TOKENS - sinks), backend, findings)
    record, ids = trial.record, sample_ids(model, PROBE_TOKENS)
    calls = ids.split(TRIAL_CALLS, dim=1)
    generator = torch.Generator(ids.device).manual_seed(0)  # torch's own is the user's

    def original(*calls: Tensor, rounding: float = 0.0) -> Tensor:
        with Original(findings, record, rounding, generator).in_place():
            return trial.run_calls(calls, DynamicCache(config=decoder.config))

    def swapped(allowed: Callable[[nn.Module, str], float]) -> SinkCache:
        try:
            trial.install()
            cache = SinkCache(model)
            got = trial.run_calls(calls, cache)
        finally:
            trial.remove()
        for (module, what), error in record.compare().items():
            where = f"the {what} of layer {findings.layers[module].index}"
            check_agreement(name, where, error, allowed(module, what))
        check_agreement(name, "its hidden states", relative_error(got, want), max(BOUND, 2 * own))
        return cache

    with _full_fp32():
        want = original(*calls)
        record.compare()
        # Runs of the original differ where kernels add up in another order each time.
        own = max(relative_error(original(*calls, rounding=eps / 2), want) for _ in range(DRAWS))
        noise = record.compare()

        def in_fp32(module: nn.Module, what: str) -> float:
            if what != ATTENTION:
                return max(8 * eps, 2 * noise[module, what])
            # Scaled by their position, queries were rounded once more.
            scaled = findings.layers[module].temperature is not None
            return max(8 * eps if scaled else BOUND, 4 * noise[module, what])

        def as_it_is_used(module: nn.Module, what: str) -> float:
            rounding = noise.get((module, ROUNDED), noise[module, what])
            return max(32 * eps, 4 * rounding)

        states = _states_in_modules(findings)
        cache = swapped(in_fp32)
        if changed := _states_in_modules(findings) ^ states:
            states = sorted({state for state, *_ in changed})
            raise UnsupportedModelError(f"{name}: keeps a stream's state in its modules: {states}")
        if eps > torch.finfo(torch.float32).eps:
            trial.wide = False
            swapped(as_it_is_used)
        if cache.has_states:
            # A state that begins anew where it should go on is off by much more than rounding through all layers.
            error, allowed = relative_error(original(ids), want), max(1e-2, 4 * eps)
            if error > allowed:
                raise UnsupportedModelError(
                    f"{name}: does not go on with its own stream: hidden states in several calls differ from those in "
                    f"one by {error:.1e} (allowed: {allowed:.1e})"
                )


class Trial(Swap):
    """A swap whose attention is compared with the original's, in fp32 or as it will be used."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.record = Record()
        self.wide = True
        """Whether attention runs in fp32."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options) -> Tensor:
        """Attention of one layer; where its family calls an attention function, what is on record."""
        if self.findings.forwards:
            return super().attend(module, query, key, value, scale, **options)
        inputs = {"queries": query, "keys": key, "values": value}
        if self.findings.layers[module].temperature is not None:
            del inputs["queries"]  # the original has scaled its own by their position already
        inputs = {what: _on_record(self.record, module, what, x) for what, x in inputs.items()}
        inputs = {"queries": _widened(query), **inputs}
        if not self.wide:
            inputs = {what: x.to(query.dtype) for what, x in inputs.items()}
        out = super().attend(module, *inputs.values(), scale, **options).transpose(1, 2)
        return self.record.settle(module, ATTENTION, _widened(out)).transpose(1, 2).to(query.dtype)

    def run_calls(self, calls: tuple[Tensor, ...], cache: Cache) -> Tensor:
        """Hidden states ``[batch, tokens, hidden]`` of a short stream, by the decoder as it is now."""
        parts, begin = [], 0
        for ids in calls:
            tokens = ids.shape[1]
            options: dict[str, Any] = {self.cache_argument: cache, "use_cache": True}
            if "position_ids" in self.parameters:
                options["position_ids"] = torch.arange(begin, begin + tokens, device=ids.device).unsqueeze(0)
            self.record.begin, self.record.tokens = begin, tokens
            parts.append(self.decoder(input_ids=ids, **options)[0])
            begin += tokens
        return torch.cat(parts, dim=1)

    def install(self) -> None:
        """Put the swap in place."""
        super().install()
        for module, forward in self.findings.forwards.items():
            on_record = partial(_forward_on_record, module, forward, self.record, wide=self.wide)
            self.put_forward(module, on_record)


@dataclass
class Original:
    """The model as it was, but for its attention: in fp32, with the rotation that the probe found, and on record."""

    findings: Findings
    record: Record
    rounding: float
    """If not 0, attention is also noted for inputs that are off by up to this fraction of themselves, at random."""
    generator: torch.Generator
    default: Callable | None = None
    """What the attention module that runs calls if no other function is asked for."""

    def __post_init__(self) -> None:
        """Choose the model's own attention function; that of its family where it is one that takes no fp32."""
        name = self.findings.decoder.config._attn_implementation or "eager"
        takes_no_fp32 = name.startswith(("flash", "flex", "paged")) or "/" in name
        self.implementation = "eager" if takes_no_fp32 else name

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the decoder so."""
        decoder = self.findings.decoder
        with ExitStack() as stack:
            for module in self.findings.forwards:
                own = module.__dict__.get("forward")
                stack.callback(_put_back, module, own)
                forward = own or partial(type(module).forward, module)
                module.forward = partial(_forward_on_record, module, forward, self.record, rounded=self.rounded)
            if self.findings.forwards:
                for module in decoder.modules():
                    if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
                        hook = module.register_forward_pre_hook(_widened_arguments, with_kwargs=True)
                        stack.callback(hook.remove)
            else:
                stack.enter_context(_defaults_noted())
                stack.callback(_original.reset, _original.set(self))
                stack.enter_context(attention_implementation(decoder, NAME))
                stack.enter_context(without_rotation(self.findings.rotaries))
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
        inputs = [_on_record(self.record, module, *each) for each in inputs.items()]
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = mask.to(inputs[0].dtype)
        function = AttentionInterface().get(self.implementation) or self.default or _eager_attention(module)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple:
            if (rotation := self.findings.layers[module].rotation) is not None:
                # Rotations are relative: where the first of these keys is in the stream makes no difference.
                positions = torch.arange(key.shape[2], device=key.device)
                key, query = (_rotated(x, rotation, positions[-x.shape[2] :]) for x in (key, query))
            return function(module, query, key, value, mask, **options)

        out, weights = attention(*inputs)
        out = self.record.settle(module, ATTENTION, out)
        if self.rounding:
            self.record.note(module, ROUNDED, relative_error(attention(*map(self.rounded, inputs))[0], out))
        return out.to(query.dtype), weights


_original: ContextVar[Original | None] = ContextVar("sinkattn_original", default=None)
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


def _on_record(record: Record, module: nn.Module, what: str, x: Tensor) -> Tensor:
    """Queries, keys or values of a layer, ``[batch, heads, tokens, head_dim]``, in fp32, as they are on record."""
    settle = record.settle if what == "queries" else record.settle_with_past
    return settle(module, what, _widened(x).transpose(1, 2)).transpose(1, 2)


def _rotated(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    rope, begin = rotation
    cos, sin = rope.tables(positions, x.dtype)
    return torch.cat((x[..., :begin], rotate(x[..., begin:], cos, sin, interleaved=rope.interleaved)), dim=-1)


def _widened(x: Any) -> Any:
    """Floats in fp32 at least, in tuples too; anything else as it is."""
    if type(x) is tuple:
        return tuple(map(_widened, x))
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(torch.promote_types(x.dtype, torch.float32)) if floats else x


def _widened_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return _widened(args), {name: _widened(x) for name, x in kwargs.items()}


def _unchanged(x: Tensor) -> Tensor:
    return x


def _forward_on_record(
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
            arguments.update({name: _widened(x) for name, x in arguments.items()})
        arguments["hidden_states"] = rounded(arguments["hidden_states"])
        if arguments.get("position_embeddings") is not None:
            arguments["position_embeddings"] = tuple(map(rounded, arguments["position_embeddings"]))
        out, *rest = forward(*given.args[1:], **given.kwargs)
    out = record.settle(module, ATTENTION, _widened(out)).to(dtype)
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
            parameter.data = _widened(parameter.data)
        yield True
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever the user has allowed (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _put_back(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _states_in_modules(findings: Findings) -> set[tuple[str, int, int]]:
    """Tensors that modules hold beside their parameters: a state would be there, and change with every call."""
    rotaries = set(findings.rotaries)
    return {
        (f"{type(module).__name__}.{name}", id(x), x._version)
        for module in findings.decoder.modules()
        if module not in rotaries
        for name, x in (*vars(module).items(), *module.named_buffers(recurse=False))
        if isinstance(x, Tensor)
    }
