"""Every configuration that transformers has for a causal language model, shrunk until its model is a toy.

A configuration class says by the names of its fields what they are: `SIZES` has a small number for each name. One layer
of each kind stays.
"""

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 64  # no sample has its last token

# The first pattern that is all of a field's name decides. Fields that are None stay None but for `WHERE_NONE`.
SIZES = [
    (re.compile(pattern), value)
    for pattern, value in {
        r"(unpadded_|decoder_|audio_)?vocab_size(_per_layer_input)?": VOCABULARY,
        r"\w+_vocab_size": 8,
        r"pad_token_id": 0,
        r"bos_token_id|decoder_start_token_id": 1,
        r"eos_token_id": 2,
        r"\w+_token_id|\w+_token_index": VOCABULARY - 1,  # of pictures and sounds
        # widths
        r"hidden_size(_global)?|d_model|n_embd|emb_dim|(word_embed_|e)mbedding_size|word_embed_proj_dim": 32,
        r"(\w+_)?embedding_size|embedding_dim|lru_width|attention_hidden_size": 32,
        r"swa_head_dim|head_dim|dim_head|d_head|kv_channels|attention_head_(dim|size)|index(er)?_head_dim": 8,
        r"(qk_(nope|rope)|v|linear_key|linear_value|linear|mamba|mamba_d)_(head_dim|head)": 8,
        r"(\w*intermediate_size\w*|\w*ffn_dim|dff|dim_ff|n_inner|d_inner|\w*ffn_hidden_size|feed_forward_size)": 48,
        r"(q|kv|o)_lora_rank|\w+_rank|d_rel|hc_lowrank|router_hidden_size|hidden_size_per_layer_input": 8,
        # numbers of heads and of groups of them
        r"(swa_)?num_key_value_heads|num_kv_heads|linear_num_key_heads": 2,
        r"(\w+_)?attention_heads|n_heads?|num_heads|linear_num(_value)?_heads|index(er)?_n_heads": 4,
        r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
        r"n_groups|mamba_n_?groups|o_groups": 2,
        # numbers of layers, and where kinds of them begin
        r"(num_)?((encoder|decoder)_)?(hidden_)?layers|n_layers?": 2,
        r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
        # experts
        r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_kv_shared_layers": 4,
        r"num_experts_per_tok|moe_k|moe_topk|top_k_experts|n_group": 2,
        r"topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts|zero_expert_num": 1,
        # state spaces and convolutions
        r"state_size|ssm_state_size|mamba_d_state": 4,
        r"mamba_d_ssm": 64,
        r"conv_L_cache|conv_kernel(_size)?|mamba_d_conv|\w*conv\w*_kernel\w*|conv1d_width": 3,
        r"(mamba_)?chunk_size|block_size": 4,
        # lengths
        r"rotary_dim": 4,
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions": 64,
        r"(\w+_)?sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size": 4,
        r"index_topk|keep_window_size|rel_extent": 4,
        r"index_(block_size|topk_blocks|local_blocks)": 2,
        r"\w*dropout\w*|\w*_pdrop|\w*layerdrop": 0.0,
    }.items()
]
WHERE_NONE = {"head_dim": 8, "num_key_value_heads": 2, "default_language": "en_XX"}


def _layers(*kinds: str, name: str = "layer_types") -> dict[str, Any]:
    return {name: list(kinds), "num_hidden_layers": len(kinds)}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING = _layers("full_attention", "sliding_attention")
_CONV = _layers("conv", "full_attention")
_SHARED = _layers("linear_attention", "hybrid", "linear_attention", "hybrid", name="layers_block_type")
_GEMMA4 = _layers(*["sliding_attention", "full_attention"] * 2) | {"global_head_dim": 8}
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 50, "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1, "eos_token_id": 2,
}  # fmt: skip
_DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_LLAMA4 = _layers("chunked_attention", "full_attention") | {"moe_layers": [0], "no_rope_layers": [1, 0]}
# What the names do not say, and the kinds of layers that a default configuration lacks.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": _SLIDING | {"rope_parameters": dict.fromkeys(_SLIDING["layer_types"], _ROPE)},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": _SLIDING | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3, "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        "vision_config": _layers("dense", "sparse", name="mlp_layer_types")
        | {"adapter_in_dim": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": _layers(*["sliding_attention", "full_attention"] * 2)
    | {"num_kv_shared_layers": 2, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 2},
    "gemma4": {"text_config": _GEMMA4 | {"num_kv_shared_layers": 2}},
    "gemma4_text": _GEMMA4
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _layers("linear_attention", "full_attention"),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "mamba2": {"num_heads": 8},
    "ministral": _SLIDING,
    "phi4_multimodal": {"audio_config": {"num_blocks": 1}},
    "qwen2": _SLIDING | {"use_sliding_window": True},
    "qwen2_moe": _SLIDING | {"use_sliding_window": True},
    "qwen3": _SLIDING | {"use_sliding_window": True},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
    },
    "zamba": _SHARED | {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": _SHARED,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_DRAFT = "a draft model, which continues the hidden states of another one"
_SOUND = "makes sound out of texts, and AutoModelForCausalLM cannot build it from this configuration"
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _SOUND,
    "musicgen_melody": _SOUND,
}


def shrunk(model_type: str, **settings: Any) -> PretrainedConfig:
    """The configuration of this model type, small, and a decoder's where there is a choice."""
    return _small(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | settings)


def _small(of: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    default, parts = of(), getattr(of, "sub_configs", {})
    default.allow_global_per_layer_attribute_access = True
    found = {
        field.name: getattr(default, field.name, None) for field in dataclasses.fields(of) if field.name not in parts
    }
    values = {name: small for name, value in found.items() if (small := _size(name, value)) is not None}
    if "kv_lora_rank" in values:  # latent attention has as many heads of keys as of queries
        values["num_key_value_heads"] = values["num_attention_heads"]
    if kinds := _one_of_each(found, getattr(default, "num_hidden_layers", None)):
        values |= kinds
        values |= {name: len(next(iter(kinds.values()))) for name in ("num_hidden_layers",) if name in values}
    for name in parts:
        if isinstance(part := getattr(default, name, None), PretrainedConfig):
            values[name] = _small(type(part), overrides.get(name, {}))
    return of(**(values | {name: value for name, value in overrides.items() if name not in parts}))


def _size(name: str, value: Any) -> Any:
    """A small value for this field, or None if it stays as it is."""
    if name == "is_decoder":
        return True
    if value is None:
        return WHERE_NONE.get(name)
    if not value or isinstance(value, bool) or not isinstance(value, int | float):
        return None  # zero says that there is none of it
    small = next((small for pattern, small in SIZES if pattern.fullmatch(name)), None)
    return None if small is None else type(value)(small)


def _one_of_each(found: dict[str, Any], count: int | None) -> dict[str, list[Any]]:
    """The lists that have an element per layer, cut to the first layer of each kind; that one twice if there is one."""
    lists = {
        name: list(value)
        for name, value in found.items()
        if isinstance(value, list | tuple) and len(value) == count and list(value) != list(range(len(value)))
    }
    first = {of_layer: i for i, of_layer in reversed(list(enumerate(zip(*lists.values(), strict=True))))}
    layers = sorted(first.values())
    return {name: [of_layers[i] for i in layers * (2 if len(layers) == 1 else 1)] for name, of_layers in lists.items()}
