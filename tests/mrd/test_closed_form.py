"""Per-sample gradient norms of every supported architecture against autograd, one sample at a time."""

import copy
import math

import peft
import pytest
import torch
from architectures import CONFIGS, GROUPED, SAMPLES, SCORED, SHAPE, batch_of, memorise, model_of
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BlenderbotConfig,
    CTRLConfig,
    FalconMambaConfig,
    JambaConfig,
    JetMoeConfig,
    Mamba2Config,
    MambaConfig,
    RobertaConfig,
    RwkvConfig,
)

from mrd_ray import UserError
from mrd_ray.config import ScoringSettings
from mrd_ray.mrd.autograd_check import disagreements
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.coverage import coverage
from mrd_ray.mrd.likelihood import Likelihood, TokenMeasures
from mrd_ray.scoring.estimators import refuse_wrong_rules

LONG = [[(7 * i * i + 3 * i) % 60 + 1 for i in range(40)], [(5 * i) % 60 + 1 for i in range(33)]]


def lora_of(model: torch.nn.Module) -> torch.nn.Module:
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def reference(model, sample, scored, selected=None, of_log_prob=False) -> dict[str, float]:
    """|gradient|^2 by name, the likelihood written out token by token in float64."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # torch leaves the padding row's gradient out; noise does not leave out the row
    model.requires_grad_(True)
    logits = model(torch.tensor([sample]), use_cache=False).logits[0]
    total = 0.0
    for t in range(1, len(sample)):
        if scored[t]:
            others = logits[t - 1][torch.arange(61) != sample[t]]
            a = others.logsumexp(0) - logits[t - 1, sample[t]]
            total = total + (-(a.exp().log1p()) if of_log_prob else a.exp().log1p().log())
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {
        name: 0.0 if gradient is None else float(gradient.square().sum())
        for name, gradient in zip(names, gradients, strict=True)
        if selected is None or name in selected
    }


def check(model, norms=None, samples=SAMPLES, scored=SCORED, tolerance=None, **options):
    norms = norms or GradientNorms(model)
    tolerance = tolerance or (1e-9 if model.dtype == torch.float64 else 1e-5)
    theta, squares = norms.by_parameter(batch_of(samples, scored), **options)
    for i, (sample, flags) in enumerate(zip(samples, scored, strict=True)):
        expected = reference(model, sample, flags, squares.keys(), **options)
        total = sum(expected.values())
        for name, square in expected.items():
            assert float(squares[name][i]) == pytest.approx(square, rel=10 * tolerance, abs=tolerance * total), name
        norm = math.sqrt(sum(float(square[i]) for square in squares.values()))
        assert norm == pytest.approx(math.sqrt(total), rel=tolerance)
    expected_theta = Likelihood(model).log_neg_log_probs(batch_of(samples, scored))
    mask = batch_of(samples, scored).scored
    torch.testing.assert_close(theta[mask], expected_theta[mask], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name):
    model = model_of(name)
    norms = GradientNorms(model)
    assert norms.coverage.slow == []
    assert disagreements(norms) == []
    check(model, norms)


@pytest.mark.parametrize("selected", [None, "attention"])
def test_a_model_that_writes_to_embeddings_in_place(selected):
    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=61, n_embd=24, n_layer=2, n_head=4, dff=32, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    names = [name for name, _ in model.named_parameters() if selected is None or selected in name]
    check(model, GradientNorms(model, names))


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2", "opt"])
def test_float32_long_samples_and_checkpointing(name):
    """Long enough that some layers take the direct product; the squares agree with autograd all the same."""
    model = model_of(name, torch.float32)
    flags = [[True] * len(sample) for sample in LONG]
    check(model, samples=LONG, scored=flags)
    check(model, GradientNorms(model, activations=0), samples=LONG, scored=flags)


@pytest.mark.parametrize("budget", [1, 700, 1 << 25])
def test_output_layer_in_groups_of_samples(budget, monkeypatch):
    monkeypatch.setattr("mrd_ray.mrd.closed_form.LOGITS", budget)
    check(model_of("llama-tied"))


def test_lora_and_its_factors_alone():
    model = lora_of(model_of("llama"))
    norms = GradientNorms(model)
    assert norms.coverage.slow == []
    assert disagreements(norms) == []
    check(model, norms)
    factors = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(factors) == 8
    check(model, GradientNorms(model, factors))


def test_selected_parameters_count_alone():
    model = model_of("llama-tied")
    selected = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    norms = GradientNorms(model, selected)
    assert norms.by_parameter(batch_of())[1].keys() == set(selected)
    check(model, norms)


def test_padding_row_counts_where_it_is_looked_up():
    samples = [[3, 0, 0, 5, 9], [0, 8, 0]]
    check(model_of("gemma3"), samples=samples, scored=[[True] * 5, [True] * 3])


def test_gradient_of_the_log_likelihood():
    check(model_of("qwen2"), of_log_prob=True)


def test_one_by_one_equals_batched():
    norms = GradientNorms(model_of("qwen3"))
    _, together = norms(batch_of())
    alone = [norms(batch_of([sample]))[1] for sample in SAMPLES]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-11, atol=0)


def test_memorised_samples_are_finite_and_right():
    """Probability 1 to float32 rounding: the textbook P_t is exactly zero there, and so would be its gradient."""
    model = model_of("llama", torch.float32)
    memorise(model, SAMPLES)
    p = model(torch.tensor([SAMPLES[3]])).logits[0, :-1].log_softmax(-1)[range(11), SAMPLES[3][1:]]
    assert int((p == 0).sum()) >= 5
    flags = [[True] * len(sample) for sample in SAMPLES]
    _, squares = GradientNorms(model)(batch_of())
    expected = [math.sqrt(sum(reference(model, *sample).values())) for sample in zip(SAMPLES, flags, strict=True)]
    assert torch.isfinite(squares).all()
    torch.testing.assert_close(squares.sqrt(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_bfloat16_is_close_to_float32():
    model = model_of("llama-tied", torch.float32)
    _, exact = GradientNorms(model)(batch_of())
    rounded = GradientNorms(model.to(torch.bfloat16))
    assert disagreements(rounded) == []
    torch.testing.assert_close(rounded(batch_of())[1].sqrt(), exact.sqrt(), rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_ghost_norms_of_opacus_are_the_same():
    """Another library's, of the layers that it has rules for."""
    model = model_of("llama", torch.float32)
    projections = [name for name, _ in model.named_parameters() if "proj" in name]
    batch = batch_of(SAMPLES, SCORED)
    _, squares = GradientNorms(model, projections)(batch, of_log_prob=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in projections)
    theirs = GradSampleModuleFastGradientClipping(
        model.train(), batch_first=True, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )
    logits = theirs(input_ids=batch.token_ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, batch.token_ids[:, 1:], reduction="none")
    torch.where(batch.scored, losses, 0.0).sum().backward()
    torch.testing.assert_close(squares.sqrt().float(), theirs.get_norm_sample(), rtol=1e-5, atol=0)


