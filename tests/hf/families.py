"""Model families of transformers that are tested: how to build a tiny model of each, and how sinkattn handles it.

Classes are looked up by name when a model is built. Tests skip families that the installed transformers lacks.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 97
NATIVE_WINDOW = 10  # narrower than the window of the tests, so that it has an effect
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

GROUPED_QUERIES = {"num_key_value_heads": 2}
ABSENT = "absent"  # value of a size that is not passed to the configuration

GENERIC, HYBRID, ADAPTER, MLA, REENCODE = "generic", "hybrid", "adapter", "expanded MLA", "re-encode"
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family, and what is expected of it."""

    model: str
    """Name of the model class in transformers."""
    config: str
    """Name of its configuration class."""
    options: dict[str, Any]
    """Options of its configuration besides `SIZES`."""
    path: str = GENERIC
    """How sinkattn supports it."""
    refusal: str | None = None
    """Pattern of the error message of `enable`; None if the family is supported."""
    lone: tuple[int, ...] = (0,)
    """One attention layer of each kind that can be tested alone; empty if other modules mix tokens as well."""
    mask: bool = True
    """Whether the unpatched model takes a sliding-window mask and has no absolute positions."""


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS = {**MOE, "num_experts": 4}
LOCAL_EXPERTS = {**MOE, "num_local_experts": 4}
ROUTED_EXPERTS = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
# One layer of each kind.
MIXED = {"sliding_window": NATIVE_WINDOW, "layer_types": [SLIDING, FULL]}
BOTH = (0, 1)
# The last two layers share the keys and values of the first two.
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": NATIVE_WINDOW,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
}
LORA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
# Sparse attention: an indexer selects a few keys for each query.
INDEXED = {
    **LORA,
    **ROUTED_EXPERTS,
    **DENSE_AND_SPARSE,
    "num_key_value_heads": 4,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
}
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
SHARED = {"shared_expert_intermediate_size": 16}
DELTA_NET = {
    "layer_types": [LINEAR, FULL],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
# What longrope and yarn scale by differs below and above the original length: tests stay below it.
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
YARN = {"rope_parameters": {"rope_type": "yarn", **SCALED}}
LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", **SCALED}}
# Queries grow with their position in steps of the original length.
MINISTRAL3_YARN = {
    "rope_parameters": {**YARN["rope_parameters"], "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
}
LLAMA3 = {"rope_parameters": {"rope_type": "llama3", **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", **SCALED, "short_factor": [1.0, 1.5, 2, 2.5], "long_factor": [4.0] * 4}
}


# Why families are refused, in patterns of the messages.
OWN_ATTENTION = "none of its modules calls transformers' attention function"
NO_CONTINUATION = "does not continue from its own cache"
OTHER_POSITIONS = "position_ids change attention values"
SEVERAL_CALLS = "expected at most one call of the attention function"
EXPECTED = {field.name for field in fields(Family)}


def _named(model: str, config: str, *shared: dict[str, Any], **rest: Any) -> Family:
    """Family of these options, and of whatever else its fields are to be."""
    expected = {name: rest.pop(name) for name in EXPECTED & rest.keys()}
    return Family(model, config, {name: value for part in (*shared, rest) for name, value in part.items()}, **expected)


def _causal(stem: str, *shared: dict[str, Any], **rest: Any) -> Family:
    return _named(f"{stem}ForCausalLM", f"{stem}Config", *shared, **rest)


def _text(stem: str, *shared: dict[str, Any], **rest: Any) -> Family:
    return _named(f"{stem}ForCausalLM", f"{stem}TextConfig", *shared, **rest)


def _mla(stem: str, *shared: dict[str, Any], **rest: Any) -> Family:
    return _causal(stem, LORA, *shared, **{"num_key_value_heads": 4, "path": MLA, **rest})


def _hybrid(stem: str, *shared: dict[str, Any], **rest: Any) -> Family:
    return _causal(stem, *shared, **{"path": HYBRID, "lone": (), **rest})


def _refused(message: str, model: str, config: str, *shared: dict[str, Any], **rest: Any) -> Family:
    return _named(model, config, *shared, path="refused", refusal=message, lone=(), mask=False, **rest)


FAMILIES: dict[str, Family] = {
    # One rotary module, full attention in every layer.
    "llama": _causal("Llama"),
    "llama-yarn": _causal("Llama", YARN, num_key_value_heads=1),
    "llama-llama3": _causal("Llama", LLAMA3, num_key_value_heads=4),
    "llama-linear": _causal("Llama", LINEAR_ROPE),
    "llama-dynamic": _causal("Llama", DYNAMIC),
    "arcee": _causal("Arcee"),
    "apertus": _causal("Apertus"),
    "aria_text": _causal("AriaText", moe_num_experts=4),
    "bitnet": _causal("BitNet"),
    "cohere": _causal("Cohere", use_qk_norm=True),
    "dbrx": _causal(
        "Dbrx",
        d_model=32,
        hidden_size=ABSENT,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 2.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    "emu3": _named("Emu3ForCausalLM", "Emu3TextConfig"),
    "ernie4_5": _causal("Ernie4_5", head_dim=16),
    "ernie4_5_moe": _causal("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "flex_olmo": _causal("FlexOlmo", num_experts=4, num_experts_per_tok=2),
    "gemma": _causal("Gemma", head_dim=16),
    "glm": _causal("Glm", head_dim=16),
    "glm4": _causal("Glm4", head_dim=16),
    "glm4_moe": _causal("Glm4Moe", ROUTED_EXPERTS, head_dim=16),
    "gpt_neox": _causal("GPTNeoX"),
    "granite": _causal("Granite"),
    "granitemoe": _causal("GraniteMoe", LOCAL_EXPERTS),
    "granitemoeshared": _causal("GraniteMoeShared", LOCAL_EXPERTS, shared_intermediate_size=16),
    "helium": _causal("Helium", head_dim=8),
    "hy_v3": _causal("HYV3", EXPERTS, DENSE_AND_SPARSE, head_dim=16),
    "hyperclovax": _causal("HyperCLOVAX", attention_multiplier=0.3),
    "internlm3": _named("LlamaForCausalLM", "InternLM3Config", head_dim=8),
    "iquestcoder": _named("LlamaForCausalLM", "IQuestCoderConfig", head_dim=8),
    "jais2": _causal("Jais2"),
    "jetmoe": _causal("JetMoe", LOCAL_EXPERTS, kv_channels=8),
    "minimax_m2": _causal("MiniMaxM2", LOCAL_EXPERTS, head_dim=16),
    "minimax_m3_vl_text": _text(
        "MiniMaxM3VL", LOCAL_EXPERTS, head_dim=16, dense_intermediate_size=64, shared_intermediate_size=16
    ),
    "ministral3": _causal("Ministral3", MINISTRAL3_YARN, head_dim=16, sliding_window=None, mask=False),
    "mixtral": _causal("Mixtral", num_local_experts=4),
    "nemotron": _causal("Nemotron", head_dim=8),
    "olmo": _causal("Olmo", clip_qkv=2.0),
    "olmo2": _causal("Olmo2"),
    "olmoe": _causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    "persimmon": _causal("Persimmon"),
    "phi": _causal("Phi", qk_layernorm=True),
    "phi3": _causal("Phi3", sliding_window=None),
    "phi3-longrope": _causal("Phi3", LONGROPE, original_max_position_embeddings=128, sliding_window=None),
    "phimoe": _causal("Phimoe", num_local_experts=4, sliding_window=None),
    "qwen2_moe": _causal("Qwen2Moe", EXPERTS, SHARED),
    "qwen3_moe": _causal("Qwen3Moe", LOCAL_EXPERTS, head_dim=16),
    "seed_oss": _causal("SeedOss", head_dim=16),
    "smollm3": _causal("SmolLM3", no_rope_layers=[1, 0], lone=BOTH),
    "solar_open": _causal("SolarOpen", ROUTED_EXPERTS, head_dim=16),
    "stablelm": _causal("StableLm", qk_layernorm=True),
    # Rotations of other shapes: a negative sign, complex frequencies, two rotary calls per layer.
    "nanochat": _causal("NanoChat"),
    "diffllama": _causal("DiffLlama", refusal=SEVERAL_CALLS),
    "llama4_text": _text(
        "Llama4",
        LOCAL_EXPERTS,
        num_experts_per_tok=1,
        head_dim=16,
        intermediate_size_mlp=32,
        no_rope_layers=[1, 0],
        floor_scale=8,
        lone=BOTH,
        mask=False,
    ),
    # Native sliding windows, in one way for all layers or in some of them.
    "mistral": _causal("Mistral", sliding_window=64),
    "mistral-narrow": _refused(
        "layer 0 .* window of 10 tokens", "MistralForCausalLM", "MistralConfig", sliding_window=NATIVE_WINDOW
    ),
    "starcoder2": _causal("Starcoder2", sliding_window=64),
    "ministral": _causal("Ministral", MIXED, head_dim=16, lone=BOTH),
    "qwen2": _causal("Qwen2"),
    "qwen2-sliding": _causal("Qwen2", MIXED, use_sliding_window=True, lone=BOTH),
    "qwen3": _causal("Qwen3", head_dim=16),
    "qwen3-sliding": _causal("Qwen3", MIXED, use_sliding_window=True, head_dim=16, lone=BOTH),
    "gemma2": _causal("Gemma2", MIXED, head_dim=16, query_pre_attn_scalar=16, lone=BOTH),
    "vaultgemma": _causal("VaultGemma", MIXED, head_dim=16, query_pre_attn_scalar=16, lone=BOTH),
    "cohere2": _causal("Cohere2", MIXED, head_dim=16, lone=BOTH),
    "cohere2_moe": _causal("Cohere2Moe", MIXED, EXPERTS, head_dim=16, lone=BOTH),
    "cwm": _causal("Cwm", MIXED, head_dim=16, lone=BOTH),
    "exaone4": _causal("Exaone4", MIXED, lone=BOTH),
    "exaone_moe": _causal("ExaoneMoe", MIXED, EXPERTS, DENSE_AND_SPARSE, lone=BOTH),
    "dots1": _causal(
        "Dots1",
        ROUTED_EXPERTS,
        sliding_window=NATIVE_WINDOW,
        layer_types=[SLIDING, FULL],
        first_k_dense_replace=1,
        head_dim=16,
        lone=BOTH,
    ),
    "gpt_oss": _causal("GptOss", MIXED, LOCAL_EXPERTS, head_dim=16, lone=BOTH),
    "afmoe": _causal("Afmoe", MIXED, EXPERTS, head_dim=16, lone=BOTH),
    "flint": _causal("Flint", MIXED, EXPERTS, SHARED, mlp_only_layers=[0], head_dim=16, lone=BOTH),
    "kolibri1": _causal("Kolibri1", MIXED, LOCAL_EXPERTS, SHARED, head_dim=16, lone=BOTH),
    # A rotary embedding for each kind of layer.
    "gemma3_text": _text("Gemma3", MIXED, head_dim=16, query_pre_attn_scalar=16, lone=BOTH),
    "gemma3n_text": _text(
        "Gemma3n",
        MIXED,
        head_dim=16,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0],
        lone=BOTH,
    ),
    "gemma3n_text-shared": _text(
        "Gemma3n",
        SHARED_KEYS,
        head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        lone=(),
    ),
    "gemma4_text-shared": _text(
        "Gemma4",
        SHARED_KEYS,
        head_dim=16,
        global_head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        lone=(),
    ),
    "gemma4_text": _text(
        "Gemma4",
        MIXED,
        head_dim=16,
        per_layer_config={1: {"head_dim": 32}},
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        lone=BOTH,
    ),
    "gemma4_unified_text": _text(
        "Gemma4Unified",
        MIXED,
        head_dim=16,
        per_layer_config={1: {"head_dim": 32}},
        use_bidirectional_attention=None,
        lone=BOTH,
    ),
    "cohere_compass_text": _text(
        "CohereCompass",
        MIXED,
        head_dim=16,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in (FULL, SLIDING)},
        lone=BOTH,
    ),
    "olmo3": _causal("Olmo3", MIXED, lone=BOTH),
    "modernbert-decoder": _causal(
        "ModernBertDecoder", local_attention=2 * NATIVE_WINDOW, layer_types=[SLIDING, FULL], lone=BOTH
    ),
    "laguna": _causal(
        "Laguna", MIXED, EXPERTS, DENSE_AND_SPARSE, SHARED, head_dim=16, num_attention_heads_per_layer=[4, 8], lone=BOTH
    ),
    "mellum": _causal("Mellum", MIXED, LOCAL_EXPERTS, head_dim=16, lone=BOTH),
    "mimo_v2_flash": _causal(
        "MiMoV2Flash", MIXED, ROUTED_EXPERTS, DENSE_AND_SPARSE, head_dim=24, v_head_dim=16, lone=BOTH
    ),
    "granite_swa": _causal("GraniteSWA", MIXED, layer_rope_theta=[10000.0, 1000000.0], lone=BOTH),
    "granitemoe_swa": _causal("GraniteMoeSWA", MIXED, LOCAL_EXPERTS, layer_rope_theta=[10000.0, 0.0], lone=BOTH),
    "beam": _causal(
        "Beam", MIXED, EXPERTS, DENSE_AND_SPARSE, head_dim=16, n_group=1, topk_group=1, lone=BOTH, mask=False
    ),
    # Keys and values from one low-rank projection.
    "deepseek_v2": _mla("DeepseekV2", ROUTED_EXPERTS, first_k_dense_replace=1),
    "deepseek_v3": _mla("DeepseekV3", ROUTED_EXPERTS, first_k_dense_replace=1),
    "longcat_flash": _mla(
        "LongcatFlash",
        num_layers=1,
        head_dim=8,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=16,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        lone=(),
    ),
    "youtu": _mla("Youtu"),
    "minicpm3": _mla("MiniCPM3"),
    "glm4_moe_lite": _mla("Glm4MoeLite", ROUTED_EXPERTS, DENSE_AND_SPARSE),
    "axk1": _mla("AXK1", ROUTED_EXPERTS, DENSE_AND_SPARSE),
    # Attention layers among layers that keep a state.
    "lfm2": _hybrid("Lfm2", layer_types=["conv", FULL], lone=(1,)),
    "lfm2_moe": _hybrid("Lfm2Moe", EXPERTS, layer_types=["conv", FULL], num_dense_layers=1, lone=(1,)),
    "lfm3": _hybrid(
        "Lfm3",
        num_hidden_layers=3,
        sliding_window=NATIVE_WINDOW,
        layer_types=["conv", SLIDING, FULL],
        head_dim=16,
        lone=(1, 2),
    ),
    "qwen3_next": _hybrid("Qwen3Next", DELTA_NET, EXPERTS, SHARED, head_dim=16, lone=(1,)),
    "qwen3_5_text": _named("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", DELTA_NET, head_dim=16, path=HYBRID, lone=(1,)),
    "qwen3_5_moe_text": _named(
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", DELTA_NET, EXPERTS, SHARED, head_dim=16, path=HYBRID, lone=(1,)
    ),
    "olmo_hybrid": _hybrid("OlmoHybrid", DELTA_NET, lone=(1,)),
    "falcon_h1": _hybrid("FalconH1", MAMBA2, mamba_d_ssm=64),
    "granitemoehybrid": _hybrid(
        "GraniteMoeHybrid",
        MAMBA2,
        LOCAL_EXPERTS,
        layer_types=[LINEAR, FULL],
        shared_intermediate_size=16,
        position_embedding_type="rope",
        lone=(1,),
    ),
    "granitemoehybrid-nope": _hybrid(
        "GraniteMoeHybrid", MAMBA2, LOCAL_EXPERTS, layer_types=[LINEAR, FULL], shared_intermediate_size=16, lone=(1,)
    ),
    "bamba": _hybrid("Bamba", MAMBA2, attn_layer_indices=[1], lone=(1,)),
    "jamba": _hybrid(
        "Jamba",
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        refusal=NO_CONTINUATION,
    ),
    "nemotron_h": _hybrid(
        "NemotronH",
        ROUTED_EXPERTS,
        num_hidden_layers=4,
        layers_block_type=[LINEAR, "moe", FULL, "mlp"],
        head_dim=16,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=16,
        time_step_min=1e-30,
        moe_shared_expert_intermediate_size=16,
        lone=(2,),
    ),
    "recurrent_gemma": _hybrid(
        "RecurrentGemma",
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=NATIVE_WINDOW,
        head_dim=8,
        refusal=OTHER_POSITIONS,
    ),
    "zamba2": _hybrid(
        "Zamba2",
        num_hidden_layers=4,
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        time_step_min=1e-30,
        chunk_size=16,
        use_mem_rope=True,
        num_key_value_heads=4,
        adapter_rank=4,
        refusal=SEVERAL_CALLS,
    ),
    "zamba": _hybrid(
        "Zamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
        mamba_d_state=8,
        mamba_dt_rank=4,
        num_key_value_heads=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        refusal=SEVERAL_CALLS,
    ),
    "minimax": _hybrid(
        "MiniMax",
        num_local_experts=4,
        layer_types=[LINEAR, FULL],
        head_dim=16,
        block_size=8,
        refusal="MiniMax uses cache of its own",
    ),
    "bailing_hybrid": _hybrid(
        "BailingHybrid",
        LORA,
        DENSE_AND_SPARSE,
        num_key_value_heads=4,
        q_lora_rank=16,
        layer_types=[LINEAR, FULL],
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        num_expert_group=1,
        topk_group=1,
        linear_head_dim=8,
        linear_num_heads=4,
        lone=(1,),
    ),
    "kimi_linear": _hybrid(
        "KimiLinear",
        LORA,
        DENSE_AND_SPARSE,
        num_key_value_heads=4,
        layer_types=[LINEAR, FULL],
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        linear_head_dim=8,
        linear_num_heads=4,
        lone=(1,),
    ),
    "zaya": _hybrid(
        "Zaya",
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        layer_types=["hybrid", "hybrid"],
        head_dim=16,
        router_hidden_size=16,
    ),
    # Models that attend without transformers' attention interface.
    "falcon": _causal("Falcon", num_kv_heads=2, new_decoder_architecture=True, path=ADAPTER),
    "falcon-alibi": _causal(
        # Its eager attention adds the bias twice.
        "Falcon",
        attn_implementation="sdpa",
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        path=ADAPTER,
        mask=False,
    ),
    "mpt": _causal("Mpt", expansion_ratio=2, path=ADAPTER),
    "bloom": _causal("Bloom", path=ADAPTER, mask=False),
    "gptj": _causal("GPTJ", rotary_dim=4, path=ADAPTER),
    "codegen": _causal("CodeGen", rotary_dim=4, path=ADAPTER),
    "gpt_neox_japanese": _causal("GPTNeoXJapanese", intermediate_multiple_size=2, path=ADAPTER),
    # Positions that are added to the embeddings.
    "gpt2": _named("GPT2LMHeadModel", "GPT2Config", mask=False, path=REENCODE),
    "openai-gpt": _named("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", mask=False, refusal=OWN_ATTENTION),
    "gpt_bigcode": _causal("GPTBigCode", path=REENCODE, mask=False),
    "gpt_neo": _causal(
        "GPTNeo", attention_types=[[["global", "local"], 1]], window_size=NATIVE_WINDOW, path=REENCODE, mask=False
    ),
    "opt": _causal("OPT", ffn_dim=64, word_embed_proj_dim=32, path=REENCODE, mask=False),
    "biogpt": _causal("BioGpt", path=REENCODE, mask=False),
    "xglm": _causal("XGLM", ffn_dim=64, path=REENCODE, mask=False),
    "ctrl": _named("CTRLLMHeadModel", "CTRLConfig", dff=64, mask=False, path=REENCODE),
    "bert": _named("BertLMHeadModel", "BertConfig", is_decoder=True, path=REENCODE, mask=False),
    "bert-generation": _named(
        "BertGenerationDecoder", "BertGenerationConfig", is_decoder=True, path=REENCODE, mask=False
    ),
    "whisper": _named(
        "WhisperForCausalLM",
        "WhisperConfig",
        DECODER,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        path=REENCODE,
        mask=False,
    ),
    # Refused for good, each for a reason of its own.
    "hunyuan_v1_dense": _refused(
        "in a way that is not a known rotary embedding",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        head_dim=16,
    ),
    "hunyuan_v1_moe": _refused(
        "in a way that is not a known rotary embedding",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        head_dim=16,
        num_experts=4,
        moe_topk=2,
    ),
    "doge": _refused("attention mask that the model makes itself", "DogeForCausalLM", "DogeConfig", num_experts=4),
    "deepseek_v32": _refused("passes \\['indices'\\]", "DeepseekV32ForCausalLM", "DeepseekV32Config", INDEXED),
    "deepseek_v4": _refused(
        "could not be tried out",
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        ROUTED_EXPERTS,
        head_dim=16,
        q_lora_rank=16,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe"],
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        num_key_value_heads=1,
    ),
    "glm_moe_dsa": _refused(
        "passes \\['indices'\\]", "GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", INDEXED, indexer_types=["full", "shared"]
    ),
    "hy_v4": _refused(
        "passes \\['indices'\\]", "HYV4ForCausalLM", "HYV4Config", INDEXED, indexer_types=["full", "shared"], hc_mult=2
    ),
    "axk2": _refused("passes \\['indices'\\]", "AXK2ForCausalLM", "AXK2Config", INDEXED, gated_norm_rank=4),
    "qwen4_exp_text": _refused(
        "could not be tried out",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpTextConfig",
        DELTA_NET,
        EXPERTS,
        SHARED,
        layer_types=[LINEAR, "indexed_attention"],
        head_dim=16,
        hc_count=2,
        hc_lowrank=4,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    "inkling_text": _refused(
        "position_bias",
        "InklingForCausalLM",
        "InklingTextConfig",
        ROUTED_EXPERTS,
        DENSE_AND_SPARSE,
        head_dim=8,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        sliding_window_size=NATIVE_WINDOW,
        d_rel=4,
        rel_extent=64,
        layer_types=["hybrid_sliding", "hybrid"],
    ),
    "inkling2_text": _refused(
        "position_bias|not enough values to unpack",  # until 5.23; since 5.24
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        ROUTED_EXPERTS,
        unpadded_vocab_size=VOCABULARY,
        head_dim=8,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        sliding_window_size=NATIVE_WINDOW,
        d_rel=4,
        rel_extent=64,
        layer_types=["hybrid_sliding", "hybrid"],
    ),
    "mamba": _refused(OWN_ATTENTION, "MambaForCausalLM", "MambaConfig", state_size=8, time_step_rank=4),
    "mamba2": _refused(
        OWN_ATTENTION,
        "Mamba2ForCausalLM",
        "Mamba2Config",
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=16,
    ),
    "falcon_mamba": _refused(
        OWN_ATTENTION, "FalconMambaForCausalLM", "FalconMambaConfig", state_size=8, time_step_rank=4
    ),
    "rwkv": _refused(OWN_ATTENTION, "RwkvForCausalLM", "RwkvConfig", attention_hidden_size=32),
    "xlstm": _refused(OWN_ATTENTION, "xLSTMForCausalLM", "xLSTMConfig", num_blocks=2, num_heads=4, embedding_dim=32),
    "hrm_text": _refused(
        SEVERAL_CALLS, "HrmTextForCausalLM", "HrmTextConfig", num_hidden_layers=1, H_cycles=1, L_cycles=2, head_dim=16
    ),
    "t5": _refused(
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
    ),
    "bart": _refused("found none, but tables", "BartForCausalLM", "BartConfig", DECODER, is_decoder=True),
    "roformer": _refused(OWN_ATTENTION, "RoFormerForCausalLM", "RoFormerConfig", is_decoder=True, embedding_size=32),
    "xlnet": _refused(
        OWN_ATTENTION,
        "XLNetLMHeadModel",
        "XLNetConfig",
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=64,
        d_head=8,
        max_position_embeddings=ABSENT,
    ),
    "xlm": _refused(
        OWN_ATTENTION, "XLMWithLMHeadModel", "XLMConfig", emb_dim=32, n_layers=2, n_heads=4, n_words=VOCABULARY
    ),
    "trocr": _refused(OWN_ATTENTION, "TrOCRForCausalLM", "TrOCRConfig", DECODER),
    "prophetnet": _refused(
        OWN_ATTENTION,
        "ProphetNetForCausalLM",
        "ProphetNetConfig",
        num_hidden_layers=ABSENT,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        decoder_ffn_dim=64,
        num_encoder_layers=1,
        num_encoder_attention_heads=4,
        encoder_ffn_dim=64,
    ),
}


@cache
def missing(family: str) -> str | None:
    """What the installed transformers lacks of a family; None if it has it."""
    for name in (FAMILIES[family].model, FAMILIES[family].config):
        if not hasattr(transformers, name):
            return f"transformers {transformers.__version__} has no {name}"
    return None


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """Model of a family; skips the test if transformers does not have it."""
    if (lacking := missing(family)) is not None:
        pytest.skip(lacking)
    entry = FAMILIES[family]
    model_class, config_class = getattr(transformers, entry.model), getattr(transformers, entry.config)
    return build_model(model_class, config_class, dtype, seed, **{**GROUPED_QUERIES, **entry.options, **overrides})


def build_model(model_class, config_class, dtype: torch.dtype = torch.float32, seed: int = 0, **options):
    """Model of a class in evaluation mode, in eager attention unless the options say otherwise.

    Every parameter is perturbed: fresh norms and biases would hide mistakes.
    """
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager", **SIZES, **options}
    # A copy, as some configurations write to the lists that they are given.
    config = config_class(**deepcopy({name: value for name, value in options.items() if value != ABSENT}))
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Ids of ``batch`` rows, none of them a special token."""
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
