"""Streams for models that add absolute positions to their embeddings: the context is encoded anew when it is full.

A key of such a model has its position in it for good and cannot be moved. So the context of a token grows up to
``num_sinks + window`` tokens, as it does without sinkattn; then the sinks and the last half of the window are kept,
those of the window are encoded at their new positions, and it grows again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from sinkattn.hf.agreement import check_agreement, relative_error
from sinkattn.hf.cache import SinkCache
from sinkattn.hf.cache_layers import SinkLayer, Streams
from sinkattn.hf.enabled import Enabled, sample_ids
from sinkattn.hf.inputs import check_positions, present_tokens, stream_positions
from sinkattn.hf.lanes import Lane, context_start, rebuild_period
from sinkattn.hf.probe import UnsupportedModelError, find_decoder, trained_length
from sinkattn.hf.unchanged import evaluation_mode
from sinkattn.hf.versions import cache_name
from sinkattn.ops import RingLayout, check_no_gradients, check_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_TOKEN = {"input_ids", "attention_mask", "position_ids"}


class Padding(NamedTuple):
    """Which of the new tokens count."""

    present: Tensor
    """Which ones: bool ``[batch, tokens]``."""
    counts: list[int]
    """How many in each row."""


class Arrival(NamedTuple):
    """New tokens of a lane."""

    lane: Lane
    ids: Tensor
    """int64 ``[rows of the lane, tokens]``, none of them padding."""
    where: tuple[Tensor, Tensor | slice] | None
    """Index of these in ``[batch, tokens]`` of the call; None if they are all of it."""


class ReencodeCache(SinkCache):
    """`SinkCache` of a model that streams by re-encoding: lanes, each with its ids and one context."""

    def __init__(self, model: PreTrainedModel, max_batch_size: int | None = None) -> None:
        super().__init__(model, max_batch_size)
        self._drop()

    def _drop(self) -> None:
        self.lanes: list[Lane] = []
        """Each row of the batch is in one of them; none before the first forward."""
        self._seen: Tensor | None = None
        self.layers[0].__dict__.pop("batch_size", None)

    def _changed(self) -> None:
        self.layers[0].batch_size = sum(len(lane.rows) for lane in self.lanes)
        self._seen = None

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has seen, without padding, on the host."""
        lengths = {row: lane.seen for lane in self.lanes for row in lane.rows}
        return [lengths[row] for row in range(len(lengths))]

    @property
    def seen(self) -> Tensor | None:
        """Tokens that each row has seen, without padding: int64 ``[batch]``, on the device; None before the first."""
        if self._seen is None and self.lanes:
            lane = self.lanes[0]
            if len(self.lanes) == 1:  # filled on the device, which is not waited for
                self._seen = lane.ids.new_full((len(lane.rows),), lane.seen, dtype=torch.int64)
            else:
                self._seen = torch.tensor(self.lengths, device=lane.ids.device)
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers, and of the ids."""
        return sum(lane.nbytes for lane in self.lanes)

    def arrivals(self, ids: Tensor, padding: Padding | None) -> list[Arrival]:
        """What arrives in each lane that gets new tokens, of ids ``[batch, tokens]`` with this padding among them.

        A lane whose rows get different numbers of tokens is split first. Lanes never merge.
        """
        batch, tokens = ids.shape
        if not self.lanes:
            self.lanes = [Lane(self.layout, range(batch), ids.new_empty(batch, 0))]
        if padding is None and len(self.lanes) == 1:
            return [Arrival(self.lanes[0], ids, None)]
        counts = [tokens] * batch if padding is None else padding.counts
        parts = [(count, part) for lane in self.lanes for count, part in lane.split(counts).items()]
        self.lanes = [lane for _, lane in parts]
        if padding is not None:
            # Columns of each row, those of tokens that count first.
            order = (~padding.present).to(torch.int8).argsort(dim=1, stable=True)
        arrivals = []
        for count, lane in parts:
            if count:
                rows = torch.tensor(lane.rows, device=ids.device)
                where = (rows, slice(None)) if padding is None else (rows.unsqueeze(1), order[rows, :count])
                arrivals.append(Arrival(lane, ids[where], where))
        return arrivals

    def finish(self, arrivals: list[Arrival], padding: Padding | None) -> None:
        """Close the forward: what arrived counts."""
        before = self.seen
        for lane, ids, _ in arrivals:
            lane.append(ids)
        self._changed()
        self._count_columns(None if padding is None else padding.present, before)

    def abandon(self) -> None:
        """Close a forward that failed: its tokens do not count."""
        self.streams.arriving = self.streams.ids = None
        if self.tokens_seen == 0:
            self._drop()

    def can_take_back(self, counts: Tensor, rows: Tensor) -> bool:
        """Whether ``counts[i]`` tokens, int64, can be taken back of row ``rows[i]``; columns are left as they are.

        As many as come after the first token whose context is among the ids that are kept: `Lane.most_back`.
        """
        most = {row: lane.most_back for lane in self.lanes for row in lane.rows}
        return all(count <= most[row] for count, row in zip(counts.tolist(), rows.tolist(), strict=True))

    def take_back(self, counts: int | Tensor) -> None:
        """Forget the last ``counts`` tokens of every row, int64 ``[batch]``; columns are left as they are.

        Raises RuntimeError, with nothing changed, if they cannot all be taken back: `can_take_back`.
        """
        by_row = [counts] * self.batch_size if isinstance(counts, int) else counts.tolist()
        for lane in self.lanes:
            for row in lane.rows:
                if by_row[row] > lane.most_back:
                    raise RuntimeError(
                        f"cache: can go back {lane.most_back} tokens more (headroom {self.layout.headroom}), got "
                        f"{by_row[row]} in row {row}"
                    )
        parts = [part for lane in self.lanes for part in lane.split(by_row).items()]
        for count, lane in parts:
            lane.take_back(count)
        self.lanes = [lane for _, lane in parts]
        self._changed()
        self._note_rolled_back(counts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was: integers ``[batch]``."""
        if self.lanes:
            device = self.lanes[0].ids.device
            beam_idx = beam_idx.to(device, torch.int64)
            check_tensor("beam_idx", beam_idx, (self.batch_size,), torch.int64, device)
            self._take_rows(beam_idx)
            self._reorder_notes(beam_idx)

    def _take_rows(self, indices: Tensor) -> None:
        if len(self.lanes) == 1:
            # Nothing has to be read from the device.
            self.lanes = [self.lanes[0].take(indices, range(len(indices)))]
        else:
            sources, lanes = indices.tolist(), []
            if not all(0 <= source < self.batch_size for source in sources):
                raise IndexError(f"indices: expected rows from 0 to {self.batch_size - 1}, got {sources}")
            for lane in self.lanes:
                places = {row: place for place, row in enumerate(lane.rows)}
                rows = [row for row, source in enumerate(sources) if source in places]
                if rows:
                    taken = torch.tensor([places[sources[row]] for row in rows], device=indices.device)
                    lanes.append(lane.take(taken, rows))
            self.lanes = lanes
        self._changed()

    def reset(self) -> None:
        """Start all streams anew; nothing of the old ones is left in memory."""
        super().reset()
        self._drop()


