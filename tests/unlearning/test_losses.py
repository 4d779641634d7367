"""Losses and their gradients against closed forms; log p of a batch against sums in float64, token by token."""

import math

import pytest
import torch

from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.unlearning import losses

LENGTHS, VOCABULARY = (9, 4, 7, 2), 31
NUM_TOKENS = torch.tensor([8, 2, 5, 1])


def batch_of(seed=0) -> MicroBatch:
    """Ragged samples; of some, only part counts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    scored = [[True] * length for length in LENGTHS]
    scored[1][1] = False
    scored[2][3] = False
    return MicroBatch.collate(tokens, scored, torch.device("cpu"))


def logits_of(scale=3.0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(len(LENGTHS), max(LENGTHS), VOCABULARY, generator=generator)
    return logits.to(dtype).requires_grad_()


def token_by_token(logits: torch.Tensor, batch: MicroBatch) -> list[float]:
    found = [0.0] * len(LENGTHS)
    for row, t in batch.scored.nonzero().tolist():
        found[row] += float(logits[row, t].double().log_softmax(0)[batch.token_ids[row, t + 1]])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])
def test_log_probs(dtype, scale):
    batch, logits = batch_of(), logits_of(scale, dtype)
    assert batch.scored.sum(1).tolist() == NUM_TOKENS.tolist()
    found = losses.log_probs(logits, batch)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(token_by_token(logits.detach(), batch), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_log_probs(dtype):
    """The one-hot target less the probabilities, where it counts; nothing from padding or from what does not count."""
    batch, logits = batch_of(), logits_of(dtype=dtype)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (losses.log_probs(logits, batch) * weights).sum().backward()
    expected = torch.zeros(logits.shape, dtype=torch.float64)
    for row, t in batch.scored.nonzero().tolist():
        expected[row, t] = -logits[row, t].detach().double().softmax(0)
        expected[row, t, batch.token_ids[row, t + 1]] += 1
        expected[row, t] *= weights[row]
    assert logits.grad.dtype == dtype
    coarse = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), expected, rtol=coarse, atol=coarse)
    assert not logits.grad[:, :-1][~batch.scored].any()
    assert not logits.grad[:, -1].any()


def test_padding_is_invisible():
    batch, logits = batch_of(), logits_of()
    other, token_ids = logits.detach().clone(), batch.token_ids.clone()
    for row, length in enumerate(LENGTHS):
        token_ids[row, length:] = VOCABULARY - 1
        other[row, length - 1 :] = 1e30
    assert torch.equal(losses.log_probs(other, MicroBatch(token_ids, batch.scored)), losses.log_probs(logits, batch))


def test_a_sample_without_scored_tokens_weighs_nothing():
    batch, logits = batch_of(), logits_of()
    batch.scored[1] = False
    found = losses.log_probs(logits, batch)
    assert found[1] == 0
    found[1].backward()
    assert not logits.grad.any()


def gradient(loss_of, log_prob: torch.Tensor) -> torch.Tensor:
    leaf = log_prob.clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf).sum(), leaf)[0]


LOG_PROB = torch.tensor([-0.001, -3.0, -12.5, -40.0], dtype=torch.float64)
REFERENCE = torch.tensor([-5.0, -3.0, -0.25, -38.0], dtype=torch.float64)


@pytest.mark.parametrize(("loss", "sign"), [(losses.ascent, 1), (losses.descent, -1)])
def test_ascent_and_descent_are_means_over_tokens(loss, sign):
    expected = [sign * p / n for p, n in zip(LOG_PROB.tolist(), NUM_TOKENS.tolist(), strict=True)]
    assert loss(LOG_PROB, NUM_TOKENS).tolist() == pytest.approx(expected, rel=1e-15)
    assert gradient(lambda p: loss(p, NUM_TOKENS), LOG_PROB).tolist() == [sign / n for n in NUM_TOKENS.tolist()]


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 3.0])
def test_npo(beta):
    """(2 / beta) log(1 + (p / p_ref)^beta): the gradient of log p, weighted by 2 p^beta / (p^beta + p_ref^beta)."""
    p, ref = LOG_PROB.exp() ** beta, REFERENCE.exp() ** beta
    torch.testing.assert_close(losses.npo(LOG_PROB, REFERENCE, beta), 2 / beta * torch.log1p(p / ref))
    found = gradient(lambda leaf: losses.npo(leaf, REFERENCE, beta), LOG_PROB)
    torch.testing.assert_close(found, 2 * p / (p + ref), rtol=1e-12, atol=0)
    assert found[1] == 1  # where nothing has been forgotten yet, as gradient ascent


def test_npo_of_small_beta_is_ascent_on_whole_sequences():
    batch = batch_of()
    ascent, npo = logits_of(), logits_of()
    losses.log_probs(ascent, batch).sum().backward()
    losses.npo(losses.log_probs(npo, batch), REFERENCE, 1e-9).sum().backward()
    torch.testing.assert_close(npo.grad, ascent.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 50.0])
def test_npo_does_not_overflow(beta):
    """Far above the reference it is a line of slope 2; far below, where a sample is forgotten, it vanishes."""
    log_prob = torch.tensor([0.0, -1e4, -1e4], dtype=torch.float64)
    reference = torch.tensor([-1e4, 0.0, -1e4], dtype=torch.float64)
    far = math.exp(-beta * 1e4)
    expected = [2e4 + 2 / beta * math.log1p(far), 2 / beta * math.log1p(far), 2 / beta * math.log(2)]
    assert losses.npo(log_prob, reference, beta).tolist() == pytest.approx(expected, rel=1e-12)
    weights = gradient(lambda p: losses.npo(p, reference, beta), log_prob)
    assert weights.tolist() == pytest.approx([2 / (1 + far), 2 * far / (1 + far), 1.0], rel=1e-12)