def test_the_model_is_left_as_it_was():
    model = model_of("gpt2")
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    kept = torch.ones_like(model.transformer.wte.weight)
    model.transformer.wte.weight.grad = kept
    forwards = [module.forward for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    norms = GradientNorms(model, activations=0)
    norms(batch_of())
    assert disagreements(norms) == []
    assert model.transformer.wte.weight.grad is kept
    assert [p is frozen for p in model.parameters() if not p.requires_grad] == [True]
    assert all(p.grad is None for p in model.parameters() if p is not model.transformer.wte.weight)
    assert [module.forward for module in model.modules()] == forwards
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_uncovered_parameters_are_found_without_weights_and_computed_by_autograd():
    torch.manual_seed(0)
    config = JetMoeConfig(
        vocab_size=61, hidden_size=24, intermediate_size=16, num_hidden_layers=1, kv_channels=6, num_key_value_heads=2,
        num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    slow = coverage(skeleton, dict(skeleton.named_parameters())).slow
    assert len(slow) == 2 * 3  # of attention and of the feed-forward: two matrices of experts, and a bias
    assert all("linear.weight" in name or "bias" in name for name in slow)
    norms = GradientNorms(model)
    assert norms.coverage.slow == slow
    assert disagreements(norms) == []
    check(model, norms)


def test_parameters_without_influence_count_nothing():
    model = model_of("llama")
    model.unused = torch.nn.Conv2d(1, 1, 1).double()  # as a vision tower is to a text
    norms = GradientNorms(model)
    assert norms.coverage.slow == ["unused.weight", "unused.bias"]
    assert disagreements(norms) == []
    assert float(norms.by_parameter(batch_of())[1]["unused.weight"].sum()) == 0


class Doubled(torch.nn.Linear):
    """Looks like a linear layer, but is not one."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_breaks_its_rule_is_noticed():
    model = model_of("llama")
    projection = model.model.layers[1].mlp.up_proj
    projection.__class__ = Doubled
    assert disagreements(GradientNorms(model)) == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(**SHAPE, is_decoder=True, type_vocab_size=1),  # positions begin after the pad token's id
        BertConfig(**SHAPE, is_decoder=True),
        BlenderbotConfig(vocab_size=61, d_model=24, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
    ],
    ids=lambda config: config.model_type,
)
def test_positions_that_all_samples_share(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    norms = GradientNorms(model)
    assert disagreements(norms) == []
    check(model, norms, samples=[[token + 1 for token in sample] for sample in [[3, 5, 9, 3], [4, 33, 2], [7, 7]]],
          scored=[[True] * 4, [True] * 3, [True] * 2])  # fmt: skip


def test_a_model_that_cannot_be_listened_to_is_refused_by_name():
    model = model_of("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def unlike_others(x):
        if torch.is_grad_enabled():
            raise TypeError("in inference alone")
        return forward(x)

    mlp.forward = unlike_others
    with pytest.raises(UserError, match=r"closed_form cannot differentiate LlamaForCausalLM .model type llama. by lay"):
        refuse_wrong_rules(model, ScoringSettings(estimator="closed_form"))


def test_a_layer_called_twice_is_noticed_and_left_to_autograd():
    model = model_of("llama-tied")
    model.model.layers[1] = model.model.layers[0]
    norms = GradientNorms(model)
    wrong = disagreements(norms)
    assert wrong
    norms.give_up_rules(wrong)
    assert norms.coverage.slow == wrong
    assert disagreements(norms) == []
    check(model, norms)


def test_tied_weights_left_to_autograd():
    model = model_of("llama-tied")
    norms = GradientNorms(model)
    norms.give_up_rules(["model.embed_tokens.weight"])
    check(model, norms)


class Pair(torch.nn.Linear):
    """Gives a tuple, as some routers do."""

    def forward(self, x):
        return (super().forward(x),)


class Unpacked(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Reordered(torch.nn.Module):
    """A layer whose input has no order of samples."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.cat([x, x[:1]]))[:-1]


@pytest.mark.parametrize("wrapper", [Unpacked, Reordered])
def test_a_layer_that_cannot_be_measured_is_noticed_and_left_to_autograd(wrapper):
    model = model_of("llama")
    mlp = model.model.layers[1].mlp
    if wrapper is Unpacked:
        mlp.up_proj.__class__ = Pair
    mlp.up_proj = wrapper(mlp.up_proj)
    norms = GradientNorms(model)
    assert disagreements(norms) == ["model.layers.1.mlp.up_proj.inner.weight"]
    norms.give_up_rules(disagreements(norms))
    check(model, norms)


def recurrent(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    mamba = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}
    configs = {
        "mamba": MambaConfig(**mamba),
        "falcon-mamba": FalconMambaConfig(**mamba),
        "mamba2": Mamba2Config(**mamba, num_heads=6, head_dim=8, n_groups=1, chunk_size=8),
        "rwkv": RwkvConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, attention_hidden_size=24),
        "jamba": JambaConfig(
            **GROUPED, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
        ),
    }  # fmt: skip
    ways = {"experts_implementation": "eager"} if name == "jamba" else {}
    return AutoModelForCausalLM.from_config(configs[name], **ways).double().eval()


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "mamba2", "rwkv", "jamba"])
def test_recurrent_models_with_autograd_where_rules_do_not_hold(name):
    model = recurrent(name)
    norms = GradientNorms(model)
    norms.give_up_rules(disagreements(norms))
    assert norms.coverage.slow
    assert disagreements(norms) == []
    check(model, norms, tolerance=1e-6)  # some layers compute in float32


def test_lora_on_a_tied_embedding():
    model = model_of("llama-tied")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    norms = GradientNorms(model.eval())
    assert norms.coverage.tied == {"model.embed_tokens.base_layer.weight"}
    check(model, norms)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_token_measures(name):
    model = model_of(name)
    batch = batch_of(SAMPLES, SCORED)
    seen = [TokenMeasures(batch), TokenMeasures(batch)]
    Likelihood(model).log_neg_log_probs(batch, seen[0])
    GradientNorms(model)(batch, seen[1])
    for i, (sample, flags) in enumerate(zip(SAMPLES, SCORED, strict=True)):
        logits = model(torch.tensor([sample])).logits.detach()
        log_p = logits[0, :-1].log_softmax(-1)[torch.tensor(flags[1:])]
        targets = torch.tensor(sample[1:])[torch.tensor(flags[1:])]
        for measures in seen:
            means = measures.means()
            assert means["entropy"][i] == pytest.approx(float(-(log_p.exp() * log_p).sum(1).mean()), rel=1e-6)
            assert means["memorization_accuracy"][i] == float((log_p.argmax(1) == targets).double().mean())
