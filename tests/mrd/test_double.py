"""float64 against forwards written out here, in every kind of model whose code casts down, and wherever models go."""

import copy
import functools
import math
import pickle

import peft
import pytest
import torch
from architectures import CONFIGS, SAMPLES, batch_of, model_of
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    DeepseekV2Config,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Olmo2Config,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from mrd_ray.config import ModelSettings
from mrd_ray.models import load
from mrd_ray.mrd.autograd_check import agrees, disagreements
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.curvature import TraceEstimator
from mrd_ray.mrd.double import Float64, keep_float64
from mrd_ray.mrd.first_order import FirstOrder
from mrd_ray.mrd.likelihood import Likelihood
from mrd_ray.mrd.monte_carlo import draw_deltas
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.precision import examine

SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8}
MORE = {
    "mixtral": MixtralConfig(**EXPERTS),
    "gpt-oss": GptOssConfig(**EXPERTS, head_dim=6, sliding_window=4),
    "phimoe": PhimoeConfig(**EXPERTS),
    "qwen2-moe": Qwen2MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "deepseek-v2": DeepseekV2Config(
        **SHAPE | LATENT | {"num_key_value_heads": 4}, v_head_dim=6, n_routed_experts=4, moe_intermediate_size=16,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
    ),
    "olmo2": Olmo2Config(**SHAPE),
    "gptj": GPTJConfig(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, n_inner=48, rotary_dim=4),
    "bloom": BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4),
    "mamba": MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=8),
    "bamba": BambaConfig(**SHAPE, **STATES, attn_layer_indices=[1], head_dim=6),
}  # fmt: skip
CASTING = [*CONFIGS, *MORE]


@functools.cache
def made(name: str) -> torch.nn.Module:
    return model_of(name, config=MORE.get(name))


@pytest.mark.parametrize("name", CASTING)
def test_nothing_is_rounded_to_float32(name):
    """One norm in float32 puts the floors at 0.1 of the signal, and at 10,000 times the even part."""
    model = made(name)
    replica, likelihood = Replica(model), Likelihood(model)
    plain = examine(replica, likelihood, batch_of(), 1e-7, seed=0)
    assert plain.noise_floor < 1e-6
    pairs = examine(replica, likelihood, batch_of(), 1e-6, seed=0, antithetic=True)
    assert pairs.sufficient
    assert pairs.noise_floor < 1e-3


