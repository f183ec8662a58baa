"""`enable` patches a loaded model so that it streams; `disable` restores it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkattn import ops
from sinkattn.argument_checks import check_whole
from sinkattn.hf.adapters import probe_by_adapter
from sinkattn.hf.cache.sink_cache import SinkCache, check_cache
from sinkattn.hf.dry_run import evaluation_mode, preserve_state
from sinkattn.hf.model_config import default_window, rope_parameters, trained_length
from sinkattn.hf.model_patch import get_patch, require_patch
from sinkattn.hf.probe.probe import probe
from sinkattn.hf.ranks import OtherRankError, check_distribution, num_ranks, uneven_heads, wait_for_ranks
from sinkattn.hf.reencode.trial import enable_by_reencoding, has_absolute_positions
from sinkattn.hf.swap.captured_step import CudaGraph, NewGraph
from sinkattn.hf.swap.ring_patch import RingPatch
from sinkattn.hf.trial.compiled import compile_step
from sinkattn.hf.trial.measure import measure_key_factors
from sinkattn.hf.trial.trial import run_trial
from sinkattn.hf.unsupported import UnsupportedModelError
from sinkattn.ring_cache import CacheDtype, check_cache_dtype

Model = TypeVar("Model", bound=nn.Module)


def enable(
    model: Model,
    num_sinks: int = 4,
    window: int | None = None,
    headroom: int = 0,
    *,
    backend: ops.Backend = "auto",
    compile: bool = False,
    graphs: bool | Literal["auto"] = "auto",
    cache_dtype: CacheDtype | None = None,
) -> Model:
    """Patch a loaded transformers model, in place, to run on endless streams with constant memory and time per token.

    Every token sees the first ``num_sinks`` tokens and the ``window`` most recent ones, itself included, at positions
    relative to the cache. On inputs of up to ``num_sinks + window`` tokens outputs stay the same. First the model is
    probed and the patched model is compared with the original on a short input; a model that fails is refused.

    A model with absolute position embeddings streams by re-encoding: when ``num_sinks + window`` tokens are in sight,
    half of the window is dropped and the other half encoded again. Memory is constant, and so is the average time per
    token.

    On a CPU, linear layers of a model without absolute position embeddings run in a kernel of sinkattn for up to four
    tokens at once, if their weights are in half precision or torchao's int8. Weights are read where they are.

    Change the model's configuration before `enable`, not after: the decoder of an enabled model may read a copy, since
    other models may share the original.

    Args:
        model: a causal language model of transformers, in any float dtype, on one device; may be wrapped by peft or
            torch.compile. If its heads are spread over processes (``tp_plan``), all of them call `enable` and then the
            model in the same way; each keeps the keys and values of its own heads.
        num_sinks: tokens at the start of a stream that always stay visible.
        window: most recent tokens that a query sees, itself included; default: 1,020, or as many as the model was
            trained for. If only some layers of the model have a sliding window of their own, those keep it.
        headroom: spare slots: the number of tokens that can always be rolled back. Prompt lookup and assisted decoding
            need as many as they propose at once (``prompt_lookup_num_tokens``, ``num_assistant_tokens``).
        backend: "auto", "cpu", "triton" or "reference"; the environment variable SINKATTN_BACKEND overrides it.
        compile: compile the decode step (one token for each stream) with ``torch.compile``, now for a single stream,
            later for other batch sizes; prompts stay as they are. Takes ten to thirty seconds, with torch's cache on
            disk less. Nothing is frozen: other weights, adapters and hooks take effect, but quantize weights before.
        graphs: whether decode steps are captured in a CUDA graph and replayed, after the first few of a cache; of a
            `StreamPool` in one for each of a few numbers of streams. "auto": on a CUDA device. A step that cannot be
            captured, or whose replay gives other values, runs as without graphs; `decode_steps` says why.
        cache_dtype: "int8", or "fp8" for float8_e4m3fn: caches hold all tokens but the sinks in 8 bits, in about half
            of the memory of half precision, and tokens see them rounded. There are no gradients then: call the model
            under ``torch.no_grad()``. None: caches hold all tokens in the dtype of the model.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model is not supported; it is left unchanged.
        TypeError, ValueError: for an invalid argument, a model that is enabled already, or a cache_dtype with a model
            in float64.
        RuntimeError: for a backend that cannot run on the model's device.
    """
    for name, number in (("num_sinks", num_sinks), ("window", 1 if window is None else window), ("headroom", headroom)):
        check_whole(name, number, None)
    if cache_dtype is not None:
        check_cache_dtype(cache_dtype)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if get_patch(model) is not None:
        raise ValueError("model: is enabled already; call sinkattn.disable(model) first")
    if not isinstance(model, PreTrainedModel):
        options: dict[str, Any] = {"compile": compile, "graphs": graphs, "cache_dtype": cache_dtype}
        enable(_unwrap(model), num_sinks, window, headroom, backend=backend, **options)
        return model
    if cache_dtype is not None and model.dtype == torch.float64:
        raise ValueError(f"cache_dtype: expected None for a model in {model.dtype}, got {cache_dtype!r}")
    layout = ops.RingLayout(num_sinks, default_window(model, num_sinks) if window is None else window, headroom)
    new_graph = _graph_class(model, graphs)
    _check_model(model, layout)
    backend = ops.select_backend(model.device, backend, model.dtype)
    if cache_dtype == "fp8" and backend == "triton" and ops.lacks_fp8(model.device):
        raise ValueError(
            f"cache_dtype: expected 'int8' on {model.device}, as the triton backend needs compute capability 8.9 for "
            "fp8, got 'fp8'"
        )
    with _errors_as_unsupported(model):
        with preserve_state(model):
            if has_absolute_positions(model):
                if compile or graphs is True or num_ranks(model) > 1:
                    what = "compiled" if compile else "captured in graphs" if graphs is True else "spread over ranks"
                    raise UnsupportedModelError(
                        f"{type(model).__name__}: a model with absolute positions encodes its window again from time "
                        f"to time, and cannot be {what}"
                    )
                if cache_dtype is not None:
                    raise UnsupportedModelError(
                        f"{type(model).__name__}: a model with absolute positions has no rings, which could be of "
                        f"cache_dtype={cache_dtype!r}"
                    )
                enable_by_reencoding(model, layout)
                return model
            probe_result = probe_by_adapter(model) or probe(model)
            patch = RingPatch(model, layout, backend, probe_result, cache_dtype)
            with evaluation_mode(model):
                # With rings of full precision: what rounding to 8 bits changes depends on the scores, without a bound.
                run_trial(model, layout, backend, probe_result)
                if cache_dtype is not None:
                    patch.key_factors = measure_key_factors(patch)
        try:
            patch.install()
            if compile:
                compile_step(patch)
            else:
                patch.replace_linear_forwards(compiled=False)
            if new_graph is not None:
                patch.capture_steps(new_graph)
            wait_for_ranks(model)
        except BaseException:
            patch.remove()
            raise
    return model


def disable(model: Model) -> Model:
    """Undo `enable`: restore the model exactly. Returns the same model; raises ValueError if it is not enabled."""
    require_patch(model).remove()
    return model


def decode_steps(model: nn.Module, cache: SinkCache) -> str:
    """How an enabled model runs the decode steps of a cache now, in one line.

    Whether they are compiled, and replayed from a graph; if not, why. A graph is captured after the first few steps.

    Raises:
        ValueError: for a model that is not enabled, or a cache of another one.
    """
    patch = require_patch(model)
    check_cache(patch, "cache", cache)
    return patch.describe_steps(cache)


def _graph_class(model: PreTrainedModel, graphs: bool | Literal["auto"]) -> NewGraph | None:
    """What captures the decode steps of a model; None if nothing does."""
    device, ranks = model.device, num_ranks(model)
    if not isinstance(graphs, bool) and graphs != "auto":
        raise ValueError(f"graphs: expected True, False or 'auto', got {graphs!r}")
    if graphs is True and ranks > 1:
        raise ValueError(f"graphs: expected False or 'auto' for a model spread over {ranks} ranks, got True")
    if graphs is True and device.type != "cuda":
        raise ValueError(f"graphs: expected False or 'auto' for a model on {device}, as only CUDA devices have graphs")
    return CudaGraph if graphs and device.type == "cuda" and ranks == 1 else None


def _unwrap(model: Any) -> nn.Module:
    """The model that torch.compile or peft has wrapped."""
    if hasattr(model, "_orig_mod"):
        return model._orig_mod
    if not hasattr(model, "get_base_model"):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    adapter = model.active_peft_config
    if adapter.is_prompt_learning or adapter.is_adaption_prompt:
        raise UnsupportedModelError(
            f"{type(model).__name__}: adapters of type {adapter.peft_type.value} are not supported: they put virtual "
            "tokens before the tokens of every call, but a call continues a stream"
        )
    return model.get_base_model()


@contextmanager
def _errors_as_unsupported(model: PreTrainedModel) -> Iterator[None]:
    """Raise any error of the model's code as UnsupportedModelError, once the other ranks know of it."""
    try:
        yield
    except OtherRankError:
        raise
    except Exception as error:
        wait_for_ranks(model, refused=True)
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__}: could not be tried out: {type(error).__name__}: {error}{uneven_heads(model)}"
        ) from error


def _check_model(model: PreTrainedModel, layout: ops.RingLayout) -> None:
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not supported")
    check_distribution(model)
    if config is not model.config and any("mrope_section" in rope for rope in rope_parameters(model)):
        raise UnsupportedModelError(f"{name}: multimodal positions are not supported; load only its text model")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise UnsupportedModelError(f"{name}: expected all parameters on one device, loaded, got {sorted(devices)}")
    trained = trained_length(model)
    if trained is not None and layout.num_sinks + layout.window > trained:
        raise UnsupportedModelError(
            f"{name}: num_sinks + window must not exceed the {trained} positions it was trained for, "
            f"got {layout.num_sinks + layout.window}"
        )
