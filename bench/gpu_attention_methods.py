"""Methods of attention of one layer that gpu_attention.py and gpu_compiled.py time, and their inputs.

* ``sinkattn int8``, ``sinkattn fp8`` (decode): over rings of 8 bits.
* ``sinkattn split`` (chunk): the keys of few queries split over programs.
* ``sdpa flash``, ``sdpa cudnn``: only that backend of PyTorch's attention, over contiguous keys that are rotated
  already, with nothing appended.
* ``sdpa grouped`` (decode): the same, with the query heads of a group passed as if they were tokens.
* ``dynamic-cache``: rotation, transformers' DynamicCache kept at this length, and PyTorch's attention.
* ``static-cache``: rotation, the layer of transformers' StaticCache, exactly as long as needed, and PyTorch's
  attention, without the mask that transformers would pass.
* ``static-sliding``: the same with the layer for sliding windows, which moves all of its tokens in every step. It keeps
  no sinks.
* ``streaming-llm``: as in bench_attention.py: caches keys unrotated, concatenates, rotates all keys again.
* ``flash-attn``, ``flashinfer``: these packages, if installed. flash-attn rotates and appends too, FlashInfer only
  attends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bench_attention import HEAD_DIM, HEADS, KV_HEADS, NUM_SINKS
from bench_attention import rotate as rotate_as_transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.models.llama.modeling_llama import repeat_kv

import sinkattn
from sinkattn import ops
from sinkattn.kernels import attention
from sinkattn.rope import rotate

DTYPE = torch.bfloat16
L2_MULTIPLE = 8  # bytes of all layers' caches, in multiples of the L2 cache
# Values of the sinks and of the new token are larger than all others, so that an output without one of them is wrong.
VALUE_SCALE = 16
# Largest cache for streaming-llm, which copies about twenty times as many bytes.
MAX_STREAMING_LLM_BYTES = 2e8


class Heads(NamedTuple):
    """Query heads, KV heads, head_dim of a model."""

    query: int = HEADS
    kv: int = KV_HEADS
    dim: int = HEAD_DIM

    def __str__(self) -> str:
        return f"H{self.query}-Hkv{self.kv}-D{self.dim}"

    @property
    def group(self) -> int:
        return self.query // self.kv

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.dim)


LLAMA = Heads()


@dataclass
class Inputs:
    """Inputs of every method, not rotated yet.

    past: keys, values ``[batch, KV heads, tokens, head_dim]``. new: query ``[batch, heads, tokens, head_dim]``, key and
    value. mask: bool ``[new tokens, past and new tokens]``; None if all are visible. num_layers: caches to cycle
    through.
    """

    window: int
    past: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor, Tensor]
    rope: sinkattn.Rope
    heads: Heads = LLAMA
    num_layers: int = 1
    mask: Tensor | None = None
    contiguous_layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.new[0].device

    def tables(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, pairs]``."""
        return self.rope.tables(torch.arange(first, first + tokens, device=self.device))

    def new_tables(self) -> tuple[Tensor, Tensor]:
        """Tables of the new tokens as in transformers: ``[tokens, head_dim]``, in the dtype of the cache."""
        tables = self.tables(self.past[0].shape[2], self.new[0].shape[2])
        return tuple(torch.cat((x, x), dim=-1).to(DTYPE) for x in tables)

    def rotated_query(self) -> Tensor:
        return rotate(self.new[0], *self.tables(self.past[0].shape[2], self.new[0].shape[2]), interleaved=False)

    def rotated_past(self) -> Tensor:
        return rotate(self.past[0], *self.tables(0, self.past[0].shape[2]), interleaved=False)

    def contiguous_keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys, and values, of past and new tokens, per layer; shared by methods that do not change them."""
        if not self.contiguous_layers:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.past, self.new[1:], strict=True))
            first = rotate(keys, *self.tables(0, keys.shape[2]), interleaved=False), values
            self.contiguous_layers = [first, *(tuple(x.clone() for x in first) for _ in range(self.num_layers - 1))]
        return self.contiguous_layers


def random_inputs(
    device: torch.device, batch: int, window: int, past: int, new: int, rope: sinkattn.Rope, heads: Heads = LLAMA
) -> Inputs:
    torch.manual_seed(0)
    shapes = [(heads.kv, past), (heads.kv, past), (heads.query, new), (heads.kv, new), (heads.kv, new)]
    tensors = [torch.randn(batch, *shape, heads.dim, dtype=DTYPE, device=device) for shape in shapes]
    tensors[1][:, :, :NUM_SINKS] *= VALUE_SCALE
    tensors[4] *= VALUE_SCALE
    return Inputs(window, tuple(tensors[:2]), tuple(tensors[2:]), rope, heads)


def num_layers_beyond_l2(device: torch.device, layer_bytes: int) -> int:
    """Number of layers whose caches are `L2_MULTIPLE` times as large as the L2 cache; two on a CPU."""
    if device.type == "cpu":
        return 2
    return max(1, math.ceil(L2_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size / layer_bytes))


class Method:
    """A method of attention. A step leaves its layer unchanged, or writes the same token to the same slot."""

    capture = True

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.prepare()
        self.layers = [self.make_layer(i) for i in range(inputs.num_layers)]

    def prepare(self) -> None:
        """Prepare what all layers share, untimed."""

    def make_layer(self, i: int) -> Any:
        raise NotImplementedError

    def step(self, layer: Any) -> Tensor:
        """Attention of the new tokens ``[batch, heads, tokens, head_dim]``."""
        raise NotImplementedError

    def first_output(self) -> Tensor:
        """Output of a step on the first layer."""
        return self.step(self.layers[0])

    def run_all_layers(self) -> None:
        for layer in self.layers:
            self.step(layer)


class Sinkattn(Method):
    cache_dtype: str | None = None

    def make_layer(self, i: int) -> sinkattn.RingKVCache:
        (keys, values), window = self.inputs.past, self.inputs.window
        ring = sinkattn.RingKVCache(
            len(keys),
            self.inputs.heads.kv,
            self.inputs.heads.dim,
            NUM_SINKS,
            window,
            dtype=keys.dtype,
            device=keys.device,
            cache_dtype=self.cache_dtype,
        )
        ring.append(keys, values, rope=self.inputs.rope)
        if i == 0:
            tokens = self.inputs.new[0].shape[2]
            self.tables = self.inputs.rope.stream_tables(ring.seen, tokens, num_sinks=NUM_SINKS, window=window)
        return ring

    def step(self, ring: sinkattn.RingKVCache) -> Tensor:
        options = {
            "num_sinks": NUM_SINKS,
            "window": self.inputs.window,
            "scale": self.inputs.heads.scale,
            "arrivals": ring.arrivals,
            **ring.eight_bit,
        }
        return ops.sink_attention_(ring.keys, ring.values, *self.inputs.new, ring.seen, *self.tables, **options)


class SinkattnInt8(Sinkattn):
    cache_dtype = "int8"


class SinkattnFp8(Sinkattn):
    cache_dtype = "fp8"


class SinkattnSplit(Sinkattn):
    """Keys of few queries split over programs, which is not the default."""

    def step(self, ring: sinkattn.RingKVCache) -> Tensor:
        with patch.object(attention, "SPLIT_CHUNKS", True):
            return super().step(ring)


class Sdpa(Method):
    backend: SDPBackend

    def prepare(self) -> None:
        self.query = self.inputs.rotated_query()

    def make_layer(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs.contiguous_keys_and_values()[i]

    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(self.query, *layer, scale=self.inputs.heads.scale, enable_gqa=True)


class SdpaFlash(Sdpa):
    backend = SDPBackend.FLASH_ATTENTION


class SdpaCudnn(Sdpa):
    backend = SDPBackend.CUDNN_ATTENTION


class SdpaGrouped(Sdpa):
    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        groups = (len(self.query), self.inputs.heads.kv, self.inputs.heads.group, self.inputs.heads.dim)
        return F.scaled_dot_product_attention(self.query.view(groups), *layer, scale=self.inputs.heads.scale).reshape(
            self.query.shape
        )


class TransformersCache(Method):
    """Rotation, a cache layer of transformers, and PyTorch's attention."""

    def prepare(self) -> None:
        self.tables = self.inputs.new_tables()

    def attend(self, update: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        query, key, value = self.inputs.new
        layer = update(rotate_as_transformers(key, self.tables), value)
        query = rotate_as_transformers(query, self.tables)
        return F.scaled_dot_product_attention(query, *layer, scale=self.inputs.heads.scale, enable_gqa=True)


class ConstantLengthDynamicCache(TransformersCache):
    def make_layer(self, i: int) -> Any:
        cache = DynamicCache()
        cache.update(self.inputs.rotated_past(), self.inputs.past[1], layer_idx=0)
        return cache.layers[0]

    def step(self, layer: Any) -> Tensor:
        before = layer.keys, layer.values
        out = self.attend(layer.update)
        layer.keys, layer.values = before
        return out


class StaticCache(TransformersCache):
    def prepare(self) -> None:
        super().prepare()
        self.past = self.inputs.past[0].shape[2]
        self.lengths = torch.full((self.inputs.num_layers,), self.past, device=self.inputs.device)

    def make_layer(self, i: int) -> StaticLayer:
        keys, values = self.inputs.contiguous_keys_and_values()[i]
        layer = StaticLayer(keys.shape[2])
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        layer.keys, layer.values = keys, values
        layer.cumulative_length = self.lengths[i]
        return layer

    def step(self, layer: StaticLayer) -> Tensor:
        return self.attend(layer.update)

    def first_output(self) -> Tensor:
        self.lengths.fill_(self.past)
        return super().first_output()

    def run_all_layers(self) -> None:
        # Before the steps, so that after a step that failed the next one does not write out of bounds.
        self.lengths.fill_(self.past)
        super().run_all_layers()


class StaticSliding(TransformersCache):
    # Every step builds an index from a Python list, which synchronises with the device.
    capture = False

    def make_layer(self, i: int) -> StaticSlidingWindowLayer:
        past, values = self.inputs.rotated_past(), self.inputs.past[1]
        tokens = past.shape[2] + 1
        layer = StaticSlidingWindowLayer(max_cache_len=tokens, sliding_window=tokens)
        # Full, with one more token at the front, which the first step evicts.
        layer.update(*(torch.cat((x[:, :, :1], x), dim=2) for x in (past, values)))
        return layer

    def step(self, layer: StaticSlidingWindowLayer) -> Tensor:
        return self.attend(layer.update)


class StreamingLLM(Method):
    def prepare(self) -> None:
        if sum(x.nbytes for x in self.inputs.past) > MAX_STREAMING_LLM_BYTES:
            raise ValueError("not tried on caches as large as this")
        past = self.inputs.past[0].shape[2]
        tables = self.inputs.tables(0, past + 1)
        self.tables = tuple(torch.cat((x, x), dim=-1).to(DTYPE) for x in tables)
        self.last_tables = tuple(x[-1:] for x in self.tables)

    def make_layer(self, i: int) -> list[Tensor]:
        # Full, with one more token between sinks and window, which the step evicts.
        return [torch.cat((x[:, :, : NUM_SINKS + 1], x[:, :, NUM_SINKS:]), dim=2) for x in self.inputs.past]

    def step(self, layer: list[Tensor]) -> Tensor:
        query, *new = self.inputs.new
        pairs = zip(layer, new, strict=True)
        keys, values = (torch.cat((x[:, :, :NUM_SINKS], x[:, :, NUM_SINKS + 1 :], y), dim=2) for x, y in pairs)
        keys, values = (
            repeat_kv(x, self.inputs.heads.group) for x in (rotate_as_transformers(keys, self.tables), values)
        )
        scores = rotate_as_transformers(query, self.last_tables) @ keys.transpose(2, 3) * self.inputs.heads.scale
        return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values


class FlashAttn(Method):
    def prepare(self) -> None:
        from flash_attn import flash_attn_with_kvcache

        self.run = flash_attn_with_kvcache
        batch, _, self.past, _ = self.inputs.past[0].shape
        self.tables = tuple(x.to(DTYPE) for x in self.inputs.tables(0, self.past + 1))
        self.lengths = torch.full((batch,), self.past, dtype=torch.int32, device=self.inputs.device)
        self.new = [x.transpose(1, 2).contiguous() for x in self.inputs.new]

    def make_layer(self, i: int) -> list[Tensor]:
        return [x.transpose(1, 2).contiguous() for x in self.inputs.contiguous_keys_and_values()[i]]

    def step(self, layer: list[Tensor]) -> Tensor:
        query, key, value = self.new
        cos, sin = self.tables
        options = {"rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": self.lengths, "rotary_interleaved": False}
        return self.run(
            query, *layer, key, value, softmax_scale=self.inputs.heads.scale, causal=True, **options
        ).transpose(1, 2)


class FlashInfer(Method):
    PAGE = 16

    def prepare(self) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self.query = self.inputs.rotated_query()[:, :, 0].contiguous()
        batch, _, past, _ = self.inputs.past[0].shape
        self.tokens = past + 1
        self.pages = -(-self.tokens // self.PAGE)
        space = torch.zeros(2**28, dtype=torch.uint8, device=self.inputs.device)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
        counts = {"dtype": torch.int32, "device": self.inputs.device}
        self.wrapper.plan(
            torch.arange(0, (batch + 1) * self.pages, self.pages, **counts),
            torch.arange(batch * self.pages, **counts),
            torch.full((batch,), (self.tokens - 1) % self.PAGE + 1, **counts),
            self.inputs.heads.query,
            self.inputs.heads.kv,
            self.inputs.heads.dim,
            self.PAGE,
            q_data_type=DTYPE,
            kv_data_type=DTYPE,
            sm_scale=self.inputs.heads.scale,
        )

    def make_layer(self, i: int) -> Tensor:
        # [batch * pages, keys and values, KV heads, PAGE, head_dim]
        padding = self.pages * self.PAGE - self.tokens
        both = torch.stack([F.pad(x, (0, 0, 0, padding)) for x in self.inputs.contiguous_keys_and_values()[i]])
        paged = both.unflatten(3, (self.pages, self.PAGE)).permute(1, 3, 0, 2, 4, 5)
        return paged.flatten(0, 1).contiguous()

    def step(self, layer: Tensor) -> Tensor:
        return self.wrapper.run(self.query, layer).unsqueeze(2)


class SdpaMasked(Method):
    """PyTorch's attention with the mask, in the backend that it chooses; keys and values repeated per query head."""

    def prepare(self) -> None:
        self.query = self.inputs.rotated_query()

    def make_layer(self, i: int) -> tuple[Tensor, Tensor]:
        return tuple(repeat_kv(x, self.inputs.heads.group) for x in self.inputs.contiguous_keys_and_values()[i])

    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query, *layer, attn_mask=self.inputs.mask, scale=self.inputs.heads.scale
        )


class Append(Sinkattn):
    def prepare(self) -> None:
        # A copy for each layer, so that it is read from memory, as the ring is.
        self.sources = [[x.clone() for x in self.inputs.new[1:]] for _ in range(self.inputs.num_layers)]

    def make_layer(self, i: int) -> tuple[sinkattn.RingKVCache, list[Tensor]]:
        return super().make_layer(i), self.sources[i]

    def step(self, layer: tuple[sinkattn.RingKVCache, list[Tensor]]) -> None:
        ring, new = layer
        cos, sin = (x[0] for x in self.tables)
        ops.append_(ring.keys, ring.values, *new, ring.seen, num_sinks=NUM_SINKS, cos=cos, sin=sin)


EIGHT_BIT: dict[str, type[Method]] = {"sinkattn int8": SinkattnInt8, "sinkattn fp8": SinkattnFp8}
BASELINES: dict[str, type[Method]] = {
    "sdpa flash": SdpaFlash,
    "sdpa cudnn": SdpaCudnn,
    "sdpa grouped": SdpaGrouped,
    "dynamic-cache": ConstantLengthDynamicCache,
    "static-cache": StaticCache,
    "static-sliding": StaticSliding,
    "streaming-llm": StreamingLLM,
    "flash-attn": FlashAttn,
    "flashinfer": FlashInfer,
}
