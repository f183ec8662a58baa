"""Try a patch before `enable` installs it: on a short stream it must agree with the original model in every layer.

Both run the same calls, the original with a cache of transformers, so that everything but attention is computed in the
same shapes. On both sides attention runs in fp32, on the queries, keys and values that the model gives in its own
dtype. The original rotates them by the embedding that the probe found and has compared with the model's own, whose
results are rounded to the model's dtype. In half precision the patched model runs once more, in the model's dtype.
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
from sinkattn.hf.ranks import wait_for_ranks
from sinkattn.hf.swap.ring_patch import RingPatch
from sinkattn.hf.trial.agreement import MAX_FP32_ERROR, AttentionRecord, check_agreement, relative_error
from sinkattn.hf.trial.original import (
    OUTPUT,
    PERTURBED_OUTPUT,
    OriginalRun,
    record_or_replay_input,
    recorded_forward,
    to_fp32,
)
from sinkattn.hf.unsupported import UnsupportedModelError

# Few enough that some tokens of the trial are in the ring.
MAX_SINKS = 2
# Tokens per call: a prefill, a second chunk and a decode step.
CALL_SIZES = (4, 3, 1)
# Random perturbations of the original; the effect of a single one may be small by chance.
NUM_PERTURBATIONS = 3


def run_trial(model: PreTrainedModel, layout: ops.RingLayout, backend: ops.Backend, probe_result: ProbeResult) -> None:
    """Refuse a model that does not agree with the original once it is patched; leaves the model unchanged.

    Raises:
        UnsupportedModelError: with the place and size of the difference.
    """
    name, decoder, eps = type(model).__name__, probe_result.decoder, torch.finfo(model.dtype).eps
    # The last query sees all tokens and no more would fit, so a window that is one token too short gives an error.
    num_sinks = min(layout.num_sinks, MAX_SINKS)
    trial = Trial(model, ops.RingLayout(num_sinks, PROBE_TOKENS - num_sinks), backend, probe_result)
    record, ids = trial.record, sample_ids(model, PROBE_TOKENS)
    calls = ids.split(CALL_SIZES, dim=1)
    generator = torch.Generator(ids.device).manual_seed(0)  # leaves the global random state alone

    def original(*calls: Tensor, noise: float = 0.0) -> Tensor:
        with OriginalRun(probe_result, record, noise, generator).installed():
            return trial.hidden_states(calls, DynamicCache(config=decoder.config))

    def check_swap(allowed: Callable[[nn.Module, str], float]) -> SinkCache:
        try:
            trial.install()
            cache = SinkCache(model)
            got = trial.hidden_states(calls, cache)
        finally:
            trial.remove()
        for (module, tensor), error in record.pop_errors().items():
            where = f"the {tensor} of layer {probe_result.layers[module].index}"
            check_agreement(name, where, error, allowed(module, tensor))
        allowed_at_end = max(MAX_FP32_ERROR, 2 * original_noise)
        check_agreement(name, "its hidden states", relative_error(got, want), allowed_at_end)
        return cache

    with _full_fp32():
        want = original(*calls)
        record.end_recording()
        # Runs of the original also differ by themselves if its kernels do not always sum in the same order.
        original_noise = max(relative_error(original(*calls, noise=eps / 2), want) for _ in range(NUM_PERTURBATIONS))
        noise = record.pop_errors()

        def allowed_in_fp32(module: nn.Module, tensor: str) -> float:
            if tensor != OUTPUT:
                return max(8 * eps, 2 * noise[module, tensor])
            # Queries scaled by their position were rounded to the model's dtype once more.
            has_temperature = probe_result.layers[module].temperature is not None
            return max(8 * eps if has_temperature else MAX_FP32_ERROR, 4 * noise[module, tensor])

        def allowed_in_model_dtype(module: nn.Module, tensor: str) -> float:
            rounding = noise.get((module, PERTURBED_OUTPUT), noise[module, tensor])
            return max(32 * eps, 4 * rounding)

        tensors_before = _tensors_in_modules(probe_result)
        cache = check_swap(allowed_in_fp32)
        if changed := _tensors_in_modules(probe_result) ^ tensors_before:
            raise UnsupportedModelError(
                f"{name}: keeps a stream's state in its modules: {sorted({tensor for tensor, *_ in changed})}"
            )
        if eps > torch.finfo(torch.float32).eps:
            trial.in_fp32 = False
            check_swap(allowed_in_model_dtype)
        if cache.has_states:
            # A state that restarts in every call causes errors far above rounding, even through all layers.
            error, allowed = relative_error(original(ids), want), max(1e-2, 4 * eps)
            if error > allowed:
                raise UnsupportedModelError(
                    f"{name}: does not continue from its own cache: hidden states of several calls differ from those "
                    f"of one call by {error:.1e} (allowed: {allowed:.1e})"
                )


class Trial(RingPatch):
    """A `RingPatch` whose attention is compared with the original's, in fp32 or in the model's dtype."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.record = AttentionRecord()
        self.in_fp32 = True

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any
    ) -> Tensor:
        """Attention of one layer on the recorded inputs; families with an adapter record theirs in `install`."""
        if self.probe_result.adapter_forwards:
            return super().attend(module, query, key, value, scale, **options)
        inputs = {"queries": query, "keys": key, "values": value}
        if self.probe_result.layers[module].temperature is not None:
            del inputs["queries"]  # the recorded ones are scaled by their position already
        inputs = {name: record_or_replay_input(self.record, module, name, x) for name, x in inputs.items()}
        inputs = {"queries": to_fp32(query), **inputs}
        if not self.in_fp32:
            inputs = {name: x.to(query.dtype) for name, x in inputs.items()}
        out = super().attend(module, inputs["queries"], inputs["keys"], inputs["values"], scale, **options)
        out = self.record.record_or_replay(module, OUTPUT, to_fp32(out.transpose(1, 2)))
        return out.transpose(1, 2).to(query.dtype)

    def hidden_states(self, calls: tuple[Tensor, ...], cache: Cache) -> Tensor:
        """Run the decoder as it is now on consecutive chunks of ids; returns ``[batch, tokens, hidden]``."""
        parts, first = [], 0
        for ids in calls:
            num_tokens = ids.shape[1]
            options: dict[str, Any] = {self.cache_argument: cache, "use_cache": True}
            if "position_ids" in self.parameters:
                options["position_ids"] = torch.arange(first, first + num_tokens, device=ids.device).unsqueeze(0)
            self.record.first_token, self.record.num_tokens = first, num_tokens
            wait_for_ranks(self.model)
            parts.append(self.decoder(input_ids=ids, **options)[0])
            first += num_tokens
        return torch.cat(parts, dim=1)

    def install(self) -> None:
        """Install the swap, with adapter forwards that record or replay their output."""
        super().install()
        for module, forward in self.probe_result.adapter_forwards.items():
            recorded = partial(recorded_forward, module, forward, self.record, in_fp32=self.in_fp32)
            self.set_forward(module, recorded)


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in full precision, also if the user has enabled TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tensors_in_modules(probe_result: ProbeResult) -> set[tuple[str, int, int]]:
    """(name, id, version) of buffers and tensor attributes: a state kept in a module would change in every call."""
    rotary_modules = set(probe_result.rotary_modules)
    return {
        (f"{type(module).__name__}.{name}", id(x), x._version)
        for module in probe_result.decoder.modules()
        if module not in rotary_modules
        for name, x in (*vars(module).items(), *module.named_buffers(recurse=False))
        if isinstance(x, Tensor)
    }
