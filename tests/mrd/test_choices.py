"""Choices inside a model: how close they are, how far sigma moves them, and what their flips do, against many draws."""

import pytest
import torch
from architectures import EXPERTS, batch_of, experts_of, mixture_of, model_of

from mrd_ray.mrd.choices import Choices, Reach
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrder
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import delta, noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.self_check import Finding, SelfCheck, has_choices

SIGMA = 1e-5


def test_listens_to_choices_whose_indices_are_used():
    x = torch.tensor([[0.1, 0.5, 0.4], [3.0, 1.0, 1.5]])
    with Choices() as heard:
        x.topk(2).values.sum()  # for the values alone
        _, indices = torch.topk(x, 1, dim=-1)
        x.gather(1, indices)
        x.T.argmax(0).clone()
        x.max(1).indices.clone()
        torch.arange(6).view(2, 3).topk(1).indices.clone()  # no numbers that parameters decide
        torch.topk(x, 3)[1].clone()
    gaps = list(heard.gaps().values())
    assert [gap.tolist() for gap in gaps[:3]] == [pytest.approx([0.1, 1.5])] * 3
    assert len(gaps) == 4
    assert gaps[3].isinf().all()


def test_gaps_of_probabilities_are_those_of_logits():
    logits = torch.tensor([[-30.0, -31.0, 5.0, 2.0]], dtype=torch.float64)
    with Choices() as heard:
        logits.sigmoid().topk(3).indices.clone()
    assert float(heard.gaps()[0][0]) == pytest.approx(1.0)


def test_a_flip_takes_the_next_one():
    x = torch.tensor([[0.1, 0.5, 0.4], [3.0, 1.0, 1.5]])
    flips = dict.fromkeys(range(4), torch.tensor([True, False]))
    with Choices(flips):
        assert x.topk(2).indices.tolist() == [[1, 0], [0, 2]]
        assert torch.topk(x.T, 1, dim=0).values.tolist() == [[pytest.approx(0.4), 3.0]]
        assert x.argmax(1).tolist() == [2, 0]
        assert x.max(1).indices.tolist() == [2, 0]


def test_models_with_choices_are_known():
    for model, expected in ((model_of("llama"), False), (mixture_of(), True)):
        assert has_choices(model, torch.tensor([[1, 2, 3]])) == expected


def random_batch(samples: int, seed: int = 1) -> MicroBatch:
    tokens = torch.randint(1, 61, (samples, 60), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(tokens, torch.ones(samples, 59, dtype=torch.bool))


def gaps_of(likelihood, batch):
    with Choices(positions=batch.token_ids.numel()) as heard:
        values = likelihood.log_neg_log_probs(batch)
    return values, heard.gaps()


def drawn(model, batch, draws):
    """By draw: Delta / s, and by how much each gap moved."""
    likelihood, replica = Likelihood(model), Replica(model)
    theta, at_theta = gaps_of(likelihood, batch)
    s = SIGMA * GradientNorms(model)(batch)[1].sqrt()
    deltas, moved = [], []
    for k in draws:
        replica.perturb(SIGMA, noise_key(3, k))
        values, gaps = gaps_of(likelihood, batch)
        deltas.append(delta(theta, values, batch.scored) / s)
        moved.append(torch.cat([(gaps[turn] - at_theta[turn]).view(len(s), 60, -1) for turn in gaps], 2))
    replica.restore()
    gaps = torch.cat([gap.view(len(s), 60, -1) for gap in at_theta.values()], 2)
    return torch.stack(deltas), torch.stack(moved), gaps


def test_how_far_sigma_moves_a_gap():
    model, batch = mixture_of(), random_batch(4)
    _, moved, gaps = drawn(model, batch, range(300))
    turn = list(gaps_of(Likelihood(model), batch)[1])[1]
    here = torch.zeros(4, 60, dtype=torch.bool)
    places = gaps[:, 5:55, 1].argmax(1) + 5  # far from a flip
    here[torch.arange(4), places] = True
    found = SIGMA * GradientNorms(model).of_gaps(batch, {turn: here.flatten()})
    expected = moved[:, torch.arange(4), places, 1].std(0).double()
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0)


def findings_of(model, batch, draws=2, exact=True, first_order=True):
    replica, likelihood, norms = Replica(model), Likelihood(model), GradientNorms(model)
    theta, squares = norms(batch)
    first = FirstOrder(model, norms.parameters) if first_order else None
    check = SelfCheck(replica, likelihood, norms, first, SIGMA, 0, draws, choices=True, exact=exact)
    return check([batch], [theta], [squares.sqrt().tolist()])[0]