@pytest.mark.parametrize("name", CASTING)
def test_delta_is_linear_at_the_smallest_sigma(name):
    model = made(name)
    replica, likelihood = Replica(model), Likelihood(model)
    theta = [likelihood.log_neg_log_probs(batch_of())]
    large, small = (
        draw_deltas(replica, likelihood, [batch_of()], theta, sigma, 0, range(4))[0] for sigma in (1e-8, 1e-8 / 64)
    )
    replica.restore()
    size = large.square().mean((1, 2), keepdim=True).sqrt()
    assert float(((large - 64 * small) / size).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen2-moe", "deepseek-v2"])
def test_experts_in_forward_mode_and_gradients(name):
    model = made(name)
    norms = GradientNorms(model)
    assert disagreements(norms) == []
    replica = Replica(model)
    replica.perturb(1e-5, 1)
    step = {key: delta.clone() for key, delta in replica.step().items()}
    replica.restore()
    assert agrees(FirstOrder(model, norms.parameters), norms.parameters, step)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions: the halves of each head's [T, size] as numbers in the plane, each turned by its angle."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    plane = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([plane.real, plane.imag], -1)


def attention(layer: torch.nn.Module, x: torch.Tensor, config, normed: bool) -> torch.Tensor:
    own, size = layer.self_attn, config.head_dim

    def heads(projection: torch.nn.Linear) -> torch.Tensor:
        return projection(x).unflatten(-1, (-1, size)).transpose(0, 1)

    q, k, v = heads(own.q_proj), heads(own.k_proj), heads(own.v_proj)
    if normed:
        q, k = norm(q, own.q_norm.weight, config.rms_norm_eps), norm(k, own.k_norm.weight, config.rms_norm_eps)
    theta = config.rope_parameters["rope_theta"]
    q, k = turned(q, theta), turned(k, theta)
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = (q @ k.mT / math.sqrt(size)).masked_fill(later, -math.inf).softmax(-1)
    return own.o_proj((weights @ v).transpose(0, 1).flatten(1))


def log_probs(model: torch.nn.Module, tokens: list[int], normed: bool) -> torch.Tensor:
    """Of each token after the first, by the model's weights alone, line by line."""
    config, eps = model.config, model.config.rms_norm_eps
    x = model.model.embed_tokens.weight[tokens]
    for layer in model.model.layers:
        x = x + attention(layer, norm(x, layer.input_layernorm.weight, eps), config, normed)
        y, mlp = norm(x, layer.post_attention_layernorm.weight, eps), layer.mlp
        gate = mlp.gate_proj(y)
        x = x + mlp.down_proj(gate * torch.sigmoid(gate) * mlp.up_proj(y))
    logits = model.lm_head(norm(x, model.model.norm.weight, eps))
    return (logits - logits.logsumexp(-1, keepdim=True))[range(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_a_forward_written_out_gives_the_same(name):
    model = model_of(name)
    found = -Likelihood(model).log_neg_log_probs(batch_of()).exp()
    for row, sample in zip(found, SAMPLES, strict=True):
        expected = log_probs(model, sample, name == "qwen3")
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with rotary positions far out, on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("double") / "model"
    config = LlamaConfig(**SHAPE, head_dim=6, initializer_range=0.3, max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def loaded(folder, dtype="float64"):
    return load.load_model(ModelSettings(path=str(folder), dtype=dtype), torch.device("cpu"))


@torch.no_grad()
def test_a_loaded_model_has_tables_in_float64(folder):
    """Far out, a frequency rounded to float32 would turn by 1e-4 of a full circle."""
    model, tokens = loaded(folder), [*range(3, 61)] * 30
    found = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    torch.testing.assert_close(found, log_probs(model, tokens, False), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_are_left_alone(folder, dtype):
    model = loaded(folder, dtype)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokens = torch.tensor(SAMPLES[:1])
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def rounds_nothing(model: torch.nn.Module) -> bool:
    return examine(Replica(model), Likelihood(model), batch_of(), 1e-7, seed=0).noise_floor < 1e-6


def test_copies_files_and_adapters(folder, tmp_path):
    model = loaded(folder)
    names = list(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert rounds_nothing(other)
    model.save_pretrained(tmp_path / "again")
    assert rounds_nothing(loaded(tmp_path / "again"))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"]), model)
    assert rounds_nothing(model.double())


def test_what_is_recomputed_is_recomputed_in_float64():
    model = model_of("gemma2")
    kept, recomputed = (GradientNorms(model, activations=budget)(batch_of())[1] for budget in (math.inf, 0))
    assert torch.equal(kept, recomputed)


def test_generation_and_curvature(folder):
    model = loaded(folder)
    scores = model.generate(
        torch.tensor(SAMPLES[:1]), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = model(scores.sequences[:, :-1]).logits[0, -3:]
    torch.testing.assert_close(torch.cat(scores.logits), whole.to(torch.cat(scores.logits).dtype), rtol=1e-6, atol=1e-6)
    estimator = TraceEstimator(model)
    estimator.aim(3)
    assert torch.isfinite(estimator.probe(batch_of())).all()


def test_a_forward_that_fails_leaves_float32_as_it_was():
    model = model_of("llama")
    with pytest.raises(IndexError):
        model(torch.tensor([[61]]))
    assert torch.zeros(1, dtype=torch.float32).dtype == torch.float32


def test_bits_are_read_as_the_type_they_are_of():
    model = model_of("llama")
    ones = torch.ones(2, dtype=torch.float32)
    with Float64():
        assert ones.view(torch.int32).view(torch.float32).dtype == torch.float32
        assert torch.softmax(torch.zeros(3).bfloat16(), -1, dtype=torch.float32).dtype == torch.float64
    keep_float64(model.float())  # no longer a float64 model: nothing is added
    assert len(model._forward_hooks) == 1