class Reencode(Enabled):
    """What `enable` leaves on a model that adds positions to its embeddings."""

    cache_class = ReencodeCache

    def cache_layers(self, streams: Streams) -> list[SinkLayer]:
        """One layer, which says how many tokens were seen; keys and values are in the lanes of the cache."""
        return [SinkLayer(streams, self.layout)]

    def forward(self, *args, **kwargs) -> Any:
        """Forward of the decoder: cuts its tokens where the context is rebuilt, and joins the outputs."""
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
        if torch.is_grad_enabled():
            check_no_gradients(*self.decoder.parameters())

        config = self.decoder.config
        use_cache, return_dict = (
            kwargs[name] if kwargs.get(name) is not None else getattr(config, name, True)
            for name in ("use_cache", "return_dict")
        )
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        kwargs |= {"attention_mask": None, "use_cache": True, "return_dict": True}
        cache.begin(batch, tokens, ids)
        try:
            padding = _padding(mask, cache, tokens)
            if position_ids is not None and not cache.counts_anew:
                present = None if padding is None else padding.present
                check_positions(position_ids, stream_positions(cache, present, tokens, ids.device), present)
            arrivals = cache.arrivals(ids, padding)
            # Where there is nothing but padding, any token shows what the outputs look like.
            run = arrivals or [Arrival(Lane(self.layout, [0], ids.new_empty(1, 0)), ids.new_zeros(1, 1), None)]
            kinds, states = zip(*(self._run_lane(arrival, kwargs) for arrival in run), strict=True)
            last_hidden_state, *hidden_states = (
                _place(parts, arrivals, batch, tokens) for parts in zip(*states, strict=True)
            )
            output = kinds[0](
                last_hidden_state=last_hidden_state,
                **{self.cache_argument: cache if use_cache else None},
                hidden_states=tuple(hidden_states) or None,
            )
        except BaseException:
            cache.abandon()
            raise
        cache.finish(arrivals, padding)
        return output if return_dict else output.to_tuple()

    def _run_lane(self, arrival: Arrival, kwargs: dict[str, Any]) -> tuple[type, tuple[Tensor | None, ...]]:
        """Class of the decoder's output, and its states for what has arrived: the last hidden ones, then every layer's.

        Not all layers' are there if some were asked for by index.
        """
        parts = []
        for piece, first, new in arrival.lane.pieces(arrival.ids):
            positions = torch.arange(first, first + piece.shape[1], device=piece.device).unsqueeze(0)
            provided = {"input_ids": piece, "position_ids": positions, self.cache_argument: arrival.lane.context}
            output = self.run(**{**kwargs, **provided})
            states = (output.last_hidden_state, *(output.hidden_states or ()))
            parts.append([None if x is None else x[:, -new:] for x in states])
        joined = (None if xs[0] is None else torch.cat(xs, dim=1) for xs in zip(*parts, strict=True))
        return type(output), tuple(joined)


def _place(parts: Sequence[Tensor | None], arrivals: list[Arrival], batch: int, tokens: int) -> Tensor | None:
    """States of what has arrived in one tensor ``[batch, tokens, hidden]``, each where its token is; else zeros."""
    if parts[0] is None or (arrivals and arrivals[0].where is None):
        return parts[0]
    placed = parts[0].new_zeros(batch, tokens, parts[0].shape[-1])
    for arrival, part in zip(arrivals, parts, strict=False):
        placed[arrival.where] = part
    return placed


def _padding(attention_mask: Tensor | None, cache: ReencodeCache, tokens: int) -> Padding | None:
    """Padding among the new tokens, anywhere in their rows; None if there is none."""
    present = present_tokens(attention_mask, cache, tokens)
    if present is None:
        return None
    # Read even where that stops a GPU: how many tokens come decides what runs.
    counts = present.sum(dim=1).tolist()
    return None if min(counts) == tokens else Padding(present, counts)


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
