"""Streams for models that add absolute positions to their embeddings: the context is encoded anew when it is full.

A key of such a model has its position in it for good and cannot be moved. So the context of a token grows up to
``num_sinks + window`` tokens, as it does without sinkattn; then the sinks and the last half of the window are kept,
those of the window are encoded at their new positions, and it grows again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from sinkattn.hf.agreement import check_agreement, relative_error
from sinkattn.hf.cache import SinkCache, SinkLayer, Streams
from sinkattn.hf.enabled import Enabled, check_positions, readable, sample_ids
from sinkattn.hf.probe import UnsupportedModelError, evaluation_mode, find_decoder, trained_length
from sinkattn.hf.versions import cache_name
from sinkattn.ops import RingLayout, check_no_gradients, check_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_TOKEN = {"input_ids", "attention_mask", "position_ids"}


def kept_tokens(layout: RingLayout) -> int:
    """Tokens of the window that stay in the context when it is rebuilt."""
    return layout.window // 2


def rebuild_period(layout: RingLayout) -> int:
    """Tokens from one rebuild to the next."""
    return layout.window - kept_tokens(layout)


def extra_tokens(layout: RingLayout) -> float:
    """Tokens that are encoded anew for each token of a long stream, on average; the sinks stay as they are."""
    return kept_tokens(layout) / rebuild_period(layout)


def context_start(token: int, layout: RingLayout) -> int:
    """First token after the sinks in the context of a token, both counted from 0 in the stream.

    The context of token t is the sinks and {context_start(t) .. t}: up to ``num_sinks + window`` tokens.
    """
    past_full = token - layout.num_sinks - layout.window
    rebuilds = max(0, past_full // rebuild_period(layout) + 1)
    return layout.num_sinks + rebuilds * rebuild_period(layout)


class ContextLayer(CacheLayerMixin):
    """Keys and values of one layer for up to ``capacity`` tokens, in memory that is taken once."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for keys and values like these."""
        # Not inference tensors, even if made under torch.inference_mode(): a stream may go on outside of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.empty(*x.shape[:-2], self.capacity, x.shape[-1], dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[batch, heads, tokens, head_dim]``; returns those of the whole context."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[..., begin : self.length, :] = key_states
        self.values[..., begin : self.length, :] = value_states
        # A stream may enter or leave autocast midway.
        return (
            self.keys[..., : self.length, :].to(key_states.dtype),
            self.values[..., : self.length, :].to(value_states.dtype),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, key offset) of a mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that it holds."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that it can hold."""
        return self.capacity

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, in place."""
        if self.is_initialized:
            for x in (self.keys, self.values):
                x.copy_(x.index_select(0, beam_idx))


class ReencodeCache(SinkCache):
    """`SinkCache` of a model that streams by re-encoding: the ids that may be needed again, and one context."""

    def __init__(self, model: PreTrainedModel, max_batch_size: int | None = None) -> None:
        super().__init__(model, max_batch_size)
        self._drop()

    def _drop(self) -> None:
        self.ids: Tensor | None = None
        """Sinks and recent tokens: int64 ``[batch, up to num_sinks + window - 1 + headroom]``."""
        layout = self.layout
        self._first = layout.num_sinks
        """First token that is kept after the sinks, counted from 0 in the stream."""
        self._peak = 0
        """The furthest point that the stream has reached, in tokens."""
        self.context = Cache(layer_class_to_replicate=partial(ContextLayer, layout.num_sinks + layout.window))
        self._held = (layout.num_sinks, 0)
        """`context_start` of what the context holds, and how many tokens of it are right."""
        self.layers[0].__dict__.pop("batch_size", None)

    def _count(self, tokens: int) -> None:
        self._streams.tokens_seen = self._streams.clean = tokens

    @property
    def seen(self) -> Tensor | None:
        """Tokens that each row has seen: int64 ``[batch]``; None before the first."""
        if self.ids is None:
            return None
        return torch.full((len(self.ids),), self.tokens_seen, dtype=torch.int64, device=self.ids.device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers, and of the ids."""
        held = [x for layer in self.context.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return sum(x.nbytes for x in (*held, *(() if self.ids is None else (self.ids,))))

    def pieces(self, new: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """Cut new tokens, int64 ``[batch, tokens]``, where the context is rebuilt.

        Yields the ids to run, the position of the first of them, and how many at the end are new. The context holds
        what comes before them then; that they have been run is believed when the next piece is asked for.
        """
        sinks, window = self.layout.num_sinks, self.layout.window
        ids = new if self.ids is None else torch.cat((self.ids, new), dim=1)
        token, end = self.tokens_seen, self.tokens_seen + new.shape[1]
        while token < end:
            start = context_start(token, self.layout)
            stop = min(end, start + window)
            held_start, right = self._held
            # The sinks stay where they are in every context.
            right = min(right, sinks + token - start, right if held_start == start else sinks)
            self._held = (start, right)
            for layer in self.context.layers:
                layer.length = right
            past_sinks = sinks + start - self._first
            context = torch.cat((ids[:, :sinks], ids[:, past_sinks : past_sinks + stop - start]), dim=1)
            yield context[:, right:], right, stop - token
            self._held = (start, sinks + stop - start)
            token = stop

    def finish(self, new: Tensor) -> None:
        """Close the forward: its tokens, int64 ``[batch, tokens]``, count."""
        sinks, seen = self.layout.num_sinks, self.tokens_seen + new.shape[1]
        ids = new.clone() if self.ids is None else torch.cat((self.ids, new), dim=1)
        peak = max(self._peak, seen)
        # What the context of the oldest token that can come next needs.
        first = context_start(max(0, peak - self.layout.headroom), self.layout)
        if first > self._first:
            ids = torch.cat((ids[:, :sinks], ids[:, sinks + first - self._first :]), dim=1)
        self.ids, self._first, self._peak = ids, first, peak
        self._remember_beginning()
        self.layers[0].batch_size = len(new)
        self._count(seen)
        self._streams.arriving = None

    def abandon(self) -> None:
        """Close a forward that failed: its tokens do not count."""
        self._streams.arriving = self._streams.ids = None
        if self.tokens_seen == 0:
            self._drop()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (a negative number, as transformers has it).

        Raises ValueError for a positive number, RuntimeError beyond the headroom; nothing is changed then.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"tokens_to_remove: expected a negative number of tokens, got {tokens_to_remove}")
        if count == 0 or self.ids is None:
            return
        headroom = self.layout.headroom
        left = min(headroom - (self._peak - self.tokens_seen), self.tokens_seen)
        if count > left:
            raise RuntimeError(f"cache: can go back {left} tokens more (headroom {headroom}), got {count}")
        self.ids = self.ids[:, : self.ids.shape[1] - count]
        self._count(self.tokens_seen - count)
        self._forget_beginning()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        if self.ids is not None:
            beam_idx = beam_idx.to(self.ids.device, torch.int64)
            check_tensor("beam_idx", beam_idx, (len(self.ids),), torch.int64, self.ids.device)
            super().reorder_cache(beam_idx)
            self.ids = self.ids[beam_idx]
            self.context.reorder_cache(beam_idx)

    def reset(self) -> None:
        """Start all streams anew, in the same memory."""
        if self.ids is not None:
            self.ids = self.ids[:, :0]
        self._first, self._peak, self._held = self.layout.num_sinks, 0, (self.layout.num_sinks, 0)
        self._count(0)


class Reencode(Enabled):
    """What `enable` leaves on a model that adds positions to its embeddings."""

    cache_class = ReencodeCache

    def cache_layers(self, streams: Streams) -> list[SinkLayer]:
        """One layer, which says how many tokens were seen; keys and values are in the `context` of the cache."""
        return [SinkLayer(streams, self.layout)]

    def forward(self, *args, **kwargs) -> Any:
        """Forward of the decoder: cuts its tokens where the context is rebuilt, and joins the outputs of the pieces."""
        kwargs = self.by_name(args, kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name not in PER_TOKEN:
                raise ValueError(f"{name}: a model that streams by re-encoding takes input_ids alone, they are kept")
        ids = kwargs.get("input_ids")
        if ids is None:
            return self.run(**kwargs)  # which says what is missing
        if ids.ndim != 2:
            raise ValueError(f"input_ids: expected [batch, tokens], got {list(ids.shape)}")
        batch, tokens = ids.shape
        cache = self.stream_of(kwargs, batch, tokens)
        positions = torch.arange(cache.tokens_seen, cache.tokens_seen + tokens, device=ids.device)
        mask = kwargs.get("attention_mask")
        if mask is not None and readable(mask, tokens) and not mask.all():
            raise ValueError(
                "attention_mask: padding is not supported in models that stream by re-encoding, expected ones; run "
                "rows of equal length, or one by one"
            )
        check_positions(kwargs.get("position_ids"), positions.unsqueeze(0))
        if torch.is_grad_enabled():
            check_no_gradients(*self.decoder.parameters())

        config = self.decoder.config
        use_cache, return_dict = (
            kwargs[name] if kwargs.get(name) is not None else getattr(config, name, True)
            for name in ("use_cache", "return_dict")
        )
        kwargs |= {
            self.cache_argument: cache.context,
            "attention_mask": None,
            "use_cache": True,
            "return_dict": True,
        }
        cache.begin(batch, tokens, ids)
        finished = False
        try:
            parts = []
            for piece, first, new in cache.pieces(ids):
                kwargs["input_ids"] = piece
                kwargs["position_ids"] = torch.arange(first, first + piece.shape[1], device=ids.device).unsqueeze(0)
                output = self.run(**kwargs)
                parts.append((output.last_hidden_state[:, -new:], _last(output.hidden_states, new)))
            last_hidden_states, hidden_states = zip(*parts, strict=True)
            output = type(output)(
                last_hidden_state=torch.cat(last_hidden_states, dim=1),
                **{self.cache_argument: cache if use_cache else None},
                hidden_states=None if hidden_states[0] is None else tuple(map(_join, zip(*hidden_states, strict=True))),
            )
            finished = True
        finally:
            if finished:
                cache.finish(ids)
            else:
                cache.abandon()
        return output if return_dict else output.to_tuple()


def _last(hidden_states: tuple[Tensor | None, ...] | None, tokens: int) -> tuple[Tensor | None, ...] | None:
    # Not all layers' are there if some were asked for by index.
    return hidden_states and tuple(None if x is None else x[:, -tokens:] for x in hidden_states)


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts, dim=1)


def adds_positions(model: PreTrainedModel) -> bool:
    """Whether a model adds positions to its embeddings, found out by running it.

    A rotation of queries and keys, or a bias by distance, makes no difference to a token that sees itself alone.
    """
    decoder = find_decoder(model)
    parameters = inspect.signature(decoder.forward).parameters
    if not {"input_ids", "position_ids", "use_cache"} <= set(parameters) or cache_name(parameters) is None:
        return False
    if any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return False
    ids = sample_ids(model, 4).view(-1, 1)
    with evaluation_mode(model):
        zero, one = (
            decoder(input_ids=ids, position_ids=torch.full_like(ids, position), use_cache=False)[0]
            for position in (0, 1)
        )
    return not torch.equal(zero, one)


def enable_by_reencoding(model: PreTrainedModel, layout: RingLayout) -> None:
    """Make a model that adds positions to its embeddings stream by re-encoding, after a trial.

    Raises:
        UnsupportedModelError: its outputs are not what they should be; it is left as it was.
    """
    if trained_length(model) is None:
        raise UnsupportedModelError(f"{type(model).__name__}: its configuration does not say how many positions it has")
    # Cheap, and across two rebuilds, whatever the layout that is wanted.
    trial = RingLayout(min(2, layout.num_sinks), min(4, layout.window), 0)
    grown = trial.num_sinks + trial.window
    ids = sample_ids(model, grown + rebuild_period(trial) + 1)
    swap = Reencode(model, find_decoder(model), trial)
    with evaluation_mode(model):
        _check_causal(type(model).__name__, swap.decoder, ids)
        want, again = (_in_contexts(swap.decoder, ids, trial) for _ in range(2))
        try:
            swap.install()
            options = {swap.cache_argument: SinkCache(model)}
            # Cut so that everything is computed in the shapes in which it was.
            calls = ids.tensor_split((trial.num_sinks, grown), dim=1)
            got = torch.cat([swap.decoder(input_ids=call, **options)[0] for call in calls if call.shape[1]], dim=1)
            # Nothing is rounded otherwise than it was, unless kernels add up in another order each time.
            allowed = max(64 * torch.finfo(torch.float32).eps, 2 * relative_error(again, want))
            check_agreement(type(model).__name__, "its hidden states", relative_error(got, want), allowed)
        except BaseException:
            swap.remove()
            raise
    swap.layout = layout


def _check_causal(name: str, decoder: PreTrainedModel, ids: Tensor) -> None:
    """Refuse a decoder whose tokens see what comes after them. ids: ``[2, tokens]``."""

    def earlier(row: int | None) -> Tensor:
        # Hidden states of the first row without its last token, with the last token of a row replaced.
        fed = ids.clone()
        if row is not None:
            fed[row, -1] = ids[row, 0]
        return decoder(input_ids=fed, use_cache=False)[0][0, :-1]

    want = earlier(None)
    # All shapes are the same, so nothing is rounded otherwise, unless scales of a quantisation are those of a batch.
    error, noise = relative_error(earlier(0), want), relative_error(earlier(1), want)
    if error > max(1e-5, 2 * noise):
        raise UnsupportedModelError(f"{name}: is not causal: outputs change by {error:.1e} with the token after")


def _in_contexts(decoder: PreTrainedModel, ids: Tensor, layout: RingLayout) -> Tensor:
    """Hidden states ``[batch, tokens, hidden]`` that the decoder as it is has for each token at the end of its context.

    Every context is encoded from nothing, the sinks first.
    """
    device, parts = ids.device, []
    name = cache_name(inspect.signature(decoder.forward).parameters)
    for start, tokens in groupby(range(ids.shape[1]), key=lambda token: context_start(token, layout)):
        tokens = list(tokens)
        options: dict[str, Any] = {name: DynamicCache(config=decoder.config), "use_cache": True}
        outputs, position = [], 0
        for call in (ids[:, : layout.num_sinks], ids[:, start : tokens[-1] + 1]):
            if call.shape[1]:
                positions = torch.arange(position, position + call.shape[1], device=device).unsqueeze(0)
                outputs.append(decoder(input_ids=call, position_ids=positions, **options)[0])
                position += call.shape[1]
        parts.append(torch.cat(outputs, dim=1)[:, -len(tokens) :])
    return torch.cat(parts, dim=1)
