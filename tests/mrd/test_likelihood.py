"""Margins keep full relative precision, memory does not grow with the vocabulary, padding is invisible."""

import mpmath
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, OPTConfig

from mrd_ray.mrd import likelihood
from mrd_ray.mrd.double import keep_float64
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch, log_neg_log_prob, output_layer_is_plain, sum_log_probs

SMALL = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=101, n_embd=16, n_layer=2, n_head=2),
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16),
    "gemma2, capped logits": Gemma2Config(
        **SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0
    ),
    "granite, scaled logits": GraniteConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, logits_scaling=3.0),
}


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()
    keep_float64(model)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0.0, 0.3)
    return model


def batch_of(*lengths: int) -> tuple[list[list[int]], MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 101, (length,), generator=generator).tolist() for length in lengths]
    return tokens, MicroBatch.collate(tokens, [[True] * length for length in lengths], torch.device("cpu"))


@pytest.mark.parametrize("a", [-5000.0, -800.0, -100.0, -37.0, -30.0001, -29.9999, -1.0, 0.0, 0.541, 19.0, 21.0, 800.0])
def test_log_neg_log_prob_to_float64_rounding(a):
    with mpmath.workdps(3000):
        exact = mpmath.log(mpmath.log1p(mpmath.exp(mpmath.mpf(a))))
        error = abs(mpmath.mpf(float(log_neg_log_prob(torch.tensor(a, dtype=torch.float64)))) - exact)
        assert error < 4e-16 * max(1, abs(exact))


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_log_softmax_of_the_models_own_logits(name):
    model = model_of(name)
    tokens, batch = batch_of(9, 4, 7)
    found = sum_log_probs(Likelihood(model).log_neg_log_probs(batch), batch.scored)
    for sample, log_prob in zip(tokens, found, strict=True):
        logits = model(torch.tensor([sample])).logits[0].log_softmax(-1)
        expected = sum(float(logits[t - 1, sample[t]]) for t in range(1, len(sample)))
        assert float(log_prob) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_that_are_changed_after_the_output_layer_are_noticed(name):
    assert output_layer_is_plain(model_of(name)) == ("logits" not in name)


def test_chunks_of_the_output_layer_change_nothing(monkeypatch):
    model = model_of("llama")
    _, batch = batch_of(9, 4, 7)
    whole = Likelihood(model).margins(batch)
    monkeypatch.setattr(likelihood, "LOGITS", 303)  # three tokens at a time
    torch.testing.assert_close(Likelihood(model).margins(batch), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("width", [1, 2, 50, 100])  # 1: slices in which only the target stands
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_slices_of_the_vocabulary_change_nothing(name, width, monkeypatch):
    model = model_of(name)
    _, batch = batch_of(9, 4, 7)
    whole = Likelihood(model).margins(batch)
    monkeypatch.setattr(likelihood, "_VOCABULARY", width)
    torch.testing.assert_close(Likelihood(model).margins(batch), whole, rtol=1e-13, atol=1e-13)
    monkeypatch.setattr(likelihood, "_CACHED", 2 * width)  # two rows at a time
    torch.testing.assert_close(Likelihood(model).margins(batch), whole, rtol=1e-13, atol=1e-13)


def test_measures_leave_every_bit_of_the_margins():
    model = model_of("llama")
    _, batch = batch_of(9, 4, 7)
    seen = Likelihood(model).margins(batch, likelihood.TokenMeasures(batch))
    assert torch.equal(seen, Likelihood(model).margins(batch))


def test_logits_of_minus_infinity_are_tokens_that_cannot_come():
    logits = torch.full((1, 6), -torch.inf, dtype=torch.float64)
    logits[0, [1, 4]] = torch.tensor([2.0, 0.5], dtype=torch.float64)
    for width in (2, 3, 6):  # the first slice of two holds nothing but the target
        found = likelihood.Margins(torch.tensor([1]))
        for piece in logits.clone().split(width, 1):
            found.add(piece)
        assert found.a.item() == pytest.approx(0.5 - 2.0, abs=1e-12)


def test_a_hook_of_the_output_layer_is_run():
    """As DeepSpeed's are, which fetch the weights."""
    model = model_of("llama")
    _, batch = batch_of(9, 4, 7)
    model.get_output_embeddings().register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    doubled = Likelihood(model)
    doubled._by_chunks = True
    model.get_output_embeddings()._forward_pre_hooks.clear()
    plain = Likelihood(model).margins(batch)
    model.get_output_embeddings().register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    assert not torch.allclose(doubled.margins(batch), plain)


def test_content_of_padding_is_invisible():
    model = model_of("llama")
    _, batch = batch_of(9, 4)
    other = batch.token_ids.clone()
    other[1, 4:] = 77
    likelihood_of = Likelihood(model).margins
    assert torch.equal(likelihood_of(batch), likelihood_of(MicroBatch(other, batch.scored)))


def test_left_padding_with_a_mask_gives_the_same():
    """What a left-padding pipeline would compute, with mask and positions, equals our right padding."""
    model = model_of("llama")
    tokens, batch = batch_of(9, 4)
    padded = torch.tensor([tokens[0], [0] * 5 + tokens[1]])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits.log_softmax(-1)
    expected = sum(float(logits[1, t - 1, padded[1, t]]) for t in range(6, 9))
    found = sum_log_probs(Likelihood(model).log_neg_log_probs(batch), batch.scored)
    assert float(found[1]) == pytest.approx(expected, rel=1e-12)


def test_memorised_tokens_keep_their_precision():
    """Float32 logits that give probability 1: log-softmax is exactly 0, the margin is right to float32's rounding."""
    logits = torch.tensor([[60.0, 1.0, -2.0, 0.5], [0.0, 90.0, 3.0, 2.0]])
    targets = torch.tensor([0, 1])
    assert (logits.log_softmax(-1)[[0, 1], targets] == 0).all()
    found = likelihood.Margins(targets)
    found.add(logits.clone())
    exact = torch.stack(
        [logits[0, [1, 2, 3]].double().logsumexp(0) - 60, logits[1, [0, 2, 3]].double().logsumexp(0) - 90]
    )
    torch.testing.assert_close(found.a, exact, rtol=2e-9, atol=0)
