"""The model of `bench_serve.py`: one whose replies are words of one token each, and never end by themselves.

Servers get the text of a reply sent back as part of the history. As each of these words is one token, its ids are the
ones that were generated, on every server; and a reply is as long as it may be, on every server.
"""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sinkattn.hf.load import load

# SmolLM2-135M. Ids behind those of the tokenizer are never used, but cost what they cost there.
CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    # Wide enough for replies to depend on what was said.
    "initializer_range": 0.06,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LEAST_WORDS = 100


def write_model(folder: Path, name: str | None, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Write a model and its tokenizer into a folder.

    Args:
        folder: where to.
        name: see `sinkattn.hf.load.load`; None for random weights and the tokenizer that ships with sinkattn.
        dtype: of the weights.

    Returns:
        The tokenizer, and the words of which replies are made, each with the space before it.

    Raises:
        ValueError: for a model that cannot be loaded, or whose tokenizer has too few words or no chat template.
    """
    if name is None:
        tokenizer = load(device="cpu")[1]
        tokenizer.chat_template = CHAT_TEMPLATE
        torch.manual_seed(0)
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype)
    else:
        model, tokenizer = load(name, device="cpu", dtype=dtype)
    if not tokenizer.chat_template:
        raise ValueError(f"model: expected a tokenizer with a chat template, got {name}")
    words = _words(tokenizer)
    if len(words) < LEAST_WORDS:
        raise ValueError(f"model: expected a tokenizer with {LEAST_WORDS} words of one token, got {len(words)}")
    _say_only(model, [*words])
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, [*words.values()]


def _words(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that are a word with the space before it, and that the tokenizer finds in a text by themselves."""
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return {
        token: text
        for token, text in texts.items()
        if re.fullmatch(" [A-Za-z]+", text) and tokenizer(text, add_special_tokens=False).input_ids == [token]
    }


def _say_only(model: PreTrainedModel, tokens: list[int]) -> None:
    """Let all other tokens have the mean logit of these, so that they are never the likeliest, and end no reply."""
    head = model.get_output_embeddings()
    said = head.weight.detach()[tokens]
    weight = said.mean(0).repeat(len(head.weight), 1)
    weight[tokens] = said
    head.weight = nn.Parameter(weight)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings, config.eos_token_id = False, None
    model.generation_config = GenerationConfig()
