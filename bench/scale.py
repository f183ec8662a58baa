"""Memory and time of many streams, on paper: the tables of docs/scale.md. Run it to print them.

Kernel times are those that bench/results/nvidia-h200-2026-11-27.json has; whatever is assumed has a comment.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # of a number in bfloat16
KIB, MB, GB = 1024, 10**6, 10**9
# As `sinkattn serve` reserves them: slots of a system prompt, and of tokens that can be rolled back.
PREFIX, HEADROOM = 512, 512
WINDOWS = (1024, 4096, 16384)
# Assumed: the share of a GPU's memory for weights and streams; the rest is for activations, graphs and the allocator.
USABLE = 0.9
# Measured on an H200, for whatever window and number of streams: a layer's attention takes so many microseconds, and
# besides reads keys and values as fast as a plain copy. That is within 12 % of all nine times (tests/test_scale.py).
LAYER_US, COPY_GBS = 12.0, 4250.0
# Measured on an H200: a captured step of the 8B model, and its attention.
STEP_MS, STEP_WINDOW = 7.93, 4096
# Assumed: of the 989 TFLOP/s of an H200 or H100 in bfloat16, what matrix products of many rows reach.
TFLOPS = 600.0


@dataclass(frozen=True)
class Model:
    """Shape of a model with gated MLPs."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    """Whether the embedding is the output layer, too."""

    @property
    def weights_read(self) -> int:
        """Bytes of the weights that a step reads: all but the embedding."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return BYTES * (self.layers * layer + self.hidden * (self.vocabulary + 1))

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.weights_read + (0 if self.is_tied else BYTES * self.vocabulary * self.hidden)

    @property
    def token(self) -> int:
        """Bytes of the keys and values of a token."""
        return 2 * BYTES * self.layers * self.kv_heads * self.head_dim

    def stream(self, window: int, prefix: int = PREFIX, headroom: int = HEADROOM) -> int:
        """Bytes of a stream's keys and values, full or not."""
        return self.token * (prefix + window + min(headroom, window))


@dataclass(frozen=True)
class Device:
    """One GPU, or several that share a model."""

    name: str
    memory: int
    """Bytes."""
    copy_gbs: float
    count: int = 1


MODELS = [
    Model("1B", 16, 2048, 8192, 32, 8, 64, 128256, is_tied=True),  # Llama 3.2
    Model("8B", 32, 4096, 14336, 32, 8, 128, 128256, is_tied=False),  # Llama 3.1
    Model("70B", 80, 8192, 28672, 64, 8, 128, 128256, is_tied=False),
]
H200 = Device("H200", 141 * GB, COPY_GBS)
# Assumed: as an H200, in proportion to the bandwidths that the vendor gives, 3.35 and 4.8 TB/s.
H100 = Device("H100", 80 * GB, COPY_GBS * 3.35 / 4.8)


def devices(model: Model) -> list[Device]:
    """On which a model is planned: 70B on four GPUs, as its weights alone fill one."""
    count = 4 if model.name == "70B" else 1
    return [Device(x.name, x.memory * count, x.copy_gbs * count, count) for x in (H200, H100)]


def num_streams(model: Model, device: Device, window: int) -> int:
    """Rows that fit into the memory of a device."""
    return max(0, int((USABLE * device.memory - model.weights) // model.stream(window)))


def attention_us(num_streams: int, window: int, kv_heads: int, head_dim: int, copy_gbs: float = COPY_GBS) -> float:
    """Microseconds of the attention of a layer, for a token of each stream."""
    return LAYER_US + num_streams * window * 2 * BYTES * kv_heads * head_dim / copy_gbs / 1000


def step_ms(model: Model, device: Device, num_streams: int, window: int) -> float:
    """Milliseconds of a captured step, a token of each stream; between GPUs without the time of communication."""
    measured = MODELS[1]
    one = measured.layers * attention_us(1, STEP_WINDOW, measured.kv_heads, measured.head_dim) / 1000
    # What is not attention takes as long for several rows as for one, until the products are bound by arithmetic.
    others = (STEP_MS - one) * model.weights_read / measured.weights_read * COPY_GBS / device.copy_gbs
    arithmetic = num_streams * model.weights_read / (TFLOPS * device.count) / GB  # two operations for two bytes
    attention = attention_us(num_streams, window, model.kv_heads, model.head_dim, device.copy_gbs)
    return max(others, arithmetic) + model.layers * attention / 1000


def tables() -> str:
    """The tables of docs/scale.md that need no simulation."""
    lines = [
        "| model | weights, GB | a token, KiB | W = 1k, MB | W = 4k, MB | W = 16k, MB |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        sizes = " | ".join(f"{model.stream(w) / MB:,.0f}" for w in WINDOWS)
        lines.append(f"| {model.name} | {model.weights / GB:.1f} | {model.token / KIB:.0f} | {sizes} |")
    lines += [
        "",
        "| model | on | W | streams | per GPU | ms a step | tokens/s, all streams |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for device in devices(model):
            for window in WINDOWS:
                count = num_streams(model, device, window)
                step = step_ms(model, device, count, window)
                on = device.name if device.count == 1 else f"{device.count} x {device.name}"
                streams, each = f"{count:,}", f"{count / device.count:,.0f}"
                cells = (
                    model.name,
                    on,
                    f"{window // 1024}k",
                    streams,
                    each,
                    f"{step:.1f}",
                    f"{count / step * 1000:,.0f}",
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
