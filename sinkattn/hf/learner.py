"""`OnlineLearner`: an enabled model that learns from a stream while it reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.versions import forward_cache

Selection = Literal["lora", "all"] | Callable[[str, nn.Parameter], bool]
# Defaults of the optimizer: AdamW without weight decay, as moments of few steps are all it has.
LORA_RATE, WEIGHT_RATE = 1e-3, 1e-5
LORA_RANK = 8
ADAPTER = "online"
ADAPTER_FILE = "adapter_model.safetensors"  # of peft


class _LearnerState(NamedTuple):
    """What `OnlineLearner.undo` restores."""

    weights: list[Tensor]
    gradients: list[Tensor | None]
    optimizer: dict[str, Any]
    num_updates: int
    num_chunks: int


class OnlineLearner:
    """Reads a stream, predicts each token, and then learns from it (dynamic evaluation, arXiv 1904.08378).

    A piece is read in chunks. Every token of a chunk is predicted with weights that have not seen it; then the
    gradients of the chunk's losses are taken, with what came before as a constant, and after ``every`` chunks the
    optimizer makes a step. So the losses that `step` returns are prequential: those of a model that learns as it goes.

    Args:
        model: a model prepared by `sinkattn.enable`; may be wrapped by peft. It learns in place, in its present mode.
        optimizer: an optimizer of the weights that learn, or a function that makes one of a list of them; default:
            AdamW, with a rate of 1e-3 for adapters and 1e-5 for weights.
        chunk: tokens of each stream in a forward and backward.
        learn: what learns: "lora", new adapters of rank 8 on the MLPs of the middle half of the layers (needs peft);
            "all" weights; or a function of name and parameter that says whether it does, for adapters that there are.
        every: chunks per step of the optimizer.
        after_update: "keep" goes on with the keys and values that earlier weights have made; "reencode" feeds the
            tokens in sight again after every update.
        decay: after every update, the fraction of the way back to the first weights.
        max_norm: gradients are clipped to this norm; None for no limit.

    Raises:
        ValueError: for an invalid argument, a model that is not enabled, or if nothing would learn.
        ImportError: "lora" without peft.

    Attributes:
        cache: the stream, for generating from it: ``model.generate(..., cache=copy.deepcopy(learner.cache))``.
        parameters: the parameters that learn, by name.
        num_updates: steps of the optimizer so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        *,
        chunk: int = 256,
        learn: Selection = "lora",
        every: int = 1,
        after_update: Literal["keep", "reencode"] = "keep",
        decay: float = 0.0,
        max_norm: float | None = 1.0,
    ) -> None:
        require_patch(model)
        for name, count in (("chunk", chunk), ("every", every)):
            if count < 1:
                raise ValueError(f"{name}: expected 1 or more, got {count}")
        if chunk < 2:
            raise ValueError("chunk: expected 2 or more, as the first token of a chunk has no gradient, got 1")
        if after_update not in ("keep", "reencode"):
            raise ValueError(f"after_update: expected 'keep' or 'reencode', got {after_update!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected 0 to 1, got {decay}")
        self.model = model
        self.chunk, self.every, self.decay, self.max_norm = chunk, every, decay, max_norm
        self.after_update = after_update
        self._has_own_adapters = learn == "lora"
        self.parameters = _select(model, learn)
        weights = list(self.parameters.values())
        if isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer = optimizer
        elif optimizer is not None:
            self.optimizer = optimizer(weights)
        else:
            self.optimizer = torch.optim.AdamW(
                weights, lr=LORA_RATE if learn == "lora" else WEIGHT_RATE, weight_decay=0
            )
        self.cache = SinkCache(model)
        self.num_updates = 0
        self._is_frozen = False
        self._num_chunks = 0  # since the last update
        self._last_logits: Tensor | None = None
        self._in_sight: Tensor | None = None
        self._first = [x.detach().clone() for x in weights] if decay else []
        self._before: _LearnerState | None = None

    def step(self, piece: Tensor, mask: Tensor | None = None) -> float:
        """Read a piece: predict each of its tokens, and learn from them.

        Args:
            piece: ids ``[tokens]`` or ``[batch, tokens]``, the next ones of each stream.
            mask: which of them to learn from, bool of the same shape; all of them if None. All are predicted.

        Returns:
            The mean loss in nats of the tokens that were predicted: all but the first one of all; NaN without any.

        Raises:
            ValueError: for a piece or mask of another shape; nothing is changed.
        """
        piece, mask = self._checked(piece, mask)
        if not self._is_frozen:
            self._before = self._state()
        total, count = torch.zeros((), dtype=torch.float64, device=piece.device), 0
        for first in range(0, piece.shape[1], self.chunk):
            part = slice(first, first + self.chunk)
            losses = self._read(piece[:, part], None if mask is None else mask[:, part])
            total += losses.double().sum()
            count += losses.numel()
        return (total / count).item() if count else float("nan")

    def undo(self) -> None:
        """Take back what the last `step` has learned: weights and optimizer are what they were, bit for bit.

        The stream goes on: its tokens stay in the cache.

        Raises:
            RuntimeError: if there is nothing to take back.
        """
        if self._before is None:
            raise RuntimeError("learner: expected a step to take back, got none since the last undo")
        before, self._before = self._before, None
        with torch.no_grad():
            for x, weight, gradient in zip(self.parameters.values(), before.weights, before.gradients, strict=True):
                x.copy_(weight)
                x.grad = gradient
        self.optimizer.load_state_dict(before.optimizer)
        self.num_updates, self._num_chunks = before.num_updates, before.num_chunks
        self._refresh()

    def freeze(self) -> None:
        """Learn no more: `step` only predicts from now on."""
        self._is_frozen = True
        self._before = None
        self.optimizer.zero_grad(set_to_none=True)
        for x in self.parameters.values():
            x.requires_grad = False

    def save(self, path: str | Path) -> None:
        """Save what learns, the adapters or the model, as ``save_pretrained`` does, and the optimizer into a folder."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self._has_own_adapters:
            _save_adapters(self.model, path)
        else:
            self.model.save_pretrained(path)
        torch.save({"optimizer": self.optimizer.state_dict(), "num_updates": self.num_updates}, path / "learner.pt")

    def _state(self) -> _LearnerState:
        weights = list(self.parameters.values())
        return _LearnerState(
            [x.detach().clone() for x in weights],
            [None if x.grad is None else x.grad.clone() for x in weights],
            copy.deepcopy(self.optimizer.state_dict()),
            self.num_updates,
            self._num_chunks,
        )

    def _checked(self, piece: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if piece.ndim not in (1, 2) or piece.is_floating_point():
            raise ValueError(f"piece: expected ids [tokens] or [batch, tokens], got {piece.dtype} {list(piece.shape)}")
        if mask is not None and (mask.shape != piece.shape or mask.dtype != torch.bool):
            raise ValueError(f"mask: expected bool {list(piece.shape)}, got {mask.dtype} {list(mask.shape)}")
        rows = 1 if piece.ndim == 1 else len(piece)
        if self._in_sight is not None and rows != len(self._in_sight):
            raise ValueError(f"piece: expected {len(self._in_sight)} streams, as before, got {rows}")
        device = self.model.device
        ids = piece.reshape(rows, -1).to(device)
        return ids, None if mask is None else mask.reshape(rows, -1).to(device)

    def _read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Losses of a chunk, with the weights from before it; then learns from it."""
        learns = not self._is_frozen and ids.shape[1] > 1
        with torch.set_grad_enabled(learns):
            logits = self._forward(ids)
            losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            losses = losses.view(len(ids), -1)
            if learns:
                counted = losses if mask is None else losses[mask[:, 1:]]
                if counted.numel():
                    (counted.mean() / self.every).backward()
        scored = losses.detach()
        if self._last_logits is not None:
            boundary = cross_entropy(self._last_logits.float(), ids[:, 0], reduction="none")
            scored = torch.cat((boundary[:, None], scored), dim=1)
        self._last_logits = logits[:, -1].detach()
        if learns:
            self._num_chunks += 1
            if self._num_chunks == self.every:
                self._update()
        return scored

    def _forward(self, ids: Tensor) -> Tensor:
        options: dict[str, Any] = {forward_cache(self.model): self.cache, "use_cache": True}
        layout = self.cache.layout
        past = ids if self._in_sight is None else torch.cat((self._in_sight, ids), dim=1)
        if (extra := past.shape[1] - layout.num_sinks - layout.window) > 0:
            past = torch.cat((past[:, : layout.num_sinks], past[:, layout.num_sinks + extra :]), dim=1)
        logits = self.model(input_ids=ids, **options).logits
        self._in_sight = past
        return logits

    def _update(self) -> None:
        weights = list(self.parameters.values())
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(weights, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.decay:
            with torch.no_grad():
                for x, first in zip(weights, self._first, strict=True):
                    x.lerp_(first, self.decay)
        self._num_chunks = 0
        self.num_updates += 1
        self._refresh()

    def _refresh(self) -> None:
        """Encode the tokens in sight again, after the weights have changed, if that was asked for."""
        if self.after_update == "reencode" and self._in_sight is not None:
            self.cache.reset()
            ids, self._in_sight = self._in_sight, None
            with torch.no_grad():
                self._last_logits = self._forward(ids)[:, -1]


def _select(model: PreTrainedModel, learn: Selection) -> dict[str, nn.Parameter]:
    """The parameters that learn; all others get no gradients from now on."""
    if learn == "lora":
        _add_adapters(model)
        chosen: Callable[[str, nn.Parameter], bool] = lambda name, _: f".{ADAPTER}." in name  # noqa: E731
    elif learn == "all":
        chosen = lambda _, parameter: parameter.is_floating_point()  # noqa: E731
    elif callable(learn):
        chosen = learn
    else:
        raise ValueError(f"learn: expected 'lora', 'all' or a function of name and parameter, got {learn!r}")
    selected = {name: x for name, x in model.named_parameters() if chosen(name, x)}
    if not selected:
        raise ValueError("learn: expected at least one parameter that learns, got none")
    for x in model.parameters():
        x.requires_grad = False
    for x in selected.values():
        x.requires_grad = True
    return selected


def _add_adapters(model: PreTrainedModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"learn: expected a function of name and parameter for a {type(model).__name__}, which has adapters of its "
            "own, got 'lora'"
        )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    middle = list(range(layers // 4, layers - layers // 4))
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=sorted(set(_linear_names(model))),
        layers_to_transform=middle,
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _save_adapters(model: Any, path: Path) -> None:
    """Save them as peft does, for ``PeftModel.from_pretrained``."""
    from peft import get_peft_model_state_dict

    adapters = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    save_file({f"base_model.model.{name}": x.contiguous() for name, x in adapters.items()}, path / ADAPTER_FILE)
    model.peft_config[ADAPTER].save_pretrained(path)


def _linear_names(model: nn.Module) -> Iterator[str]:
    """Names, within their block, of the linear layers of MLPs; of all blocks' linear layers if none is called so."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    in_mlps = [name for name in linears if ".mlp." in name or ".feed_forward." in name]
    return (name.rpartition(".")[2] for name in in_mlps or linears if any(part.isdigit() for part in name.split(".")))
