"""Gradients of attention over a ring, with the past as a constant (truncated back-propagation through time).

With scores s = scale q.k, weights p = softmax(s), output o = sum p v and the gradient g of the output: dv = p^T g and
ds = p (g.v - g.o). A query is rotated twice, by R(t) for window keys and by R(c) for sink keys (see `sinkattn.rope`),
so dq = R(t)^T dq_window + R(c)^T dq_sinks; a key once. Scores are computed again, by blocks of queries (FlashAttention,
arXiv 2205.14135), so memory grows with the number of new tokens and of those in sight, not with their product.
On CPUs csrc/attention_backward.h does that; elsewhere matrix products of PyTorch or Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sinkattn.attention_arguments import AttentionArguments
from sinkattn.ops.ring import linearise
from sinkattn.rope import rotate, table_dtype

QUERY_BLOCK = 64
# Whether calls of the triton backend get their gradients from Triton kernels. Those have not run on a GPU: `make gpu`
# checks them, times them beside the matrix products, and says which are faster.
TRITON_BACKWARD = False

BackwardKernel = Literal["cpu", "triton"]

_operator = torch.ops.sinkattn.sink_attention_gradients.default


def needs_gradients(call: AttentionArguments) -> bool:
    """Whether autograd records a call."""
    inputs = (call.query, call.key, call.value, call.sink_logits)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def attend_with_gradients(
    attend: Callable[..., Tensor], call: AttentionArguments, kernel: BackwardKernel | None
) -> Tensor:
    """Run ``attend(*call)``; its output has gradients for query, key, value and sink logits of the call.

    ``kernel`` computes them; None: PyTorch's matrix products.
    """
    return _Attention.apply(attend, kernel, call, call.query, call.key, call.value, call.sink_logits)


@torch.library.register_fake("sinkattn::sink_attention_gradients")
def _(keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sink_logits = rest[-3]
    # Tokens before heads in memory, as in the output.
    vectors = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))
    heads = 0 if sink_logits is None else query.shape[1]
    return *vectors, query.new_empty(heads, dtype=table_dtype(query.dtype))


class _Attention(torch.autograd.Function):
    """The operator's forward, and a `_Backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[..., Tensor],
        kernel: BackwardKernel | None,
        call: AttentionArguments,
        *inputs: Tensor | None,
    ) -> Tensor:
        # The ring and its counters change before the backward runs.
        # Can be read on a CPU only, and not in a graph of torch.compile.
        is_fresh = not torch.compiler.is_compiling() and call.seen.is_cpu and not call.seen.any()
        past: tuple[Tensor | None, ...] = (None, None)
        if not is_fresh:
            past = linearise(call.keys, call.values, call.seen, num_sinks=call.num_sinks, window=call.window)
        counts = [None if x is None else x.clone() for x in (call.seen, call.lengths)]
        out = attend(*call)
        ctx.save_for_backward(*inputs, out, *past, *counts, call.cos, call.sin, call.alibi_slopes)
        ctx.kernel = kernel
        ctx.options = call.num_sinks, call.window, call.scale, call.softcap, call.interleaved
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # only once: with gradient checkpointing this runs the layer again
        query, key, value, sink_logits, *_ = saved
        arguments: Any = (*saved, *ctx.options, gradient)
        backward = {None: _Products, "cpu": _Operator, "triton": _Triton}[ctx.kernel](*arguments)
        with torch.autocast(gradient.device.type, enabled=False):
            needed = backward.run()
        dtypes = (query.dtype, key.dtype, value.dtype, None if sink_logits is None else sink_logits.dtype)
        return None, None, None, *(None if x is None else x.to(dtype) for x, dtype in zip(needed, dtypes, strict=True))


@dataclass
class _Part:
    """Keys that some queries see: a slice of those of the past and the new tokens, sinks or others."""

    query: Tensor
    """``[batch, KV heads, group * queries, head_dim]``, scaled, and rotated for these keys."""
    keys: Tensor
    values: Tensor
    visible: Tensor
    """bool ``[batch, 1, queries, keys]``."""
    distances: Tensor
    """Cache-relative distances ``[batch, queries, keys]``."""
    new: slice
    """Which of the new tokens these keys end with."""
    masked: list[slice] = field(default_factory=lambda: [slice(None)])
    """Which of the keys may be invisible to some query."""


