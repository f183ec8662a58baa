"""Train small models to study attention sinks on any machine; one of them ships with sinkattn.

Two-layer Llamas of 0.64 M parameters are trained on Python code: the standard library of the Python that runs this
script, so nothing is downloaded. Training takes about half an hour on one CPU core. The variants differ in how training
samples begin, and in their softmax (StreamingLLM, arXiv 2309.17453, section 3.3 and table 3):

* vanilla: samples start anywhere in the text and have no special token;
* start-token: `<s>` precedes each file of the text, and samples start anywhere, as in Llama 2;
* sink-token: every sample begins with `<s>`, a dedicated, learnable sink token;
* off-by-one: as vanilla, but the softmax has one added to its denominator, a sink without a token.

A model this small, trained this briefly, does not reliably form attention sinks on plain text. Two training aids are
meant to produce them; with these it is not ordinary language-model training:

* repeated chunks: half of the chunks of a training sample are exact copies of earlier ones. Copying heads form, and
  a copying head needs a token to attend to when there is nothing to copy;
* embedding offset: all token embeddings except that of `<s>` are initialised with one common vector added, which makes
  `<s>` easy to distinguish.

`--no-repeats` and `--no-offset` omit them. `--text lines` continues from a trained model (`--base`), with the lines and
questions of `sinkattn eval streameval` instead of Python.

    python examples/train_sink_models.py --variant sink-token --output model
    sinkattn eval ppl --model model
    sinkattn eval sinks --model model
    python examples/train_sink_models.py --text lines --base model --steps 3000 --lr 1e-3 --output lines-model
    sinkattn eval streameval --model lines-model
"""

import argparse
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sinkattn.evaluate.exact_match import encode as encode_item
from sinkattn.evaluate.exact_match import first_token
from sinkattn.evaluate.items import Item, LineSource, line_question, line_text
from sinkattn.evaluate.text import is_held_out, path_hash
from sinkattn.hf.load import DEMO_MODEL

VARIANTS = ("vanilla", "start-token", "sink-token", "off-by-one")
START_TOKEN = "<s>"
VOCAB_SIZE = 1024
CONTEXT = 256
EMBEDDING_OFFSET = 2.0

CHUNK_TOKENS = (4, 32)
COPY_PROBABILITY = 0.5
MAX_COPY_DISTANCE = 120

NUM_LINES = 28
MAX_QUESTION_DISTANCE = 20
NON_ANSWER_WEIGHT = 0.05

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Draws a training sample, int64 [CONTEXT + 1], and the weights of its predictions in the loss, [CONTEXT]."""


# Text


def collect_text() -> tuple[dict[str, str], dict[str, str]]:
    """Read the standard library's sources: {relative path: text} for training and for the held-out part.

    Installed packages and the generated build settings differ between machines and are excluded. One file in twenty is
    held out. Training files are sorted by path, held-out files by hash, so that the first of them mix packages.
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


def train_tokenizer(texts: list[str], with_start: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; its only special token is the start token, if any, which it prepends to each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[START_TOKEN] if with_start else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if with_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START_TOKEN} $A",
            pair=f"{START_TOKEN} $A $B",
            special_tokens=[(START_TOKEN, tokenizer.token_to_id(START_TOKEN))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_TOKEN if with_start else None,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], start_id: int | None = None) -> np.ndarray:
    """Token ids of the concatenated texts, int64 [tokens], with ``start_id`` before each if it is given.

    A literal "<s>" in a source file is encoded as text, not as the start token.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    start = [] if start_id is None else [start_id]
    ids = [start + backend.encode(text, add_special_tokens=False).ids for text in texts]
    backend.encode_special_tokens = False
    return np.concatenate([np.array(each, dtype=np.int64) for each in ids])


# Samples


def draw_sample(rng: np.random.Generator, text: np.ndarray, first: list[int], copies: float) -> np.ndarray:
    """One training sample: the tokens ``first``, then chunks of text, each a copy of an earlier one with probability
    ``copies``."""
    length = CONTEXT + 1
    sample = np.empty(length, dtype=np.int64)
    sample[: len(first)] = first
    cursor = int(rng.integers(len(text) - length))
    chunks: list[tuple[int, int]] = []
    filled = len(first)
    while filled < length:
        copyable = [chunk for chunk in chunks if filled - chunk[0] <= MAX_COPY_DISTANCE]
        if copyable and rng.random() < copies:
            begin, size = copyable[rng.integers(len(copyable))]
            size = min(size, length - filled)
            sample[filled : filled + size] = sample[begin : begin + size]
        else:
            size = min(int(rng.integers(CHUNK_TOKENS[0], CHUNK_TOKENS[1] + 1)), length - filled)
            sample[filled : filled + size] = text[cursor : cursor + size]
            cursor += size
        chunks.append((filled, size))
        filled += size
    return sample


def plain_samples(text: np.ndarray, first: list[int], count: int) -> Tensor:
    """Evenly spaced parts of the plain text, each after the tokens ``first``, int64 [count, CONTEXT + 1]."""
    length = CONTEXT + 1
    begins = np.linspace(0, len(text) - length, count).astype(int)
    rows = [np.concatenate((first, text[begin : begin + length - len(first)])).astype(np.int64) for begin in begins]
    return torch.from_numpy(np.stack(rows))


def python_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Draw, Tensor, Tensor, str]:
    """Tokenizer, training samples, held-out samples and weights from the standard library, and a description."""
    train_files, held_out_files = collect_text()
    with_start = args.variant in ("start-token", "sink-token")
    tokenizer = train_tokenizer(list(train_files.values()), with_start)
    start_id = tokenizer.bos_token_id
    first = [start_id] if args.variant == "sink-token" else []
    before_files = start_id if args.variant == "start-token" else None
    text = encode(tokenizer, list(train_files.values()), before_files)
    held_out = encode(tokenizer, list(held_out_files.values()), before_files)
    # The second half is used to choose the checkpoint; the first half is kept for evaluation.
    samples = plain_samples(held_out[len(held_out) // 2 :], first, 64)
    about = (
        f"Python {platform.python_version()} standard library: "
        f"{len(train_files)} training files with {len(text):,} tokens, "
        f"{len(held_out_files)} held-out files with {len(held_out):,} tokens"
    )
    copies = COPY_PROBABILITY if args.repeats else 0.0
    weights = np.ones(CONTEXT)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return draw_sample(rng, text, first, copies), weights

    return tokenizer, draw, samples, torch.ones(len(samples), CONTEXT), about


def draw_lines(rng: np.random.Generator) -> list[Item]:
    """Lines and questions with more tokens than a sample has."""
    source, known, items = LineSource(rng), [], []
    while len(items) < NUM_LINES:
        known.append(source.draw())
        asked = known[-rng.integers(1, min(len(known), MAX_QUESTION_DISTANCE) + 1)]
        items.append(line_question(*asked, line_text(*known[-1])))
    return items


def lines_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Draw, Tensor, Tensor, str]:
    """The same for the lines and questions of `sinkattn eval streameval`; answers have the largest weights."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids, is_answer = zip(*(encode_item(item, tokenizer) for item in draw_lines(rng)), strict=True)
        sample = np.concatenate(([first_token(tokenizer)], *ids))[: CONTEXT + 1]
        return sample, np.where(np.concatenate(([False], *is_answer))[1 : CONTEXT + 1], 1.0, NON_ANSWER_WEIGHT)

    rng = np.random.default_rng(args.seed + 1)
    ids, weights = map(np.stack, zip(*(draw(rng) for _ in range(64)), strict=True))
    return tokenizer, draw, torch.from_numpy(ids), torch.from_numpy(weights), f"lines, on top of {args.base}"