def planted(model, batch, draws):
    """Samples whose Delta jumped in one of many draws; those with every gap beyond four deviations of its moves."""
    deltas, moved, gaps = drawn(model, batch, draws)
    jumped = (deltas.abs() > 5.5).any(0)
    within = (gaps <= 4 * moved.square().mean(0).sqrt())[:, :-1].flatten(1).any(1)
    return jumped, ~within


@pytest.mark.parametrize("samples", [48, pytest.param(1000, marks=pytest.mark.slow)])
def test_flips_within_reach_are_marked_and_others_are_not(samples):
    model, batch = mixture_of(torch.float32, router=30.0, experts=10.0), random_batch(samples)
    jumped, others = planted(model, batch, range(200))
    marked = torch.tensor([finding.doubt() is not None for finding in findings_of(model, batch)])
    assert jumped.sum() >= samples // 5
    assert others.sum() >= samples // 4
    print(f"{int(jumped.sum())} flip, {int((jumped & ~marked).sum())} missed; "
          f"{int((others & marked).sum())} of {int(others.sum())} others marked")  # fmt: skip
    assert not (jumped & ~marked).any()
    assert (others & marked).sum() <= 0.05 * others.sum()


_QUICK = ("phi-moe", "gpt-oss", "deepseek-v3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in EXPERTS]
)
def test_no_flip_of_any_family_is_missed(name):
    """Phi-MoE leaves out experts by a threshold, too, which no top-k shows."""
    model, batch = experts_of(name, torch.float32), random_batch(32)
    jumped, _ = planted(model, batch, range(100))
    marked = torch.tensor([finding.doubt() is not None for finding in findings_of(model, batch)])
    assert jumped.any()
    assert not (jumped & ~marked).any()


def test_comparisons_are_listened_to_where_they_are_of_each_position():
    x = torch.tensor([[0.1, 0.5], [3.0, 1.0]])
    with Choices({1: torch.tensor([[True, False], [False, False]])}, positions=4) as heard:
        torch.gt(x, other=torch.tensor(0.4)).sum()
        assert (x > 0.4).tolist() == [[True, True], [True, True]]
        (x[:1] > 0.4).sum()
    (gap,) = (gap for turn, gap in heard.gaps().items() if turn == 1)
    torch.testing.assert_close(gap, torch.tensor([[0.3, 0.1], [2.6, 0.6]]))


def test_far_out_draws_without_first_order_and_exact_gaps():
    """As in a live engine: what the draws show, and gaps within five deviations of what they move."""
    model, batch = mixture_of(torch.float32, router=30.0, experts=10.0), random_batch(24)
    found = findings_of(model, batch, exact=False, first_order=False)
    sure = findings_of(model, batch)
    flipped = [a for a, b in zip(found, sure, strict=True) if b.flips > 0.5]
    assert len(flipped) >= 4
    assert sum(one.doubt() is not None for one in flipped) >= 0.8 * len(flipped)
    assert all(one.first == [] for one in found)


def test_smooth_models_have_no_doubts():
    model = model_of("llama-tied", torch.float32)
    for finding in findings_of(model, batch_of(), draws=4):
        assert finding.off() < 0.1
        assert finding.flips == 0.0
        assert finding.doubt() is None


def test_what_the_gradient_does_not_know_is_found():
    model = model_of("llama-tied")
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, y: y + 1e-3 * torch.sin(y.detach() * 3e4))
    findings = findings_of(model, batch_of(), draws=4)
    assert any("draws differ" in (finding.doubt() or "") for finding in findings)


def test_doubt_takes_mu_into_account():
    finding = Finding([1.5, -0.5], [1.0, -1.0], 0.0, 0.0)
    assert finding.doubt() is not None
    assert finding.doubt(mu=0.5) is None
    assert Finding([1.0], [], 0.0, 0.0).doubt() is None
    assert Finding([-6.0], [], 0.0, 0.0).doubt() is not None
    assert Finding([1.0], [1.0], 0.02, 0.0).doubt() is not None


def test_reach_without_choices_is_nothing():
    batch = random_batch(2)
    assert Reach(batch.scored, {}).effect(lambda flips: None).tolist() == [[0.0, 0.0]] * 2