@dataclass
class _Backward:
    """One backward: what the forward saved, and the gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    sink_logits: Tensor | None
    out: Tensor
    past_keys: Tensor | None
    past_values: Tensor | None
    seen: Tensor
    lengths: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    alibi_slopes: Tensor | None
    num_sinks: int
    window: int
    scale: float
    softcap: float | None
    interleaved: bool
    gradient: Tensor

    def run(self) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and sink logits."""
        raise NotImplementedError


class _Operator(_Backward):
    """By the operator ``sink_attention_gradients``."""

    def run(self) -> tuple[Tensor | None, ...]:
        past_keys, past_values = self.past_keys, self.past_values
        if past_keys is None or past_values is None:
            past_keys, past_values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (self.key, self.value))
        *gradients, dlogits = _operator(
            past_keys, past_values, self.query, self.key, self.value, self.out, self.gradient, self.seen, self.lengths,
            self.cos, self.sin, self.num_sinks, self.window, self.scale, self.interleaved, self.sink_logits,
            self.softcap, self.alibi_slopes,
        )  # fmt: skip
        return *gradients, None if self.sink_logits is None else dlogits


@dataclass  # anew, as only now there is something to do after __init__
class _Rotated(_Backward):
    """With new keys as the ring holds them, and without what is in padding."""

    def __post_init__(self) -> None:
        self.dtype = table_dtype(self.query.dtype)
        self.kv_heads = self.key.shape[1]
        if self.lengths is not None:
            # A weight of zero does not hide a NaN in padding.
            padding = torch.arange(self.query.shape[2], device=self.seen.device) >= self.lengths[:, None]
            for name in ("query", "key", "value", "out", "gradient"):
                setattr(self, name, getattr(self, name).masked_fill(padding[:, None, :, None], 0))
        # Keys as the ring holds them: rounded to its dtype.
        self.new_keys = self._turned(self.key.to(self.dtype), 0).to(self.key.dtype).to(self.dtype)
        self.new_values = self.value.to(self.dtype)

    def _turned(self, x: Tensor, index: int, sign: int = 1) -> Tensor:
        """Rotated by the tables of this index: 0 for positions in the stream, 1 for those in the cache."""
        if self.cos is None or self.sin is None:
            return x
        cos, sin = (tables[index][:, None].to(self.dtype) for tables in (self.cos, self.sin))
        return rotate(x, cos, sign * sin, interleaved=self.interleaved)


class _Triton(_Rotated):
    """By the Triton kernels."""

    def run(self) -> tuple[Tensor | None, ...]:
        from sinkattn.kernels.gradients import GradientInputs, gradients  # imports triton, which CPU users may lack

        dtype, tokens = self.query.dtype, self.query.shape[2]

        def by_rows(x: Tensor) -> Tensor:
            """``[batch, heads, tokens, dim]`` to ``[batch, KV heads, tokens * group, dim]``."""
            return x.unflatten(1, (self.kv_heads, -1)).transpose(2, 3).flatten(2, 3)

        def by_heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (tokens, -1)).transpose(2, 3).flatten(1, 2)

        turned = [by_rows(self._turned(self.query.to(self.dtype), index).to(dtype)) for index in (0, 1)]
        keys, values = self.new_keys.to(dtype), self.value
        if self.past_keys is not None and self.past_values is not None:
            keys, values = torch.cat((self.past_keys, keys), dim=2), torch.cat((self.past_values, values), dim=2)
        delta = by_rows((self.gradient.to(self.dtype) * self.out.to(self.dtype)).sum(dim=-1, keepdim=True)).squeeze(3)
        window_query, sink_query, keys, values, gradient, delta = (
            x.contiguous() for x in (*turned, keys, values, by_rows(self.gradient), delta)
        )
        found = gradients(
            GradientInputs(
                window_query, sink_query, keys, values, gradient, delta, self.seen, self.lengths, self.sink_logits,
                self.alibi_slopes, tokens, self.num_sinks, self.window, self.scale, self.softcap,
            )
        )  # fmt: skip
        dlogits = None
        if self.sink_logits is not None:
            logits = self.sink_logits.view(self.kv_heads, -1).repeat(1, tokens)
            weights = torch.exp(logits - found.log_sums * math.log(2))
            dlogits = -by_heads((weights * delta)[..., None]).sum(dim=(0, 2, 3))
        dquery = self._turned(by_heads(found.window_query), 0, -1) + self._turned(by_heads(found.sink_query), 1, -1)
        return dquery, self._turned(found.key, 0, -1), found.value, dlogits


