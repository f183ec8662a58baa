"""Small GGUF files, written from models as llama.cpp's converter does it."""

from pathlib import Path

import gguf
import numpy as np
import torch

# A start token, printable ASCII but for "~", space and line feed in the byte-level alphabet, and a pair: 97 tokens.
TOKENS = ["<s>", *map(chr, range(33, 126)), "Ġ", "Ċ", "ab"]


def write_gguf(path: Path, model, architecture: str) -> Path:
    """Write a Llama ("llama") or Gemma 3 ("gemma3") in float32, with a tokenizer of single characters."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, _as_stored(name, weights, config, architecture))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_stored(name: str, weights: torch.Tensor, config, architecture: str) -> np.ndarray:
    """The weights as the format has them: rotary pairs side by side in a Llama, norms with the 1 that Gemma adds."""
    if architecture == "gemma3":
        return (weights + 1 if name.endswith("norm.weight") else weights).numpy()
    if ".attn_q." in name or ".attn_k." in name:
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        weights = weights.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weights.shape)
    return weights.contiguous().numpy()
