"""Trying a swap out: on a short stream an enabled model must agree with what it was, layer by layer.

Original and swap run the same calls, the original with a cache of transformers, so that everything but attention is
computed alike, shape by shape. Attention runs in fp32 on both sides, on what the model's own dtype gives as queries,
keys and values. The original rotates them by what the probe found: the probe has compared that with the model's own
rotation, which is rounded to the model's dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel

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

ATTENTION = "attention"

# Few, so that the ring is tried as well.
TRIAL_SINKS = 2


def try_out(model: PreTrainedModel, layout: ops.RingLayout, backend: ops.Backend, findings: Findings) -> None:
    """Refuse a model that does not agree with itself once it is swapped; it is left as it was.

    Raises:
        UnsupportedModelError: saying where the two differ, and by how much.
    """
    name, decoder, ids = type(model).__name__, findings.decoder, sample_ids(model, PROBE_TOKENS)
    # All tokens are in sight, but only just: a window that is too short by one shows.
    sinks = min(layout.num_sinks, TRIAL_SINKS)
    trial = Trial(model, ops.RingLayout(sinks, PROBE_TOKENS - sinks), backend, findings)
    record = trial.record

    def original(*calls: Tensor, rounding: float = 0.0) -> Tensor:
        with Original(findings, record, rounding).in_place():
            return trial.run_calls(calls, DynamicCache(config=decoder.config))

    # Two calls, so that whatever a model carries from call to call is carried here.
    calls = ids.tensor_split(2, dim=1)
    want, eps = original(*calls), torch.finfo(model.dtype).eps
    record.compare()
    own = relative_error(original(*calls, rounding=eps / 2), want)
    noise = record.errors
    record.compare()
    try:
        trial.install()
        cache, states = SinkCache(model), _states_in_modules(findings)
        got = trial.run_calls(calls, cache)
    finally:
        trial.remove()
    if changed := _states_in_modules(findings) ^ states:
        states = sorted({state for state, *_ in changed})
        raise UnsupportedModelError(f"{name}: keeps a stream's state in its modules: {states}")
    for (module, what), error in record.errors.items():
        where = f"the {what} of layer {findings.layers[module].index}"
        check_agreement(name, where, error, noise[module, what], BOUND if what == ATTENTION else 8 * eps)
    check_agreement(name, "its hidden states", relative_error(got, want), own)
    if cache.has_states:
        # A state that begins anew where it should go on is off by much more than rounding through all layers.
        error, allowed = relative_error(original(ids), want), max(1e-2, 16 * eps)
        if error > allowed:
            raise UnsupportedModelError(
                f"{name}: does not go on with its own stream: hidden states in two calls differ from those in one by "
                f"{error:.1e} (allowed: {allowed:.1e})"
            )


class Trial(Swap):
    """A swap whose attention runs in fp32 and is compared with the original's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.record = Record()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options) -> Tensor:
        """Attention of one layer; where its family calls an attention function, what is on record."""
        if self.findings.forwards:
            return super().attend(module, query, key, value, scale, **options)
        dtype = query.dtype
        key, value = (_on_record(self.record, module, *x) for x in (("keys", key), ("values", value)))
        if self.findings.layers[module].temperature is None:
            query = _on_record(self.record, module, "queries", query)
        else:
            query = _widened(query)  # the original has scaled its own by their position already
        out = super().attend(module, query, key, value, scale, **options).transpose(1, 2)
        return self.record.meet(module, ATTENTION, out).transpose(1, 2).to(dtype)

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
            self.put(module, "forward", partial(_forward_on_record, module, forward, self.record, _exact))


