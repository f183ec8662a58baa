"""Trying a swap out: on a short stream an enabled model must agree with what it was, layer by layer.

Original and swap run the same calls, the original with a cache of transformers, so that everything but attention is
computed alike, shape by shape. Attention runs in fp32 on both sides, on what the model's own dtype gives as queries,
keys and values. The original rotates them by what the probe found: the probe has compared that with the model's own
rotation, which is rounded to the model's dtype. In half precision the swap runs once more as it will be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from sinkattn import ops
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.dry_run import sample_ids
from sinkattn.hf.probe.probe import PROBE_TOKENS
from sinkattn.hf.probe.result import ProbeResult
from sinkattn.hf.swap.ring_patch import RingPatch
from sinkattn.hf.trial.agreement import BOUND, Record, check_agreement, relative_error
from sinkattn.hf.trial.original import ATTENTION, ROUNDED, OriginalRun, recorded_forward, settle_input, to_fp32
from sinkattn.hf.unsupported import UnsupportedModelError

# Few, so that the ring is tried as well.
TRIAL_SINKS = 2


# Several tokens to begin, several that follow on several, and a decode step.
TRIAL_CALLS = (4, 3, 1)


# Draws of a random rounding: one alone may be small by luck.
DRAWS = 3


def try_out(model: PreTrainedModel, layout: ops.RingLayout, backend: ops.Backend, probe_result: ProbeResult) -> None:
    """Refuse a model that does not agree with itself once it is swapped; it is left as it was.

    Raises:
        UnsupportedModelError: saying where the two differ, and by how much.
    """
    name, decoder, eps = type(model).__name__, probe_result.decoder, torch.finfo(model.dtype).eps
    # All tokens are in sight, but only just: a window that is too short by one shows.
    sinks = min(layout.num_sinks, TRIAL_SINKS)
    trial = Trial(model, ops.RingLayout(sinks, PROBE_TOKENS - sinks), backend, probe_result)
    record, ids = trial.record, sample_ids(model, PROBE_TOKENS)
    calls = ids.split(TRIAL_CALLS, dim=1)
    generator = torch.Generator(ids.device).manual_seed(0)  # torch's own is the user's

    def original(*calls: Tensor, rounding: float = 0.0) -> Tensor:
        with OriginalRun(probe_result, record, rounding, generator).in_place():
            return trial.run_calls(calls, DynamicCache(config=decoder.config))

    def swapped(allowed: Callable[[nn.Module, str], float]) -> SinkCache:
        try:
            trial.install()
            cache = SinkCache(model)
            got = trial.run_calls(calls, cache)
        finally:
            trial.remove()
        for (module, what), error in record.compare().items():
            where = f"the {what} of layer {probe_result.layers[module].index}"
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
            scaled = probe_result.layers[module].temperature is not None
            return max(8 * eps if scaled else BOUND, 4 * noise[module, what])

        def as_it_is_used(module: nn.Module, what: str) -> float:
            rounding = noise.get((module, ROUNDED), noise[module, what])
            return max(32 * eps, 4 * rounding)

        states = _states_in_modules(probe_result)
        cache = swapped(in_fp32)
        if changed := _states_in_modules(probe_result) ^ states:
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


class Trial(RingPatch):
    """A swap whose attention is compared with the original's, in fp32 or as it will be used."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.record = Record()
        self.wide = True
        """Whether attention runs in fp32."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options) -> Tensor:
        """Attention of one layer; where its family calls an attention function, what is on record."""
        if self.probe_result.forwards:
            return super().attend(module, query, key, value, scale, **options)
        inputs = {"queries": query, "keys": key, "values": value}
        if self.probe_result.layers[module].temperature is not None:
            del inputs["queries"]  # the original has scaled its own by their position already
        inputs = {what: settle_input(self.record, module, what, x) for what, x in inputs.items()}
        inputs = {"queries": to_fp32(query), **inputs}
        if not self.wide:
            inputs = {what: x.to(query.dtype) for what, x in inputs.items()}
        out = super().attend(module, *inputs.values(), scale, **options).transpose(1, 2)
        return self.record.settle(module, ATTENTION, to_fp32(out)).transpose(1, 2).to(query.dtype)

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
        for module, forward in self.probe_result.forwards.items():
            on_record = partial(recorded_forward, module, forward, self.record, wide=self.wide)
            self.set_forward(module, on_record)


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever the user has allowed (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _states_in_modules(probe_result: ProbeResult) -> set[tuple[str, int, int]]:
    """Tensors that modules hold beside their parameters: a state would be there, and change with every call."""
    rotaries = set(probe_result.rotaries)
    return {
        (f"{type(module).__name__}.{name}", id(x), x._version)
        for module in probe_result.decoder.modules()
        if module not in rotaries
        for name, x in (*vars(module).items(), *module.named_buffers(recurse=False))
        if isinstance(x, Tensor)
    }
