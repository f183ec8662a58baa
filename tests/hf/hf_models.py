"""Tiny models of the supported families, every parameter perturbed: fresh norms and biases would hide mistakes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1, "rope_parameters": YARN}),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 2, "sliding_window": 64}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
}
# Positions are added to the embeddings: these stream by re-encoding.
ABSOLUTE = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),
    "opt": (OPTForCausalLM, OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "gpt_bigcode": (GPTBigCodeForCausalLM, GPTBigCodeConfig, {"multi_query": True}),
    "biogpt": (BioGptForCausalLM, BioGptConfig, {}),
    "gpt_neo": (GPTNeoForCausalLM, GPTNeoConfig, {"attention_types": [[["global", "local"], 1]], "window_size": 9}),
    "xglm": (XGLMForCausalLM, XGLMConfig, {"d_model": 32, "ffn_dim": 64}),
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """Model of a family in eager attention and evaluation mode."""
    model_class, config_class, options = (FAMILIES | ABSOLUTE)[family]
    return build_model(model_class, config_class, dtype, seed, **{**options, **overrides})


def build_model(model_class, config_class, dtype: torch.dtype = torch.float32, seed: int = 0, **options):
    """Model of a class in evaluation mode, in eager attention unless the options say otherwise."""
    torch.manual_seed(seed)
    config = config_class(**{**SIZES, "attn_implementation": "eager", **options})
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@contextmanager
def interrupted(block: torch.nn.Module, runs: int, error: type[BaseException]) -> Iterator[None]:
    """Expect that what is run within is interrupted by an error, when a block of the model has run so often."""

    def interrupt(*args):
        nonlocal runs
        runs -= 1
        if runs < 0:
            raise error("stop")

    handle = block.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(error, match="stop"):
            yield
    finally:
        handle.remove()
