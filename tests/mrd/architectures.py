"""Small random models of every architecture that the closed form knows, and samples to score with them."""

import contextlib

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mrd_ray.mrd.double import Float64, keep_float64
from mrd_ray.mrd.likelihood import MicroBatch

SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED, attention_bias=True),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=6),
    "gemma2": Gemma2Config(**GROUPED, head_dim=6, sliding_window=4, query_pre_attn_scalar=6),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=6, sliding_window=4, query_pre_attn_scalar=6, pad_token_id=0),
    "phi3": Phi3Config(**GROUPED, pad_token_id=0),
    "gpt2": GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, n_inner=48),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "bloom": BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4),
    "falcon": FalconConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4),
    "olmo": OlmoConfig(**GROUPED, clip_qkv=1.0, pad_token_id=0),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16),
}  # fmt: skip
_CHOSEN = GROUPED | {"num_experts_per_tok": 2}
_OWN = _CHOSEN | {"moe_intermediate_size": 16, "pad_token_id": 0}  # experts of another width
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
EXPERTS = {
    "mixtral": MixtralConfig(**_CHOSEN, num_local_experts=3),
    "qwen2-moe": Qwen2MoeConfig(**_OWN, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3-moe": Qwen3MoeConfig(**_OWN, num_experts=4, head_dim=6),
    "olmoe": OlmoeConfig(**_CHOSEN, num_experts=4, pad_token_id=0),
    "gpt-oss": GptOssConfig(**_CHOSEN, num_local_experts=4, head_dim=6, sliding_window=4),
    "llama4": Llama4TextConfig(**GROUPED, num_experts_per_tok=1, num_local_experts=3, head_dim=6, pad_token_id=0),
    "phi-moe": PhimoeConfig(**_CHOSEN, num_local_experts=4),
    "granite-moe": GraniteMoeConfig(**_CHOSEN, num_local_experts=4),
    "glm4-moe": Glm4MoeConfig(**_OWN, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, head_dim=6),
    "ernie-moe": Ernie4_5_MoeConfig(**_OWN, moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    "deepseek-v3": DeepseekV3Config(
        **(_OWN | {"num_key_value_heads": 4}), **_LATENT, n_routed_experts=4, n_shared_experts=1, n_group=2,
        topk_group=1, first_k_dense_replace=1,
    ),
}  # fmt: skip
SAMPLES = [[3, 5, 9, 3, 22, 17, 40, 8], [4, 33, 2], [7, 7], [9, 60, 59, 3, 3, 3, 12, 14, 50, 20, 31, 44]]
SCORED = [[False] * 4 + [True] * 4, *([True] * len(sample) for sample in SAMPLES[1:])]


def model_of(name: str, dtype=torch.float64, config=None) -> torch.nn.Module:
    torch.manual_seed(0)
    with Float64() if dtype == torch.float64 else contextlib.nullcontext():
        return _moved(AutoModelForCausalLM.from_config(config or CONFIGS[name]), dtype)


def _moved(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    model = model.to(dtype).eval()
    keep_float64(model)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def mixture_of(dtype=torch.float64, experts: float = 1.0, router: float = 1.0, **settings) -> torch.nn.Module:
    """A small random Mixtral, the weights of its experts and routers times these."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **GROUPED, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, **{"num_local_experts": 4} | settings
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    keep_float64(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(experts if "experts" in name else router if "gate" in name else 1.0)
    return model


def experts_of(name: str, dtype=torch.float64, implementation: str = "eager") -> torch.nn.Module:
    """A mixture of experts."""
    torch.manual_seed(0)
    with Float64() if dtype == torch.float64 else contextlib.nullcontext():
        return _moved(AutoModelForCausalLM.from_config(EXPERTS[name], experts_implementation=implementation), dtype)


def batch_of(samples=SAMPLES, scored=None) -> MicroBatch:
    scored = scored or [[True] * len(sample) for sample in samples]
    return MicroBatch.collate(samples, scored, torch.device("cpu"))


def memorise(model: torch.nn.Module, samples: list[list[int]]) -> None:
    """Train a Llama on the samples, and sharpen it until float32 rounds their tokens' probabilities to 1."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        for sample in samples:
            tokens = torch.tensor([sample])
            model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.model.norm.weight.mul_(8)