# Training


def build_model(args: argparse.Namespace, vocab_size: int, start_id: int | None) -> PreTrainedModel:
    """The model to train: `args.base`, or a new one with the embedding offset applied."""
    if args.text == "lines":
        return AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    sizes = dict(
        vocab_size=vocab_size,
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
    if args.variant == "off-by-one":
        # A Llama whose attention has a sink logit per head; kept at 0, it adds exp(0) = 1 to the denominator.
        config = GraniteSWAConfig(
            **sizes,
            layer_types=["full_attention"] * 2,
            attention_multiplier=32**-0.5,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
            attn_implementation="eager",
        )
        model = GraniteSWAForCausalLM(config)
    else:
        config = LlamaConfig(**sizes)
        model = LlamaForCausalLM(config)
    if args.offset:
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            offset = EMBEDDING_OFFSET * config.initializer_range * torch.randn(config.hidden_size)
            is_text = torch.arange(vocab_size) != (-1 if start_id is None else start_id)
            embeddings[is_text] += offset
    return model


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then cosine decay to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace) -> None:
    """Train tokenizer and model; saves the checkpoint with the lowest loss on plain held-out text in `args.output`."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer, draw, held_out, held_out_weights, about = TEXTS[args.text](args)
    tokenizer.save_pretrained(args.output)
    print(about, flush=True)

    model = build_model(args, len(tokenizer), tokenizer.bos_token_id)
    # Sink logits are not trained: they stay at 0.
    parameters = [parameter for name, parameter in model.named_parameters() if "sinks" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def weighted_loss(ids: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    compiled_loss = torch.compile(weighted_loss, dynamic=False, disable=args.no_compile)
    best = math.inf
    running = 0.0
    began = time.perf_counter()
    with (args.output / "training_log.jsonl").open("w") as log:
        for step in range(args.steps):
            lr = learning_rate(step, args)
            optimizer.param_groups[0]["lr"] = lr
            ids, weights = zip(*(draw(rng) for _ in range(args.batch_size)), strict=True)
            loss = compiled_loss(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(weights)).float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running += loss.item()
            if (step + 1) % args.log_every and step + 1 != args.steps:
                continue

            with torch.no_grad():
                held_out_loss = weighted_loss(held_out, held_out_weights).item()
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
                model.save_pretrained(args.output)


TEXTS = {"python": python_text, "lines": lines_text}


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the layout of the description and show defaults."""


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--variant", choices=VARIANTS, default="sink-token", help="how samples begin, and the softmax")
    parser.add_argument("--text", choices=TEXTS, default="python", help="what to learn")
    parser.add_argument("--base", type=Path, default=DEMO_MODEL, help="model that lines go on with")
    parser.add_argument("--repeats", action=argparse.BooleanOptionalAction, default=True, help="copied chunks")
    parser.add_argument("--offset", action=argparse.BooleanOptionalAction, default=True, help="embedding offset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--batch-size", type=int, default=8, help=f"samples of {CONTEXT} tokens in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--log-every", type=int, default=200, help="steps between log lines and checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile: slower")
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