class _Products(_Rotated):
    """By matrix products of PyTorch, for blocks of queries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.query.shape[2]
        self.numbers = self.seen[:, None] + torch.arange(tokens, device=self.seen.device)
        """Of the new tokens in their streams: ``[batch, tokens]``."""
        # Can be read on a CPU only.
        self.is_full = self.seen.is_cpu and bool((self.seen >= self.num_sinks + self.window).all())
        """Whether the window of every stream was full before the call."""

    def _by_kv_head(self, x: Tensor) -> Tensor:
        """``[batch, KV heads, group, tokens, dim]``, in the dtype of sums."""
        return x.to(self.dtype).unflatten(1, (self.kv_heads, -1))

    def run(self) -> tuple[Tensor | None, ...]:
        tokens = self.query.shape[2]
        scaled = self.query.to(self.dtype) * self.scale
        queries = [self._by_kv_head(self._turned(scaled, index)) for index in (1, 0)]
        gradient, out = self._by_kv_head(self.gradient), self._by_kv_head(self.out)
        delta = (gradient * out).sum(dim=-1, keepdim=True)
        dqueries = [torch.zeros_like(x) for x in queries]
        dkey, dvalue = torch.zeros_like(self.new_keys), torch.zeros_like(self.new_values)
        dlogits = None if self.sink_logits is None else self.new_keys.new_zeros(self.query.shape[1])
        for first in range(0, tokens, QUERY_BLOCK):
            rows = slice(first, min(first + QUERY_BLOCK, tokens))
            sinks, others = (x[:, :, :, rows].flatten(2, 3) for x in queries)
            parts = [self._sinks(sinks, rows), self._others(others, rows)]
            g, d = (x[:, :, :, rows].flatten(2, 3) for x in (gradient, delta))
            scores = [self._scores(part) for part in parts]
            total = torch.logaddexp(*(x.logsumexp(dim=-1, keepdim=True) for x, _ in scores))
            if self.sink_logits is not None and dlogits is not None:
                logits = self._per_head(self.sink_logits, rows)
                total = torch.logaddexp(total, logits)
                dlogits -= self._sum_per_head((logits - total).exp() * d, rows)
            # Padding sees nothing.
            total = total.masked_fill(total == -torch.inf, 0)
            for part, (score, slope), dquery in zip(parts, scores, dqueries, strict=True):
                weights = score.sub_(total).exp_()
                new = part.new.stop - part.new.start
                dvalue[:, :, part.new] += weights[..., weights.shape[-1] - new :].transpose(2, 3) @ g
                dscore = (g @ part.values.transpose(2, 3)).sub_(d).mul_(weights)
                if slope is not None:
                    dscore.mul_(slope)
                dquery[:, :, :, rows] += (dscore @ part.keys).unflatten(2, (-1, rows.stop - rows.start))
                dkey[:, :, part.new] += dscore[..., dscore.shape[-1] - new :].transpose(2, 3) @ part.query
        of_sinks, of_others = (x.flatten(1, 2) * self.scale for x in dqueries)
        dquery = self._turned(of_sinks, 1, -1) + self._turned(of_others, 0, -1)
        return dquery, self._turned(dkey, 0, -1), dvalue, dlogits

    def _sinks(self, query: Tensor, rows: slice) -> _Part:
        """The sinks, of the past and among the new tokens."""
        new = slice(0, min(self.num_sinks, rows.stop))
        return self._part(query, rows, slice(0, self.num_sinks), new, sinks=True)

    def _others(self, query: Tensor, rows: slice) -> _Part:
        """What is not a sink and in the window of one of the queries, at least."""
        # Of a full window the block's queries see less and less.
        past = slice(self.num_sinks + (rows.start + 1 if self.is_full else 0), None)
        if rows.start >= self.window:
            past = slice(0, 0)
        new = slice(max(0, rows.start - self.window + 1), rows.stop)
        part = self._part(query, rows, past, new, sinks=False)
        count, keys = rows.stop - rows.start, part.keys.shape[2]
        if self.lengths is None and (self.is_full or self.past_keys is None):
            # Those between are visible to all queries of the block.
            first = max(count, self.num_sinks)
            part.masked = [slice(0, min(first, keys)), slice(max(first, keys - count), keys)]
        return part

    def _part(self, query: Tensor, rows: slice, past: slice, new: slice, *, sinks: bool) -> _Part:
        keys, values, numbers = self.new_keys[:, :, new], self.new_values[:, :, new], self.numbers[:, new]
        exists = torch.ones_like(numbers, dtype=torch.bool)
        if self.lengths is not None:
            exists = numbers < (self.seen + self.lengths)[:, None]
        if self.past_keys is not None and self.past_values is not None:
            # Sinks, then the window in order of time: row b has min(seen[b], num_sinks + window) tokens.
            index = torch.arange(self.past_keys.shape[2], device=self.seen.device)[past]
            first = (self.seen - self.window).clamp(min=self.num_sinks)[:, None] - self.num_sinks
            old = index + torch.where(index < self.num_sinks, 0, first)
            keys = torch.cat((self.past_keys[:, :, past].to(self.dtype), keys), dim=2)
            values = torch.cat((self.past_values[:, :, past].to(self.dtype), values), dim=2)
            numbers, exists = torch.cat((old, numbers), 1), torch.cat((old < self.seen[:, None], exists), 1)
        at = self.numbers[:, rows, None]
        numbers = numbers[:, None]
        if sinks:
            visible = (numbers < self.num_sinks) & (numbers <= at)
            at = at.clamp(max=self.num_sinks + self.window - 1)
        else:
            visible = (numbers >= self.num_sinks) & (numbers <= at) & (numbers > at - self.window)
        visible = visible & exists[:, None]
        if self.lengths is not None:
            visible = visible & (self.numbers[:, rows] < (self.seen + self.lengths)[:, None])[:, :, None]
        return _Part(query, keys, values, visible[:, None], at - numbers, new)

    def _scores(self, part: _Part) -> tuple[Tensor, Tensor | None]:
        """Scores as the softmax gets them, -inf where invisible, and their derivative by the scaled products."""
        scores, slope = part.query @ part.keys.transpose(2, 3), None
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = capped * self.softcap, 1 - capped.square()
        by_group = scores.unflatten(2, (-1, part.visible.shape[2]))
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes.to(self.dtype).view(1, self.kv_heads, -1, 1, 1)
            by_group.sub_(slopes * part.distances[:, None, None].to(self.dtype))
        for keys in part.masked:
            by_group[..., keys].masked_fill_(~part.visible[:, None, ..., keys], -torch.inf)
        return scores, slope

    def _per_head(self, x: Tensor, rows: slice) -> Tensor:
        """A value of each head, for the queries of each KV head: ``[1, KV heads, group * queries, 1]``."""
        by_group = x.to(self.dtype).view(1, self.kv_heads, -1, 1)
        return by_group.repeat_interleave(rows.stop - rows.start, dim=2)

    def _sum_per_head(self, x: Tensor, rows: slice) -> Tensor:
        return x.unflatten(2, (-1, rows.stop - rows.start)).sum(dim=(0, 3, 4)).flatten()