@dataclass
class Original:
    """The model as it was, its attention in fp32 and on record."""

    findings: Findings
    record: Record
    rounding: float
    """Where a module works on rounded tables, its inputs are off by up to this fraction of themselves, at random."""
    implementation: str = field(init=False)

    def __post_init__(self) -> None:
        """Choose among transformers' implementations: others take no fp32."""
        implementation = self.findings.decoder.config._attn_implementation
        self.implementation = implementation if implementation in ("eager", "sdpa") else "eager"
        self._generator = torch.Generator(self.findings.decoder.device).manual_seed(0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the decoder so."""
        with ExitStack() as stack:
            for module in self.findings.forwards:
                own = module.__dict__.get("forward")
                stack.callback(_put_back, module, own)
                forward = own or partial(type(module).forward, module)
                module.forward = partial(_forward_on_record, module, forward, self.record, self.rounded)
            if not self.findings.forwards:
                stack.callback(_original.reset, _original.set(self))
                stack.enter_context(attention_implementation(self.findings.decoder, NAME))
                stack.enter_context(without_rotation(self.findings.rotaries))
            yield

    def rounded(self, x: Tensor) -> Tensor:
        """The tensor, off by one more rounding."""
        noise = torch.rand(x.shape, generator=self._generator, device=x.device)
        return x * (1 + self.rounding * (2 * noise - 1))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options) -> tuple:
        """Attention of one layer as transformers computes it: ``[batch, tokens, heads, head_dim]``, and weights."""
        dtype = query.dtype
        inputs = {"queries": query, "keys": key, "values": value}
        query, key, value = (_on_record(self.record, module, *x) for x in inputs.items())
        if (rotation := self.findings.layers[module].rotation) is not None:
            # Rotations are relative: where the first of these keys is in the stream makes no difference.
            positions = torch.arange(key.shape[2], device=key.device)
            key, query = (_rotated(x, rotation, positions[-x.shape[2] :]) for x in (key, query))
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = mask.to(query.dtype)
        function = AttentionInterface().get(self.implementation) or _eager_attention(module)
        out, weights = function(module, query, key, value, mask, **options)
        return self.record.meet(module, ATTENTION, out).to(dtype), weights


_original: ContextVar[Original] = ContextVar("sinkattn_original")


def _attention(module, query, key, value, attention_mask, **options) -> tuple:
    return _original.get().attend(module, query, key, value, attention_mask, **options)


def _mask(*args, **kwargs) -> Any:
    return AttentionMaskInterface()[_original.get().implementation](*args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _eager_attention(module: nn.Module) -> Callable:
    # Every family has its own, in the file of its attention modules.
    files = (sys.modules[base.__module__] for base in type(module).__mro__)
    function = next((found for file in files if (found := getattr(file, "eager_attention_forward", None))), None)
    return function or AttentionInterface()["sdpa"]


def _on_record(record: Record, module: nn.Module, what: str, x: Tensor) -> Tensor:
    """Queries, keys or values of a layer, ``[batch, heads, tokens, head_dim]``, in fp32, as they are on record."""
    # Keys and values may come with those of earlier tokens in front.
    meet = record.meet if what == "queries" else record.meet_all
    return meet(module, what, _widened(x).transpose(1, 2)).transpose(1, 2)


def _rotated(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    rope, begin = rotation
    cos, sin = rope.tables(positions, x.dtype)
    return torch.cat((x[..., :begin], rotate(x[..., begin:], cos, sin, interleaved=rope.interleaved)), dim=-1)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exact(x: Tensor) -> Tensor:
    return x


def _forward_on_record(
    module: nn.Module, forward: Callable, record: Record, rounded: Callable, hidden_states: Tensor, *args, **kwargs
) -> tuple:
    """Forward of an attention module in fp32, recorded or compared; for families that call no attention function."""
    dtype = hidden_states.dtype
    with _in_fp32(module) as wide:
        if wide:
            hidden_states, args, kwargs = tree_map(_widened_floats, (hidden_states, args, kwargs))
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tree_map(rounded, kwargs["position_embeddings"])
        out, *rest = forward(rounded(hidden_states), *args, **kwargs)
    return record.meet(module, ATTENTION, out).to(dtype), *rest


def _widened_floats(x: Any) -> Any:
    return _widened(x) if isinstance(x, Tensor) and x.is_floating_point() else x


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
