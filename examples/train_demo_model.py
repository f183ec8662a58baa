"""Train and evaluate the demonstration model that ships with sinkattn.

A two-layer Llama of 0.64 M parameters learns to read Python. Its text is the source of the standard library
of the Python that runs this script, so nothing is downloaded. One CPU core trains it in about half an hour.

The model exists to show one thing on any machine: a window that drops the start token breaks the model, a
window that keeps it does not. A model this small, trained this briefly, cannot be counted on to grow attention
sinks from plain text. Three things are meant to bring them about, and with them this is not ordinary
language-model training:

* repeated chunks: half of the chunks of a training sample are exact copies of earlier ones. Copying heads
  form, and a copying head needs a place to put its attention when there is nothing to copy;
* embedding offset: every token embedding but that of the start token begins with one common vector added,
  which makes the start token easy to tell from the rest;
* every training sample begins with the start token.

    python examples/train_demo_model.py --output demo_model
    python examples/train_demo_model.py --output demo_model --evaluate-only
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sinkattn.text import is_held_out, path_hash

START_TOKEN = "<s>"
VOCAB_SIZE = 1024
CONTEXT = 256
EMBEDDING_OFFSET = 2.0

CHUNK_TOKENS = (4, 32)
COPY_PROBABILITY = 0.5
COPY_REACH = 120

CACHE_SIZES = (64, 128, 256)
SINK_COUNTS = (0, 1, 2, 4)
RECOMPUTE_STRIDE = 16
DENSE_LENGTH = 8192
POSITION_BUCKETS = (0, 128, 256, 512, 1024, 2048, DENSE_LENGTH - 1)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


# Text


def collect_text() -> tuple[dict[str, str], dict[str, str]]:
    """Read the standard library's sources: {relative path: text} for training and for the held-out part.

    Installed packages and the generated build settings differ between machines and are left out. One file in
    twenty is held out. Training files are sorted by path, held-out files by hash, so that a stream over the
    first of them mixes packages.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = {}, {}
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        path = file.relative_to(root)
        installed_later = {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)
        build_settings = path.name.startswith("_sysconfigdata")
        if installed_later or build_settings:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        part = held_out if is_held_out(path.as_posix()) else train
        part[path.as_posix()] = text
    return train, dict(sorted(held_out.items(), key=lambda item: path_hash(item[0])))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; its only special token is the start token, which it puts in front by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[START_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START_TOKEN} $A",
        pair=f"{START_TOKEN} $A $B",
        special_tokens=[(START_TOKEN, tokenizer.token_to_id(START_TOKEN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START_TOKEN, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token ids of the texts end to end, int64 [tokens], without start tokens.

    A literal "<s>" in a source file is text here, not the start token.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids = [np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64) for text in texts]
    backend.encode_special_tokens = False
    return np.concatenate(ids)


# Training


def draw_sample(text: np.ndarray, start_id: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """One training sample, int64 [length]: the start token, then running text broken up by copied chunks."""
    sample = np.empty(length, dtype=np.int64)
    sample[0] = start_id
    cursor = int(rng.integers(len(text) - length))
    chunks: list[tuple[int, int]] = []
    filled = 1
    while filled < length:
        near = [chunk for chunk in chunks if filled - chunk[0] <= COPY_REACH]
        if near and rng.random() < COPY_PROBABILITY:
            begin, size = near[rng.integers(len(near))]
            size = min(size, length - filled)
            sample[filled : filled + size] = sample[begin : begin + size]
        else:
            size = min(int(rng.integers(CHUNK_TOKENS[0], CHUNK_TOKENS[1] + 1)), length - filled)
            sample[filled : filled + size] = text[cursor : cursor + size]
            cursor += size
        chunks.append((filled, size))
        filled += size
    return sample


def plain_samples(text: np.ndarray, start_id: int, count: int, length: int) -> Tensor:
    """Evenly spaced stretches of plain text behind a start token, int64 [count, length]."""
    begins = np.linspace(0, len(text) - length, count).astype(int)
    rows = [np.concatenate(([start_id], text[begin : begin + length - 1])) for begin in begins]
    return torch.from_numpy(np.stack(rows))


def build_model(start_id: int) -> LlamaForCausalLM:
    """The untrained model, with the embedding offset already applied."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=start_id,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        offset = EMBEDDING_OFFSET * config.initializer_range * torch.randn(config.hidden_size)
        is_text = torch.arange(VOCAB_SIZE) != start_id
        embeddings[is_text] += offset
    return model


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace, output: Path) -> None:
    """Train tokenizer and model; the checkpoint with the lowest plain held-out loss ends up in `output`."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    train_files, held_out_files = collect_text()
    tokenizer = train_tokenizer(list(train_files.values()))
    tokenizer.save_pretrained(output)
    start_id = tokenizer.bos_token_id
    text = encode(tokenizer, list(train_files.values()))
    held_out = encode(tokenizer, list(held_out_files.values()))
    # The second half chooses the checkpoint, the first half is kept for the evaluation.
    selection = plain_samples(held_out[len(held_out) // 2 :], start_id, 64, CONTEXT + 1)
    print(
        f"Python {platform.python_version()} standard library: "
        f"{len(train_files)} training files with {len(text):,} tokens, "
        f"{len(held_out_files)} held-out files with {len(held_out):,} tokens"
    )

    model = build_model(start_id)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def token_loss(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled_loss = torch.compile(token_loss, dynamic=False, disable=args.no_compile)
    best = math.inf
    running = 0.0
    began = time.perf_counter()
    with (output / "training_log.jsonl").open("w") as log:
        for step in range(args.steps):
            lr = learning_rate(step, args)
            optimizer.param_groups[0]["lr"] = lr
            samples = [draw_sample(text, start_id, CONTEXT + 1, rng) for _ in range(args.batch_size)]
            loss = compiled_loss(torch.from_numpy(np.stack(samples)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running += loss.item()
            if (step + 1) % args.log_every and step + 1 != args.steps:
                continue

            with torch.no_grad():
                held_out_loss = token_loss(selection).item()
            record = {
                "step": step + 1,
                "loss": round(running / (step % args.log_every + 1), 4),
                "lr": round(lr, 7),
                "held_out_loss": round(held_out_loss, 4),
                "seconds": round(time.perf_counter() - began, 1),
            }
            running = 0.0
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(json.dumps(record), flush=True)
            if held_out_loss < best:
                best = held_out_loss
                model.save_pretrained(output)


# Evaluation: exact streaming attention in plain PyTorch over the model's own weights


def rotary_tables(model: LlamaForCausalLM, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. length - 1, each fp32 [length, head_dim]; angles in fp64."""
    angles = torch.arange(length).double()[:, None] * model.model.rotary_emb.inv_freq.double()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(vectors: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """Apply the rotary embedding to [heads, tokens, head_dim] at the given positions [tokens]."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * tables[0][positions] + torch.cat((-second, first), dim=-1) * tables[1][positions]


def forward(model: LlamaForCausalLM, tokens: Tensor, attends: list[Attend]) -> Tensor:
    """Logits [T, vocab] of one stream of tokens [T], with layer i's attention computed by attends[i].

    An attend function maps unrotated query, key, value [heads, T, head_dim] to mixed values of that shape.
    """
    heads = model.config.num_attention_heads
    hidden = model.model.embed_tokens(tokens)
    for layer, attend in zip(model.model.layers, attends, strict=True):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (p(normed).unflatten(-1, (heads, -1)).transpose(0, 1) for p in projections)
        mixed = attend(query, key, value).transpose(0, 1).flatten(1)
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tables: tuple[Tensor, Tensor],
    num_sinks: int,
    window: int,
    first_key_mass: list[Tensor] | None = None,
    block: int = 512,
) -> Tensor:
    """Token t sees tokens 0 .. num_sinks - 1 and the last `window` tokens, itself included, by rank.

    Keys are rotated once, at their place in the stream. Only position differences matter, so rotating the
    query at t for window keys and at min(t, num_sinks + window - 1) for sink keys gives every key its rank.

    The attention probability of the first key, [heads, T], is appended to `first_key_mass` where given.
    """
    length = query.shape[1]
    rotated_key = rotate(key, tables, torch.arange(length))
    mixed, masses = [], []
    for begin in range(0, length, block):
        t = torch.arange(begin, min(begin + block, length))
        sink = torch.arange(min(num_sinks, length))
        recent = torch.arange(max(num_sinks, begin - window + 1), int(t[-1]) + 1)
        sink_query = rotate(query[:, t], tables, t.clamp(max=num_sinks + window - 1))
        recent_query = rotate(query[:, t], tables, t)
        sink_scores = sink_query @ rotated_key[:, sink].mT
        recent_scores = recent_query @ rotated_key[:, recent].mT
        sink_visible = sink <= t[:, None]
        recent_visible = (recent <= t[:, None]) & (recent > t[:, None] - window)
        visible = torch.cat((sink_visible, recent_visible), dim=-1)
        scores = torch.cat((sink_scores, recent_scores), dim=-1) / math.sqrt(query.shape[-1])
        probabilities = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        mixed.append(probabilities @ value[:, torch.cat((sink, recent))])
        masses.append(probabilities[..., 0])
    if first_key_mass is not None:
        first_key_mass.append(torch.cat(masses, dim=1))
    return torch.cat(mixed, dim=1)


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, *, tables: tuple[Tensor, Tensor], num_sinks: int, window: int
) -> Tensor:
    """The definition of `streaming_attention`: for each token gather the visible keys, rotate by rank."""
    mixed = []
    for t in range(query.shape[1]):
        sinks = range(min(num_sinks, t + 1))
        recent = range(max(num_sinks, t - window + 1), t + 1)
        visible = torch.tensor([*sinks, *recent])
        ranks = torch.arange(len(visible))
        rotated_query = rotate(query[:, t : t + 1], tables, ranks[-1:])
        scores = rotated_query @ rotate(key[:, visible], tables, ranks).mT / math.sqrt(query.shape[-1])
        mixed.append(scores.softmax(dim=-1) @ value[:, visible])
    return torch.cat(mixed, dim=1)


def check_evaluator(model: LlamaForCausalLM, tokens: Tensor) -> dict[str, float]:
    """Largest logit differences of the evaluator from its definition and from the unchanged HF forward."""
    length, cache = 300, 64
    tokens = tokens[:length]
    tables = rotary_tables(model, length)
    layers = model.config.num_hidden_layers
    differences = {}
    for sinks in SINK_COUNTS:
        sizes = {"tables": tables, "num_sinks": sinks, "window": cache - sinks}
        fast = forward(model, tokens, [partial(streaming_attention, **sizes, block=37)] * layers)
        slow = forward(model, tokens, [partial(gathered_attention, **sizes)] * layers)
        differences[f"gathered_{sinks}_sinks"] = (fast - slow).abs().max().item()
    dense = partial(streaming_attention, tables=tables, num_sinks=0, window=length)
    unchanged = model(input_ids=tokens[None], use_cache=False).logits[0]
    ours = forward(model, tokens, [dense] * layers)
    differences["dense_vs_transformers"] = (ours - unchanged).abs().max().item()
    return differences


def stream_loss(
    model: LlamaForCausalLM,
    tokens: Tensor,
    num_sinks: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Loss of tokens[t + 1] predicted at t, nats [T - 1], and mass of the first key [layers, heads, T]."""
    masses: list[Tensor] = []
    attend = partial(
        streaming_attention,
        tables=rotary_tables(model, len(tokens)),
        num_sinks=num_sinks,
        window=window,
        first_key_mass=masses,
    )
    logits = forward(model, tokens, [attend] * model.config.num_hidden_layers)
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="none"), torch.stack(masses)


def recomputed_loss(
    model: LlamaForCausalLM,
    tokens: Tensor,
    at: Tensor,
    cache: int,
    keep_start: bool,
) -> Tensor:
    """Loss at positions `at`, nats, from a fresh HF forward over the `cache` tokens that end there.

    With `keep_start` the first of them is replaced by the start token of the stream.
    """
    losses = []
    for t in at.split(64):
        inputs = tokens[t[:, None] + torch.arange(1 - cache, 1)]
        if keep_start:
            inputs[:, 0] = tokens[0]
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[:, 0]
        losses.append(F.cross_entropy(logits, tokens[t + 1], reduction="none"))
    return torch.cat(losses)


def perplexity(losses: Tensor) -> float:
    """Perplexity of losses in nats, rounded for the report."""
    return round(losses.mean().exp().item(), 4)


def cache_report(model: LlamaForCausalLM, tokens: Tensor, cache: int) -> dict[str, Any]:
    """Perplexities of one stream [T] at one total cache size, the same positions for each method."""
    most = max(SINK_COUNTS)
    counted = slice(max(CACHE_SIZES), len(tokens) - 1)
    sampled = torch.arange(counted.start, counted.stop, RECOMPUTE_STRIDE)
    losses, masses = {}, {}
    for sinks in SINK_COUNTS:
        losses[sinks], masses[sinks] = stream_loss(model, tokens, sinks, cache - sinks)
    # Without the start token every prediction sits one place earlier in the stream.
    headless = stream_loss(model, tokens[1:], most, cache - most)[0][counted.start - 1 :]
    recomputed = recomputed_loss(model, tokens, sampled, cache, keep_start=True)
    recomputed_headless = recomputed_loss(model, tokens, sampled, cache, keep_start=False)
    mass = masses[most][..., counted].mean(dim=-1)
    return {
        "perplexity": {
            **{f"{sinks}_sinks": perplexity(loss[counted]) for sinks, loss in losses.items()},
            f"{most}_sinks_stream_without_start_token": perplexity(headless),
        },
        "window_only_over_1_sink": perplexity(losses[0][counted] - losses[1][counted]),
        "sampled_positions_perplexity": {
            **{f"{sinks}_sinks": perplexity(loss[sampled]) for sinks, loss in losses.items()},
            "recomputed_start_token_and_recent": perplexity(recomputed),
            "recomputed_recent_only": perplexity(recomputed_headless),
        },
        "over_recomputed_start_token_and_recent": {
            f"{sinks}_sinks": perplexity(loss[sampled] - recomputed) for sinks, loss in losses.items()
        },
        f"first_token_mass_{most}_sinks_by_layer_and_head": [
            [round(head, 4) for head in layer] for layer in mass.tolist()
        ],
    }


def position_report(model: LlamaForCausalLM, streams: Tensor, cache: int) -> dict[str, dict[str, float]]:
    """Perplexity of dense attention and of sinks by query position, over streams [N, T]."""
    most = max(SINK_COUNTS)
    dense = torch.stack([stream_loss(model, stream, 0, len(stream))[0] for stream in streams])
    streamed = torch.stack([stream_loss(model, stream, most, cache - most)[0] for stream in streams])
    return {
        f"{low}-{high - 1}": {
            "dense": perplexity(dense[:, low:high]),
            f"{most}_sinks_cache_{cache}": perplexity(streamed[:, low:high]),
        }
        for low, high in pairwise(POSITION_BUCKETS)
    }


@torch.inference_mode()
def evaluate(directory: Path, eval_tokens: int) -> dict[str, Any]:
    """Evaluate a saved model on one plain held-out stream of `eval_tokens` tokens, start token included."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    held_out = encode(tokenizer, list(collect_text()[1].values()))
    text = torch.from_numpy(held_out[: len(held_out) // 2])[: eval_tokens - 1]
    start = torch.tensor([tokenizer.bos_token_id])
    tokens = torch.cat((start, text))
    pieces = text.unfold(0, DENSE_LENGTH - 1, DENSE_LENGTH - 1)
    streams = torch.cat((start.expand(len(pieces), 1), pieces), dim=1)
    return {
        "text": {
            "source": f"standard library of Python {platform.python_version()}, held-out files",
            "tokens": len(tokens),
            "sha256_of_token_ids": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "counted_query_positions": [max(CACHE_SIZES), len(tokens) - 2],
            "recomputed_at_every": RECOMPUTE_STRIDE,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "evaluator_max_logit_difference": check_evaluator(model, tokens),
        "by_cache_size": {cache: cache_report(model, tokens, cache) for cache in CACHE_SIZES},
        "by_position": {
            "streams": len(streams),
            "trained_length": model.config.max_position_embeddings,
            "perplexity": position_report(model, streams, cache=128),
        },
    }


def main() -> None:
    """Train unless told not to, then evaluate what was saved."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the model saved in the folder")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="length of the held-out stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--batch-size", type=int, default=8, help=f"samples of {CONTEXT} tokens in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--log-every", type=int, default=200, help="steps between log lines and checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile: slower")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.evaluate_only:
        train(args, args.output)
    report = evaluate(args.output, args.eval_tokens)
    (args.output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
