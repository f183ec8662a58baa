"""`OnlineLearner`: an enabled model that learns from a stream while it reads it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sinkattn.argument_checks import check_fraction, check_path, check_tensors, check_whole
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.ranks import num_ranks
from sinkattn.hf.stream import keep_last_logits
from sinkattn.hf.versions import forward_cache

Selection = Literal["lora", "all"] | Callable[[str, nn.Parameter], bool]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
# Defaults of the optimizer: AdamW without weight decay, as moments of few steps are all it has.
LORA_RATE, WEIGHT_RATE = 1e-3, 1e-5
LORA_RANK = 8
HALF_DTYPES = (torch.float16, torch.bfloat16)
ADAPTER = "online"
ADAPTER_FILE = "adapter_model.safetensors"  # of peft
# Parts of the paths of linear layers, of MLPs and of what chooses experts.
MLP_NAMES = {"mlp", "feed_forward", "ffn", "fc1", "fc2", "block_sparse_moe", "shared_experts", "shared_expert"}
ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}


class _LearnerState(NamedTuple):
    """What `OnlineLearner.undo` restores."""

    weights: list[Tensor]
    gradients: list[Tensor | None]
    moments: list[dict[str, Any] | None]
    settings: list[dict[str, Any]]
    num_updates: int
    num_chunks: int


class _Unlearned(NamedTuple):
    """Tokens that have been predicted, of a chunk that is not complete, and the stream before them."""

    cache: SinkCache
    ids: Tensor
    mask: Tensor


class OnlineLearner:
    """Reads a stream, predicts each token, and then learns from it (dynamic evaluation, arXiv 1904.08378).

    The stream is cut into chunks. Every token of a chunk is predicted with weights that have not seen it; when the
    chunk is complete, the gradients of its losses are taken, with what came before as a constant, and after ``every``
    chunks the optimizer makes a step. So the losses that `step` returns are prequential: those of a model that learns
    as it goes. The first token of a chunk is predicted by the chunk before it, and not learned from.

    Tokens of a chunk that comes in several pieces are encoded twice, once to predict and once to learn.

    Args:
        model: a model prepared by `sinkattn.enable`; may be wrapped by peft. It learns in place, in its present mode.
            From now on only what learns requires gradients.
        optimizer: a function that makes an optimizer of a list of parameters, or an optimizer of exactly those that
            learn; default: AdamW, with a rate of 1e-3 for adapters and 1e-5 for weights.
        chunk: tokens of each stream in a chunk.
        learn: what learns: "lora", adapters of rank 8, in float32 at least, on linear layers of the middle half of the
            blocks, of the MLPs if they have any, else of all (needs peft; a model that has them from an earlier learner
            keeps them); "all" weights; or a function of name and parameter that says whether it does.
        every: chunks per step of the optimizer.
        after_update: "keep" goes on with the keys and values that earlier weights have made; "reencode" feeds the
            tokens in sight again after every update, as a new stream in the same cache.
        decay: after every update, the fraction of the way back to the first weights.
        max_norm: gradients are clipped to this norm; None for no limit. Those that are not finite are dropped, with a
            warning.

    Raises:
        ValueError: for an invalid argument, a model that is not enabled or cannot learn, or if nothing would learn.
        ImportError: "lora" without peft.

    Attributes:
        cache: the stream, for generating from it: ``model.generate(..., cache=copy.deepcopy(learner.cache))``.
        parameters: the parameters that learn, by name.
        num_updates: steps of the optimizer so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
        *,
        chunk: int = 256,
        learn: Selection = "lora",
        every: int = 1,
        after_update: Literal["keep", "reencode"] = "keep",
        decay: float = 0.0,
        max_norm: float | None = 1.0,
    ) -> None:
        check_whole("chunk", chunk)
        if chunk < 2:
            raise ValueError(
                f"chunk: expected 2 or more, as the first token of a chunk is not learned from, got {chunk}"
            )
        check_whole("every", every, 1)
        check_fraction("decay", decay)
        if max_norm is not None and not (isinstance(max_norm, Real) and max_norm > 0):
            raise ValueError(f"max_norm: expected more than 0, or None, got {max_norm!r}")
        if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer) or callable(optimizer)):
            raise TypeError(f"optimizer: expected an optimizer, or a function, got {type(optimizer).__name__}")
        if after_update not in ("keep", "reencode"):
            raise ValueError(f"after_update: expected 'keep' or 'reencode', got {after_update!r}")
        if learn == "lora" and isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError("optimizer: expected a function that makes one, as the adapters are new, got an optimizer")
        self.cache = _new_cache(model)
        if (ranks := num_ranks(model)) > 1:
            raise ValueError(f"model: expected one in one process to learn, got one spread over {ranks} ranks")
        self.model = model
        self.chunk, self.every, self.decay, self.max_norm = chunk, every, decay, max_norm
        self.after_update = after_update
        self._has_own_adapters = learn == "lora"
        self.parameters = _select(model, learn)
        self._weights = list(self.parameters.values())
        self.optimizer = _optimizer(optimizer, self.parameters, LORA_RATE if learn == "lora" else WEIGHT_RATE)
        chosen = set(map(id, self._weights))
        for x in model.parameters():
            x.requires_grad = id(x) in chosen
        self._drop_gradients()
        self.num_updates = 0
        self._is_frozen = False
        self._num_chunks = 0  # since the last update
        self._last_logits: Tensor | None = None
        self._in_sight: Tensor | None = None
        self._unlearned: _Unlearned | None = None
        self._first = [x.detach().clone() for x in self._weights] if decay else []
        self._before: _LearnerState | None = None

    def step(self, piece: Tensor, mask: Tensor | None = None) -> float:
        """Read a piece: predict each of its tokens, and learn from the chunks that it completes.

        Args:
            piece: ids ``[tokens]`` or ``[batch, tokens]``, the next ones of each stream.
            mask: which of them to learn from, bool of the same shape; all of them if None. All are predicted.

        Returns:
            The mean loss in nats of the tokens that were predicted: all but the first one of all; NaN without any.

        Raises:
            ValueError: for a piece or mask of another shape; nothing is changed.
            RuntimeError: under ``torch.inference_mode()``; nothing is changed.
        """
        ids, mask = self.checked(piece, mask)
        if not self._is_frozen:
            # Copies of weights and moments, for `undo`.
            self._before = self._state()
        total, count, first = 0.0, 0, 0
        while first < ids.shape[1]:
            pending = 0 if self._unlearned is None else self._unlearned.ids.shape[1]
            part = slice(first, first + self.chunk - pending)
            losses = self._read(ids[:, part], mask[:, part])
            total += float(losses.double().sum())
            count += losses.numel()
            first = part.stop
        return total / count if count else float("nan")

    def undo(self) -> None:
        """Take back what the last `step` has learned: weights and optimizer are what they were, bit for bit.

        The stream goes on: its tokens stay in the cache. With ``after_update="keep"`` so do keys, values and the next
        prediction of the weights that are taken back. A chunk that is not complete yet is not learned from.

        Raises:
            RuntimeError: if there is nothing to take back.
        """
        if self._before is None:
            raise RuntimeError("learner: expected a step to take back, got none since the last undo")
        before, self._before, self._unlearned = self._before, None, None
        with torch.no_grad():
            for x, weight, gradient in zip(self._weights, before.weights, before.gradients, strict=True):
                x.copy_(weight)
                x.grad = gradient
        # Not by load_state_dict, which converts moments to the dtype of the weights.
        for x, moments in zip(self._weights, before.moments, strict=True):
            if moments is None:
                self.optimizer.state.pop(x, None)
            else:
                self.optimizer.state[x] = moments
        for group, settings in zip(self.optimizer.param_groups, before.settings, strict=True):
            group.update(settings)
        self.num_updates, self._num_chunks = before.num_updates, before.num_chunks
        self._reencode()

    def freeze(self) -> None:
        """Learn no more: `step` only predicts from now on."""
        self._is_frozen = True
        self._before = self._unlearned = None
        self._drop_gradients()
        for x in self._weights:
            x.requires_grad = False

    def save(self, path: str | Path) -> None:
        """Save what learns: adapters, for ``PeftModel.from_pretrained``, or the model by its ``save_pretrained``."""
        check_path("path", path)
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self._has_own_adapters:
            _save_adapters(self.model, path)
        else:
            self.model.save_pretrained(path)

    def checked(self, piece: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check the arguments of `step`; returns ids and mask ``[batch, tokens]`` on the device of the model."""
        check_tensors(piece=piece, **({} if mask is None else {"mask": mask}))
        if piece.ndim not in (1, 2) or piece.is_floating_point():
            raise ValueError(f"piece: expected ids [tokens] or [batch, tokens], got {piece.dtype} {list(piece.shape)}")
        if mask is not None and (mask.shape != piece.shape or mask.dtype != torch.bool):
            raise ValueError(f"mask: expected bool {list(piece.shape)}, got {mask.dtype} {list(mask.shape)}")
        rows = 1 if piece.ndim == 1 else len(piece)
        if self._in_sight is not None and rows != len(self._in_sight):
            raise ValueError(f"piece: expected {len(self._in_sight)} streams, as before, got {rows}")
        if torch.is_inference_mode_enabled() and not self._is_frozen:
            raise RuntimeError("learner: learns from gradients, which torch.inference_mode() never records")
        ids = piece.reshape(rows, -1).to(self.model.device)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.reshape(rows, -1).to(ids.device)
        return ids, mask

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Losses of the next part of a chunk, by the weights of before; learns from the chunk if it is complete."""
        learns = not self._is_frozen
        is_whole = self._unlearned is None and ids.shape[1] == self.chunk
        before = copy.deepcopy(self.cache) if learns and not is_whole and self._unlearned is None else None
        with torch.set_grad_enabled(learns and is_whole):
            logits = self._forward(ids, self.cache)
            losses = _losses(logits, ids)
        scored = losses.detach()
        if self._last_logits is not None:
            boundary = cross_entropy(self._last_logits.float(), ids[:, 0], reduction="none")
            scored = torch.cat((boundary[:, None], scored), dim=1)
        self._last_logits = logits[:, -1].detach()
        self._note(ids)
        if learns and is_whole:
            self._learn(losses, mask)
        elif learns:
            self._keep_for_later(before, ids, mask)
        return scored

    def _keep_for_later(self, before: SinkCache | None, ids: Tensor, mask: Tensor) -> None:
        """Keep a part of a chunk, with the stream from before the first one; learn from the chunk if it is complete."""
        if before is not None:
            self._unlearned = _Unlearned(before, ids, mask)
        else:
            assert self._unlearned is not None
            cache, past_ids, past_mask = self._unlearned
            self._unlearned = _Unlearned(cache, torch.cat((past_ids, ids), 1), torch.cat((past_mask, mask), 1))
        if self._unlearned.ids.shape[1] == self.chunk:
            (cache, ids, mask), self._unlearned = self._unlearned, None
            with torch.enable_grad():
                losses = _losses(self._forward(ids, cache), ids)
            self._learn(losses, mask)

    def _forward(self, ids: Tensor, cache: SinkCache, **options: Any) -> Tensor:
        options |= {forward_cache(self.model): cache, "use_cache": True}
        return self.model(input_ids=ids, **options).logits

    def _note(self, ids: Tensor) -> None:
        """Keep the ids that some layer has in sight."""
        num_sinks = self.cache.layout.num_sinks
        past = ids if self._in_sight is None else torch.cat((self._in_sight, ids), dim=1)
        extra = max(0, past.shape[1] - num_sinks - self.cache.widest_window)
        self._in_sight = torch.cat((past[:, :num_sinks], past[:, num_sinks + extra :]), dim=1) if extra else past

    def _learn(self, losses: Tensor, mask: Tensor) -> None:
        """Learn from the losses ``[batch, chunk - 1]`` of a chunk; ``mask``: of its tokens."""
        counted = losses[mask[:, 1:]]
        if not counted.numel():
            return
        try:
            (counted.mean() / self.every).backward()
        except BaseException:
            self._drop_gradients()
            raise
        self._num_chunks += 1
        if self._num_chunks == self.every:
            self._update()

    def _update(self) -> None:
        self._num_chunks = 0
        max_norm = torch.inf if self.max_norm is None else self.max_norm
        # On a CPU one operator for all weights would be no faster, and a `BackgroundLearner` stops only between them.
        foreach = False if self.model.device.type == "cpu" else None
        norm = nn.utils.clip_grad_norm_(self._weights, max_norm, foreach=foreach)
        if not norm.isfinite():
            self._drop_gradients()
            warnings.warn("learner: gradients that are not finite were dropped", RuntimeWarning, stacklevel=5)
            return
        self.optimizer.step()
        self._drop_gradients()
        if self.decay:
            with torch.no_grad():
                for x, first in zip(self._weights, self._first, strict=True):
                    x.lerp_(first, self.decay)
        self.num_updates += 1
        self._reencode()

    def _drop_gradients(self) -> None:
        self._num_chunks = 0
        for x in self._weights:
            x.grad = None

    def _reencode(self) -> None:
        """Encode the tokens in sight again, after the weights have changed, if that was asked for."""
        if self.after_update == "reencode" and self._in_sight is not None:
            self.cache.reset()
            with torch.no_grad():
                logits = self._forward(self._in_sight, self.cache, **keep_last_logits(self.model))
            self._last_logits = logits[:, -1]

    def _state(self) -> _LearnerState:
        states = [self.optimizer.state.get(x) for x in self._weights]
        return _LearnerState(
            [x.detach().clone() for x in self._weights],
            [None if x.grad is None else x.grad.clone() for x in self._weights],
            [None if not state else copy.deepcopy(state) for state in states],
            [{name: x for name, x in group.items() if name != "params"} for group in self.optimizer.param_groups],
            self.num_updates,
            self._num_chunks,
        )


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Losses of all tokens but the first: ``[batch, tokens - 1]``."""
    flat = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


def _new_cache(model: PreTrainedModel) -> SinkCache:
    """A stream of a model that can learn."""
    patch, name = require_patch(model), type(model).__name__
    if patch.model is patch.decoder:
        raise ValueError(f"model: expected one with a language modelling head, got a {name}")
    if patch.cache_dtype is not None:
        raise ValueError(
            f"model: expected one that was enabled without cache_dtype, got cache_dtype={patch.cache_dtype!r}, with "
            "which there are no gradients"
        )
    cache = SinkCache(model)
    if cache.has_states:
        raise ValueError(f"model: expected one that has gradients, got a {name}, which has recurrent layers")
    return cache


def _select(model: PreTrainedModel, learn: Selection) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    if learn == "lora":
        _add_adapters(model)
        return {name: x for name, x in model.named_parameters() if f".{ADAPTER}." in name}
    if learn == "all":
        selected = {name: x for name, x in model.named_parameters() if x.is_floating_point()}
    elif callable(learn):
        selected = {name: x for name, x in model.named_parameters() if learn(name, x)}
    else:
        raise ValueError(f"learn: expected 'lora', 'all' or a function of name and parameter, got {learn!r}")
    if not selected:
        raise ValueError("learn: expected at least one parameter that learns, got none")
    return selected


def _optimizer(
    given: torch.optim.Optimizer | MakeOptimizer | None, parameters: dict[str, nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    weights = list(parameters.values())
    if given is None:
        if half := next((name for name, x in parameters.items() if x.dtype in HALF_DTYPES), None):
            raise ValueError(
                f"optimizer: expected one of your own for weights in half precision ({half}), in which the default "
                "one's steps get lost; or load the model in float32, or learn adapters"
            )
        return torch.optim.AdamW(weights, lr=rate, weight_decay=0)
    optimizer = given if isinstance(given, torch.optim.Optimizer) else given(weights)
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    if held != set(map(id, weights)):
        raise ValueError(
            f"optimizer: expected one of exactly the {len(weights)} parameters that learn, got one of {len(held)}, "
            f"{len(held.intersection(map(id, weights)))} of which do"
        )
    return optimizer


def _add_adapters(model: Any) -> None:
    """Add adapters, unless an earlier learner did."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("learn: 'lora' needs the package peft: pip install 'sinkattn[learn]'") from error
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"learn: expected a function of name and parameter for a {type(model).__name__}, which has adapters of its "
            "own, got 'lora'"
        )
    if ADAPTER not in getattr(model, "peft_config", {}):
        targets = _adapted_layers(model)
        if not targets:
            raise ValueError(f"learn: expected linear layers for adapters, found none in {type(model).__name__}")
        # The weights of GPT-2's Conv1D are transposed; no model has both kinds.
        is_transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, fan_in_fan_out=is_transposed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        for name, x in model.named_parameters():
            if f".{ADAPTER}." in name and x.dtype in HALF_DTYPES:
                x.data = x.data.float()


def _adapted_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers that get adapters."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    middle = range(num_layers // 4, num_layers - num_layers // 4)
    linears = []
    for path, module in model.named_modules():
        index = next((int(part) for part in path.split(".") if part.isdigit()), None)
        is_linear = isinstance(module, nn.Linear | Conv1D)
        if is_linear and index in middle and not ROUTER_NAMES.intersection(path.split(".")):
            linears.append(path)
    return [path for path in linears if MLP_NAMES.intersection(path.split("."))] or linears


def _save_adapters(model: Any, path: Path) -> None:
    """Save them as peft does."""
    from peft import get_peft_model_state_dict

    # No embeddings are among them; by default peft would look for the model's configuration on the hub to see that.
    adapters = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    save_file({f"base_model.model.{name}": x.contiguous() for name, x in adapters.items()}, path / ADAPTER_FILE)
    model.peft_config[ADAPTER].save_pretrained(path)
